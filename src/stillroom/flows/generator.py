"""What one- and few-step generators share: samples by number, whatever the batch they are drawn in."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from stillroom.flows.flow import noise_of
from stillroom.settings import Refusal, Run, seed_of

Noise = Callable[[int], Tensor]
"""noise(k) [B, *shape]: the k-th noise of these samples; noise(0) is where they start."""
Draws = Callable[[Noise, Tensor | None], Tensor]


class Generator(nn.Module):
    """Of samples of one shape. A subclass says how noise becomes samples, in `drawing`."""

    shape: tuple[int, ...]
    classes: int | None

    def drawing(self, guidance: float, steps: int | None, weak: nn.Module | None) -> Draws:
        """The way from noise and labels to samples; refused where it is not served."""
        raise NotImplementedError

    def labels(self, first: int, count: int) -> Tensor | None:
        """Class-balanced: sample i is of class i modulo the number of classes."""
        return None if self.classes is None else torch.arange(first, first + count) % self.classes

    def sample(self, n: int, seed: int = 0, y: Tensor | None = None, guidance: float = 1.0, batch: int = 256,
               first: int = 0, weak: nn.Module | None = None, steps: int | None = None) -> Tensor:
        """[n, *shape]: samples first, ..., first+n-1 of this seed, the same at any batch size."""
        if y is not None and len(y) != n:
            raise Refusal(f"{len(y)} labels for {n} samples: give one label per sample")
        device = next((p.device for p in chain(self.parameters(), self.buffers())), torch.device("cpu"))
        y = self.labels(first, n) if y is None else y
        draw = self.drawing(guidance, steps, weak)
        out = []
        with torch.no_grad():
            for i in range(0, n, batch):
                labels = None if y is None else y[i : i + batch].to(device)
                out.append(draw(noises(self.shape, first + i, min(batch, n - i), seed, device), labels).cpu())
        return torch.cat(out)


def drawn_at_once(run: Run) -> int:
    """Samples that a run draws together: without gradients one takes a part of a training sample's memory."""
    return min(256, 4 * run.batch // run.accumulate)


def noises(shape: tuple[int, ...], first: int, count: int, seed: int, device: torch.device) -> Noise:
    """Those of samples first, ..., first+count-1: each sample has its own in every step."""
    return lambda k: noise_of(shape, first, count, seed if k == 0 else seed_of(seed, "step", k)).to(device)

"""A flow as others use it: a denoiser, the shape of what it makes, and how it is sampled unless told otherwise."""

import torch
from torch import Tensor, nn

from stillroom.flows.denoiser import Denoises, guided
from stillroom.flows.samplers import Callback, _silent, latest, samplers
from stillroom.nets.build import buildable
from stillroom.nets.offload import device_of
from stillroom.paths import VE, clock, karras_grid, shift, uniform_grid
from stillroom.settings import Refusal, nearest, seed_of


def noise_of(shape: tuple[int, ...], first: int, count: int, seed: int) -> Tensor:
    """[count, *shape] noise of samples first, first+1, ...: sample i has its own, whatever the batch it is drawn in."""
    rows = [        # on the CPU, also where a recipe is being built under another device
        torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, i)), device="cpu")
        for i in range(first, first + count)
    ]
    return torch.stack(rows)


@buildable
class Flow(nn.Module):
    def __init__(self, denoiser: Denoises, shape: tuple[int, ...], sampler: str = "heun", steps: int = 18,
                 shift: float = 1.0):
        super().__init__()
        if sampler not in samplers:
            raise Refusal(f"no sampler is called {sampler!r}{nearest(sampler, samplers)}")
        self.denoiser, self.shape, self.sampler, self.steps, self.shift = denoiser, tuple(shape), sampler, steps, shift

    @property
    def classes(self) -> int | None:
        return self.denoiser.classes

    def labels(self, first: int, count: int) -> Tensor | None:
        """Class-balanced: sample i is of class i modulo the number of classes."""
        return None if self.classes is None else torch.arange(first, first + count) % self.classes

    def time(self, u: Tensor) -> Tensor:
        """That at share u of the way from data to noise, shifted: of which plans, edges and grids are told."""
        return shift(clock(self.denoiser.path, u), self.shift)

    def times(self, denoiser: Denoises, steps: int) -> Tensor:
        """[steps + 1], from noise to data. Equal steps of a variance-exploding path would spend all but one where there
        is nothing but noise."""
        if isinstance(denoiser.path, VE):
            return karras_grid(denoiser.path, steps)
        return uniform_grid(steps, start=float(shift(latest(denoiser), 1 / self.shift)), s=self.shift)

    def sample(self, n: int, seed: int = 0, y: Tensor | None = None, guidance: float = 1.0, steps: int | None = None,
               batch: int = 256, first: int = 0, callback: Callback = _silent, weak: "Flow | None" = None,
               interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """[n, *shape]: samples first, ..., first+n-1 of this seed, the same at any batch size.

        Guidance goes from the answer without the label to that with it, and on; from that of `weak`, a poorer flow of
        the same data, where one is given. It acts on the part `interval` of the way to
        noise.
        """
        if guidance != 1 and self.classes is None and weak is None:
            raise Refusal("guidance needs a conditional flow: this one was trained without labels; use guidance 1, or "
                          "give a weaker flow")
        if not 0 <= interval[0] < interval[1] <= 1:
            raise Refusal(f"interval {interval[0]:g} to {interval[1]:g}: give two shares of the way from 0 (data) to "
                          "1 (noise)")
        if weak is not None and weak.shape != self.shape:
            raise Refusal(f"the weak flow makes {list(weak.shape)}, this one {list(self.shape)}")
        if y is not None and len(y) != n:
            raise Refusal(f"{len(y)} labels for {n} samples: give one label per sample")
        device = device_of(self)
        y = self.labels(first, n) if y is None else y
        try:
            denoiser = guided(self.denoiser, guidance, None if weak is None else weak.denoiser, interval)
        except ValueError as error:         # two flows whose answers cannot be subtracted
            raise Refusal(f"guidance: {error}") from error
        times = self.times(denoiser, steps or self.steps)
        scale = float(denoiser.path.at(times[0]).sigma)  # 1 at t=1, but for variance-exploding paths
        out = []
        for i in range(0, n, batch):
            count = min(batch, n - i)
            labels = None if y is None else y[i : i + count].to(device)
            start = scale * noise_of(self.shape, first + i, count, seed)
            out.append(samplers[self.sampler](denoiser, start.to(device), times, labels, callback).cpu())
        return torch.cat(out)

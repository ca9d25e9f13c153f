"""A generator that answers in one evaluation: a denoiser's network, asked once, at pure noise."""

from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from stillroom.flows.denoiser import Denoiser
from stillroom.flows.flow import noise_of
from stillroom.nets.build import build, buildable, describe
from stillroom.paths import Kind, Path, at_least_float32, convert
from stillroom.settings import Refusal


class Draws(Protocol):
    """What stands in for noise z: one evaluation of any generator."""

    def __call__(self, z: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor: ...


@buildable
class OneStep(nn.Module):
    """x = x0(sigma(1) z, t = 1, y, w): where a flow from pure noise would arrive, were its path straight.

    y: labels, the null label standing for "any". w: strengths of guidance, for a network that was built for them.
    """

    def __init__(self, net: nn.Module, path: Path, prediction: Kind, shape: tuple[int, ...]):
        super().__init__()
        self.net, self.path, self.shape = net, path, tuple(shape)
        self.prediction: Kind = prediction
        self.classes: int | None = getattr(net, "classes", None)
        self.takes_strength: bool = getattr(net, "guided", False)

    def forward(self, z: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        t = torch.ones(len(z), device=z.device)
        c = self.path.over(t, z)
        x_t = c.sigma * z
        extra = {} if y is None else {"y": y}
        extra |= {} if w is None else {"w": w}
        native = at_least_float32(self.net(x_t, t, **extra))
        return convert(native, at_least_float32(x_t), c, self.prediction, "x0")

    def labels(self, first: int, count: int) -> Tensor | None:
        """Class-balanced: sample i is of class i modulo the number of classes."""
        return None if self.classes is None else torch.arange(first, first + count) % self.classes

    def sample(self, n: int, seed: int = 0, y: Tensor | None = None, guidance: float = 1.0, batch: int = 256,
               first: int = 0, weak: "OneStep | None" = None) -> Tensor:
        """[n, *shape]: samples first, ..., first+n-1 of this seed, the same at any batch size.

        Guidance is the network's own input where it has one. Else it extrapolates from a weaker answer to the same
        noise: that of `weak`, or of this network without the label.
        """
        if y is not None and len(y) != n:
            raise Refusal(f"{len(y)} labels for {n} samples: give one label per sample")
        if weak is not None and weak.shape != self.shape:
            raise Refusal(f"the weak generator makes {list(weak.shape)}, this one {list(self.shape)}")
        if guidance != 1 and self.classes is None and weak is None:
            raise Refusal("guidance needs labels, or a weaker generator: this one was trained without labels; "
                          "use guidance 1")
        device = next((p.device for p in chain(self.parameters(), self.buffers())), torch.device("cpu"))
        y = self.labels(first, n) if y is None else y
        draw = self.guided(guidance, weak)
        out = []
        with torch.no_grad():
            for i in range(0, n, batch):
                count = min(batch, n - i)
                labels = None if y is None else y[i : i + count].to(device)
                out.append(draw(noise_of(self.shape, first + i, count, seed).to(device), labels).cpu())
        return torch.cat(out)

    def guided(self, guidance: float, weak: "OneStep | None") -> Draws:
        if guidance == 1:
            return self
        if self.takes_strength and weak is None:
            return lambda z, y=None, w=None: self(z, y, torch.full((len(z),), guidance, device=z.device))
        if weak is not None:
            blind = weak.classes is None
            return lambda z, y=None, w=None: extrapolated(guidance, self(z, y), weak(z, None if blind else y))
        return lambda z, y=None, w=None: extrapolated(guidance, self(z, y), self(z))


def extrapolated(w: float, strong: Tensor, weak: Tensor) -> Tensor:
    """x + (w - 1)(x - x_weak): from a weaker answer to the same noise through the stronger, and on.

    Our reading of "extrapolation-based guided sampling" (Drift-RAE, abstract); what the paper does is not public.
    """
    return strong + (w - 1) * (strong - weak)


def student_of(teacher: Denoiser, shape: tuple[int, ...], takes_strength: bool) -> OneStep:
    """The teacher's network asked at t = 1, where it begins; with an input for the strength of guidance, which begins
    without effect, if it shall take one."""
    if teacher.scale_input:
        raise Refusal("a student cannot start from a teacher that scales its input; train the teacher on another path")
    description = describe(teacher.net)
    if takes_strength:
        if "guided" not in description["arguments"]:
            raise Refusal(f"a {type(teacher.net).__name__} has no input for the strength of guidance; leave it out")
        description["arguments"]["guided"] = True
    net = build(description)
    weights = teacher.net.state_dict()
    new = {k: v for k, v in net.state_dict().items() if k not in weights}
    net.load_state_dict(weights | new)          # new: the strength's embedding alone, because all else is the teacher's
    return OneStep(net, teacher.path, teacher.prediction, shape)

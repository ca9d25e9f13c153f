"""Any network seen through a path: it answers x0, eps, v or score, whatever it natively predicts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillroom.nets.build import buildable
from stillroom.nets.lora import without_lora
from stillroom.paths import Kind, Path, at_least_float32, clock_at, convert, expand
from stillroom.settings import Refusal, nearest


class Denoises(nn.Module):
    """What callers may ask. A subclass answers `forward` in its native prediction, in float32."""

    path: Path
    prediction: Kind
    classes: int | None

    def predict(self, kind: Kind, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return convert(self(x_t, t, y), at_least_float32(x_t), self.path.over(t, x_t), self.prediction, kind)

    def x0(self, x_t, t, y=None):
        return self.predict("x0", x_t, t, y)

    def eps(self, x_t, t, y=None):
        return self.predict("eps", x_t, t, y)

    def v(self, x_t, t, y=None):
        return self.predict("v", x_t, t, y)

    def score(self, x_t, t, y=None):
        return self.predict("score", x_t, t, y)


@buildable
class Denoiser(Denoises):
    """A network `net(x_t, t, y, r)` that natively predicts `prediction` on `path`.

    scale_input divides x_t by its standard deviation for data of unit variance: a must where sigma grows to 80.
    """

    def __init__(self, net: nn.Module, path: Path, prediction: Kind = "v", scale_input: bool = False):
        super().__init__()
        self.net, self.path, self.prediction, self.scale_input = net, path, prediction, scale_input
        self.classes = getattr(net, "classes", None)

    @property
    def takes_strength(self) -> bool:
        """Of guidance; untold, it answers as of strength 1."""
        return getattr(self.net, "guided", False)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        if self.scale_input:
            c = self.path.over(t, x_t)
            x_t = x_t / (c.alpha**2 + c.sigma**2).sqrt()
        extra = {} if y is None else {"y": y}
        extra |= {} if r is None else {"r": r}
        extra |= {} if w is None else {"w": w}
        return at_least_float32(self.net(x_t, t, **extra))

    def jump(self, x_t: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None) -> Tensor:
        """From time t to time r in one evaluation of a two-time network: the DDIM step of its prediction for (t, r)."""
        native, x_t = self(x_t, t, y, r), at_least_float32(x_t)
        now, then = self.path.over(t, x_t), self.path.over(r, x_t)
        x0, eps = (convert(native, x_t, now, self.prediction, kind) for kind in ("x0", "eps"))
        return then.alpha * x0 + then.sigma * eps

    def hidden(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, at: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Outputs of the named modules of the network, in one forward; of several outputs the last, which in blocks of
        joint attention is the picture's."""
        found: dict[str, Tensor] = {}

        def keep(name):
            return lambda _module, _inputs, out: found.__setitem__(name, out[-1] if isinstance(out, tuple) else out)

        hooks = [part_of(self.net, name).register_forward_hook(keep(name)) for name in at]
        try:
            self(x_t, t, y)
        finally:
            for hook in hooks:
                hook.remove()
        if silent := [name for name in at if name not in found]:
            inside = [f"{silent[0]}.{name}" for name, _ in part_of(self.net, silent[0]).named_children()]
            raise Refusal(f"layers: the network never asks {silent[0]!r} itself, which has no output then; name a part "
                          f"of it, {', '.join(inside[:1]) or 'a layer'}")
        return found


def part_of(net: nn.Module, name: str) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in net.named_modules() if known]
        raise Refusal(f"layers: the network has no module {name!r}{nearest(name, known)}") from None


@buildable
class Bare(Denoises):
    """A denoiser with low-rank adapters as it was without them: teacher and student in one set of weights."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.path, self.prediction, self.classes = denoiser.path, denoiser.prediction, denoiser.classes

    @property
    def net(self) -> nn.Module:
        return self.denoiser.net

    @property
    def takes_strength(self) -> bool:
        return self.denoiser.takes_strength

    def forward(self, x_t, t, y=None, w=None):
        with without_lora(self.net):
            return self.denoiser(x_t, t, y, w=w)

    def hidden(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, at: tuple[str, ...] = ()) -> dict[str, Tensor]:
        with without_lora(self.net):
            return self.denoiser.hidden(x_t, t, y, at)


class Split(NamedTuple):
    conditional: Tensor
    unconditional: Tensor


@buildable
class Guided(Denoises):
    """Classifier-free guidance, F = F(negative) + scale (F(y) - F(negative)), in the native prediction.

    negative: the label that stands for "no condition"; the network's null label unless given.
    """

    def __init__(self, denoiser: Denoises, scale: float, negative: int | None = None):
        super().__init__()
        if denoiser.classes is None:
            raise ValueError("guidance needs a conditional denoiser")
        self.denoiser, self.scale, self.negative = denoiser, scale, denoiser.classes if negative is None else negative
        self.path, self.prediction, self.classes = denoiser.path, denoiser.prediction, denoiser.classes

    def split(self, x_t: Tensor, t: Tensor, y: Tensor) -> Split:
        """Both native predictions, from one forward of twice the batch."""
        null = torch.full_like(y, self.negative)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]))
        return Split(*both.chunk(2))

    def forward(self, x_t, t, y=None):
        if y is None:
            return self.denoiser(x_t, t)
        conditional, unconditional = self.split(x_t, t, y)
        return unconditional + self.scale * (conditional - unconditional)


@buildable
class Told(Denoises):
    """A denoiser that has learned to be guided, at the strength it is told: one evaluation where guidance takes two."""

    def __init__(self, denoiser: "Denoiser | Bare", scale: float):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.path, self.prediction, self.classes = denoiser.path, denoiser.prediction, denoiser.classes

    def forward(self, x_t, t, y=None):
        return self.denoiser(x_t, t, y, w=torch.full_like(t, self.scale))


@buildable
class AutoGuided(Denoises):
    """Guidance by a weaker model of the same data (Karras et al. 2024): x0 = strong + (scale - 1) (strong - weak), and
    so in every prediction, because it is linear. A weak model without classes is asked without the label."""

    def __init__(self, denoiser: Denoises, weak: Denoises, scale: float):
        super().__init__()
        if weak.path != denoiser.path or weak.prediction != denoiser.prediction:
            raise ValueError(f"the weak model answers {weak.prediction} on {weak.path}, the strong one "
                             f"{denoiser.prediction} on {denoiser.path}; they must agree")
        if weak.classes not in (None, denoiser.classes):
            raise ValueError(f"the weak model knows {weak.classes} classes, the strong one {denoiser.classes or 0}")
        self.denoiser, self.weak, self.scale = denoiser, weak, scale
        self.path, self.prediction, self.classes = denoiser.path, denoiser.prediction, denoiser.classes

    def forward(self, x_t, t, y=None):
        strong, weak = self.denoiser(x_t, t, y), self.weak(x_t, t, None if self.weak.classes is None else y)
        return strong + (self.scale - 1) * (strong - weak)


@buildable
class During(Denoises):
    """`inside` from share low to high of the way to noise, `outside` elsewhere: guidance that is left out where it
    does harm (Kynkaanniemi et al. 2024)."""

    def __init__(self, inside: Denoises, outside: Denoises, low: float, high: float):
        super().__init__()
        self.inside, self.outside, self.low, self.high = inside, outside, low, high
        self.path, self.prediction, self.classes = outside.path, outside.prediction, outside.classes

    def forward(self, x_t, t, y=None):
        u = clock_at(self.path, t).clamp(0, 1)
        within = (self.low <= u) & (u <= self.high)
        if bool(within.all()) or not bool(within.any()):     # as in every sampler: one is asked and not both
            return (self.inside if bool(within.all()) else self.outside)(x_t, t, y)
        return torch.where(expand(within, x_t), self.inside(x_t, t, y), self.outside(x_t, t, y))


def guided(denoiser: Denoises, scale: float, weak: Denoises | None = None,
           interval: tuple[float, float] = (0.0, 1.0)) -> Denoises:
    """Guidance by the missing label, or by a weaker model. Of scale 1 it is the denoiser itself, at half the cost, and
    so where its network takes the strength."""
    if scale == 1:
        return denoiser
    if weak is not None:
        strong = AutoGuided(denoiser, weak, scale)
    elif isinstance(denoiser, Denoiser | Bare) and denoiser.takes_strength:
        strong = Told(denoiser, scale)
    else:
        strong = Guided(denoiser, scale)
    return strong if interval == (0.0, 1.0) else During(strong, denoiser, *interval)

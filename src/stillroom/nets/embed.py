"""What every net is told besides x_t: the time t, perhaps a second time r, a label y, a strength of guidance w."""

import copy
import math

import torch
from torch import Tensor, nn

from stillroom.nets.build import build, describe
from stillroom.settings import Refusal

STRONGEST = 8.0
"""Strengths of guidance up to 1 + this are told apart as times from 0 to 1 are."""


def final(layer: nn.Module, x: Tensor) -> Tensor:
    """The last projection in float32 even under autocast: score differences are small against the scores themselves."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def zeroed(layer: nn.Linear | nn.Conv2d):
    """The layer with weight and bias zero: a final projection that predicts 0, a residual branch that adds nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """[*] -> [*, width]: cosines and sines of 1000 t at geometric frequencies from 1 down to 1/10000, in float32.

    In bfloat16 1000 t would have 8 bits, and neighbouring times would be one.
    """
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(1e4) / half))
    angle = (1000 * t.float())[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """[*] -> [*, width]."""

    def __init__(self, width: int, frequencies: int = 128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal(t, self.frequencies))


class Condition(nn.Module):
    """c(t, y, r, w) = time(t) + gap(t - r) + label(y) + strength(w): [*t.shape, width]. The label table's last row is
    the null label. The strength's part starts at zero: a net that gets it anew answers as it did without."""

    def __init__(self, width: int, classes: int | None, two_times: bool, guided: bool = False):
        super().__init__()
        self.classes, self.two_times = classes, two_times
        self.time = TimeEmbedding(width)
        self.gap = TimeEmbedding(width) if two_times else None
        self.strength = TimeEmbedding(width) if guided else None
        if self.strength is not None:
            zeroed(self.strength.mlp[-1])  # pyright: ignore
        self.label = nn.Embedding(classes + 1, width) if classes is not None else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Tensor, y: Tensor | None, r: Tensor | None, w: Tensor | None = None) -> Tensor:
        c = self.time(t)
        if self.strength is not None:
            w = torch.ones_like(t) if w is None else w
            if w.shape != t.shape:
                raise ValueError(f"w has shape {tuple(w.shape)}: expected one strength per time, {tuple(t.shape)}")
            c = c + self.strength((w.float() - 1) / STRONGEST)
        elif w is not None:
            raise ValueError("this net was given a strength of guidance; build it with guided=True")
        if self.gap is not None:
            if r is None:
                raise ValueError("this net has two times: give r beside t")
            if r.shape != t.shape:
                raise ValueError(f"r has shape {tuple(r.shape)}, t has {tuple(t.shape)}: they must be equal")
            # The difference is taken in float32: for r close to t it is what a jump is about.
            c = c + self.gap(t.float() - r.float())
        elif r is not None:
            raise ValueError("this net has one time and was given r; build it with two_times=True")
        if self.label is not None and self.classes is not None:
            if y is None:
                y = torch.full(t.shape[:1], self.classes, dtype=torch.int64, device=t.device)
            if y.shape != t.shape[:1]:
                raise ValueError(f"y has shape {tuple(y.shape)}: expected one label per sample, {tuple(t.shape[:1])}")
            c = c + self.label(y).reshape(*y.shape, *[1] * (t.ndim - 1), -1)
        elif y is not None:
            raise ValueError("this net knows no classes and was given labels y; build it with classes=")
        return c


def one_time_per_sample(x: Tensor, t: Tensor):
    """Broadcasting a time of the wrong shape would train silently on the wrong noise levels."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}: expected one time per sample, {tuple(x.shape[:1])}")


def require_fit(net: nn.Module, x: Tensor, t: Tensor, wanted: tuple[int, ...]):
    one_time_per_sample(x, t)
    if x.shape[1:] != wanted:
        raise ValueError(f"a picture of {tuple(x.shape[1:])}: this {type(net).__name__} was built for {wanted}")


INPUTS = {"guided": "the strength of guidance", "two_times": "a second time"}


def with_input(net: nn.Module, argument: str) -> nn.Module:
    """The same network with one input more, "guided" or "two_times", which begins without effect."""
    description = describe(net)
    if argument not in description["arguments"]:
        raise Refusal(f"a {type(net).__name__} has no input for {INPUTS[argument]}")
    if description["arguments"][argument]:
        return copied(net)
    description["arguments"][argument] = True
    wider, weights = build(description), net.state_dict()
    if argument == "two_times":
        zeroed(wider.condition.gap.mlp[-1])
    new = {k: v for k, v in wider.state_dict().items() if k not in weights}
    wider.load_state_dict(weights | new)        # new: that input's embedding alone, because all else is the net's
    return wider


def copied(net: nn.Module) -> nn.Module:
    """A copy that learns."""
    return copy.deepcopy(net).requires_grad_(True)

"""What maps [N, C, h, w] look like over frequencies, and whether an encoder moves with its picture."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.measure.distances import paired_error
from stillroom.settings import Refusal

ROUNDING = 1e-26    # of all power: no coefficient has so little, but for float64's rounding of larger ones


class Slope(NamedTuple):
    slope: float                # a of power ~ 1 / f^a: 0 for white noise, about 2 for photographs
    radii: tuple[float, ...]    # of frequency, over the highest along a side, rising
    power: tuple[float, ...]    # mean over samples, channels and directions


def spectral_slope(x: Tensor) -> Slope:
    """Of the cosine transform, whose mirrored edges do not jump (a Fourier transform's do, and look like detail).
    A line through log power over log frequency; coefficients weigh 1 / f^2, so that each octave counts alike."""
    if x.ndim != 4 or min(x.shape[-2:]) < 2:
        raise Refusal(f"maps of {list(x.shape[1:])}: a spectral slope needs 2 x 2 places or more")
    power = cosine_power(x)                                             # [h, w]
    least, (h, w) = ROUNDING * float(power.sum()), power.shape
    rows, columns = (torch.arange(n, dtype=torch.float64, device=x.device) / n for n in (h, w))
    radius = (rows[:, None].square() + columns.square()).sqrt().flatten()[1:]       # without the mean
    power = power.flatten()[1:]
    if not float(power.min()) > least:
        raise Refusal("the maps have no power at some frequencies: there is no slope")
    weight = radius**-2 / (radius**-2).sum()
    f, p = radius.log(), power.log()
    f_mean, p_mean = (weight * f).sum(), (weight * p).sum()
    slope = -(weight * (f - f_mean) * (p - p_mean)).sum() / (weight * (f - f_mean).square()).sum()
    radii, place = radius.round(decimals=9).unique(return_inverse=True)
    means = torch.zeros_like(radii).index_add_(0, place, power) / torch.bincount(place)
    return Slope(float(slope), tuple(radii.tolist()), tuple(means.tolist()))


def cosine_power(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [h, w]: mean square of each coefficient of the orthonormal cosine transform (DCT-II)."""
    rows, columns = (cosines(n).to(x.device) for n in x.shape[-2:])
    total = torch.zeros(x.shape[-2:], dtype=torch.float64, device=x.device)
    for part in x.split(256):
        total += (rows @ part.double() @ columns.T).square().sum((0, 1))
    return total / (len(x) * x.shape[1])


def cosines(n: int) -> Tensor:
    """[n, n], orthonormal."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = (math.pi * k * (i + 0.5) / n).cos() * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


MOVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(-1),
    "rotate": lambda x: x.rot90(1, (-2, -1)),
    "halve": lambda x: functional.avg_pool2d(x, 2),
}


@torch.no_grad()
def equivariance(encode: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float | None]:
    """|E(T x) - T E(x)|^2 over what it is between one picture and another: 0 where the latents move as the picture
    does, 1 where they might be another's. A move that the sizes do not allow is None: a quarter turn of what is not
    square, halving to what the encoder or the grid of its latents cannot take."""
    z, found = encode(x), dict[str, float | None]()
    for name, move in MOVES.items():
        found[name] = None
        if name == "halve" and (z.shape[-1] % 2 or z.shape[-2] % 2):
            continue
        if name == "rotate" and x.shape[-1] != x.shape[-2]:
            continue
        try:
            moved, expected = encode(move(x)), move(z)
        except Refusal:             # an encoder of one size alone
            continue
        if moved.shape == expected.shape:
            found[name] = paired_error(moved, expected).relative
    return found

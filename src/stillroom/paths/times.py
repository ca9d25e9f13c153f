"""Time laws (which noise levels training visits) and time grids (which ones a sampler visits).

A law is its quantile function: `law.quantile(u)` of uniform u is a draw, `law.cdf` its inverse. So a draw is a pure
function of the step's noise, and any law can be restricted to a range exactly.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stillroom.nets.build import buildable
from stillroom.paths.path import VE, Path

SMALLEST, RHO = 0.002, 7.0
"""Noise ratio at which a grid of Karras et al. (2022) ends, and its exponent."""


class Law(Protocol):
    def quantile(self, u: Tensor) -> Tensor: ...
    def cdf(self, t: Tensor) -> Tensor: ...


def shift(t: Tensor, s: float) -> Tensor:
    """t' = s t / (1 + (s-1) t): the same signal-to-noise per dimension in a space of s^2 times as many dimensions."""
    return s * t / ((1 - t) + s * t)  # this form is exact at both ends


def clock(path: Path, u: Tensor) -> Tensor:
    """The time at share u of the way from data to noise. Of most paths it is u; equal parts of a variance-exploding one
    would spend all but one where there is nothing but noise, and there noise grows as in `karras_grid`, from 0."""
    if not isinstance(path, VE):
        return u
    low, high = _ends(path, u)
    return (torch.lerp(low, high, u) ** RHO - low**RHO) / (high**RHO - low**RHO)


def clock_at(path: Path, t: Tensor) -> Tensor:
    """The share of the way that `clock` gives t at."""
    if not isinstance(path, VE):
        return t
    low, high = _ends(path, t)
    return (torch.lerp(low**RHO, high**RHO, t) ** (1 / RHO) - low) / (high - low)


def _ends(path: VE, like: Tensor) -> Tensor:
    return like.new_tensor([SMALLEST, path.sigma_max]) ** (1 / RHO)


@buildable
@dataclass(frozen=True)
class Uniform:
    low: float = 0.0
    high: float = 1.0

    def quantile(self, u):
        return self.low + (self.high - self.low) * u

    def cdf(self, t):
        return ((t - self.low) / (self.high - self.low)).clamp(0, 1)


def _normal_quantile(u: Tensor) -> Tensor:
    """Kept finite: a uniform draw can be exactly 0. Not through erfinv(2u - 1), which is coarse in the lower tail."""
    info = torch.finfo(u.dtype)
    return torch.special.ndtri(u.clamp(info.tiny, 1 - info.eps / 2))


def _normal_cdf(z: Tensor) -> Tensor:
    return torch.erfc(-z / math.sqrt(2)) / 2  # torch.special.ndtr is wrong by 0.5 % at -4.6 in float32


@buildable
@dataclass(frozen=True)
class LogitNormal:
    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u):
        return torch.sigmoid(self.mean + self.std * _normal_quantile(u))

    def cdf(self, t):
        return _normal_cdf((torch.logit(t) - self.mean) / self.std)


@buildable
@dataclass(frozen=True)
class LogNormal:
    """EDM's law: log(sigma/alpha) is normal. The path turns the ratio into a time; ratios past t=1 stay at 1."""

    path: Path
    mean: float = -1.2
    std: float = 1.2

    def quantile(self, u):
        return self.path.time((self.mean + self.std * _normal_quantile(u)).exp()).clamp(max=1.0)

    def cdf(self, t):
        c = self.path.at(t)
        return _normal_cdf(((c.sigma / c.alpha).log() - self.mean) / self.std)


@buildable
@dataclass(frozen=True)
class Clocked:
    """Another law, of shares of the way that a path goes."""

    law: Law
    path: Path

    def quantile(self, u):
        return clock(self.path, self.law.quantile(u))

    def cdf(self, t):
        return self.law.cdf(clock_at(self.path, t))


@buildable
@dataclass(frozen=True)
class Shifted:
    """Another law, shifted for the dimension of the data: s = sqrt(dimension / reference dimension)."""

    law: Law
    s: float

    def quantile(self, u):
        return shift(self.law.quantile(u), self.s)

    def cdf(self, t):
        return self.law.cdf(shift(t, 1 / self.s))


@buildable
@dataclass(frozen=True)
class Restricted:
    """Another law, conditioned on low <= t <= high."""

    law: Law
    low: float
    high: float

    def quantile(self, u):
        ends = torch.tensor([self.low, self.high], dtype=u.dtype, device=u.device)
        a, b = self.law.cdf(ends)
        return self.law.quantile(a + (b - a) * u).clamp(self.low, self.high)

    def cdf(self, t):
        a, b = self.law.cdf(torch.tensor([self.low, self.high], dtype=t.dtype, device=t.device))
        return ((self.law.cdf(t) - a) / (b - a)).clamp(0, 1)


LawName = Literal["uniform", "logit-normal", "log-normal"]


def law_of(name: LawName, path: Path, s: float = 1.0, low: float = 0.0, high: float = 1.0) -> Law:
    """A law by its name, kept within shares low and high of the path's way, and then shifted by s. Log-normal is of
    noise itself, the others of the way."""
    if name == "log-normal":
        low, high = clock(path, torch.tensor([low, high], dtype=torch.float64)).tolist()
    laws: dict[LawName, Law] = {
        "uniform": Uniform(low, high), "logit-normal": LogitNormal(), "log-normal": LogNormal(path)}
    law = laws[name]
    if name != "uniform" and (low, high) != (0, 1):
        law = Restricted(law, low, high)
    if name != "log-normal" and isinstance(path, VE):
        law = Clocked(law, path)
    return law if s == 1 else Shifted(law, s)


def dimension_shift(dimension: int, reference: int = 4096) -> float:
    return math.sqrt(dimension / reference)


def uniform_grid(steps: int, start: float = 1.0, end: float = 0.0, s: float = 1.0) -> Tensor:
    """steps + 1 times from noise to data, shifted by s."""
    return shift(torch.linspace(start, end, steps + 1, dtype=torch.float64), s)


def karras_grid(path: Path, steps: int, low: float = SMALLEST, high: float = 80.0, rho: float = RHO) -> Tensor:
    """Noise ratios sigma/alpha spaced as in Karras et al. (2022), eq. 5, then 0. The path turns them into times.

    A path whose noise ends below `high` starts at its end.
    """
    c = path.at(torch.ones((), dtype=torch.float64))
    high = min(high, float(c.sigma / c.alpha))
    i = torch.linspace(0, 1, steps, dtype=torch.float64)
    ratio = (high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([path.time(ratio).clamp(max=1.0), torch.zeros(1, dtype=torch.float64)])

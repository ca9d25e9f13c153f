"""A path says how data turns into noise: x_t = alpha(t) x0 + sigma(t) eps, with t=0 data and t=1 noise.

Each path returns both coefficients and their derivatives; every conversion in the house derives from these four.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stillroom.nets.build import buildable


class Coefficients(NamedTuple):
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Time of shape [B] or [B, frames] made broadcastable over x of shape [B, ...] or [B, frames, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is for the inside of networks; what they answer is combined in float32, or float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Path:
    """What all paths do with their coefficients. A path adds `at` and `time`, the inverse of sigma/alpha."""

    def at(self, t: Tensor) -> Coefficients:
        raise NotImplementedError

    def time(self, ratio: Tensor) -> Tensor:
        raise NotImplementedError

    def over(self, t: Tensor, x: Tensor) -> Coefficients:
        """The coefficients at t, shaped to multiply x."""
        return Coefficients(*(expand(c, x) for c in self.at(t)))

    def noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        c = self.over(t, x0)
        return c.alpha * x0 + c.sigma * eps

    def renoise(self, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """From noise level s to a higher level t, in law as if x_t had been made from the same x0."""
        a, b = between(self.over(s, x_s), self.over(t, x_s))
        return a * x_s + b * eps


def between(s: Coefficients, t: Coefficients) -> tuple[Tensor, Tensor]:
    """alpha_{t|s} and sigma_{t|s} of the noising kernel x_s -> x_t, s <= t."""
    alpha = t.alpha / s.alpha
    return alpha, (t.sigma**2 - (alpha * s.sigma) ** 2).clamp(min=0).sqrt()


@buildable
@dataclass(frozen=True)
class Linear(Path):
    """Flow matching: x_t = (1-t) x0 + t eps, v = eps - x0."""

    def at(self, t):
        return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    def time(self, ratio):
        return ratio / (1 + ratio)


@buildable
@dataclass(frozen=True)
class Cosine(Path):
    """Variance preserving on the quarter circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def at(self, t):
        h = math.pi / 2
        c, s = torch.sin(h * (1 - t)), torch.sin(h * t)  # not cos(h t): in float32 it is below zero at t=1
        return Coefficients(c, s, -h * s, h * c)

    def time(self, ratio):
        return torch.atan(ratio) * (2 / math.pi)


@buildable
@dataclass(frozen=True)
class Tabulated(Path):
    """The variance-preserving chain of a diffusers scheduler: betas of `steps` discrete times k, with t = (k+1)/steps.

    log alpha_bar is interpolated linearly, so every discrete time is met exactly, and t=0 is clean data.
    Explicit betas stand in the place of a schedule.
    """

    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    steps: int = 1000
    start: float = 1e-4
    end: float = 0.02
    betas: tuple[float, ...] = ()

    @staticmethod
    def ddpm(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Tabulated":
        """Linear betas, as in DDPM and as diffusers' default."""
        return Tabulated("linear", steps, start, end)

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        """[steps + 1] in float64, from clean data on."""
        match self.schedule:
            case _ if self.betas:
                betas = torch.tensor(self.betas, dtype=torch.float64)
            case "linear":
                betas = torch.linspace(self.start, self.end, self.steps, dtype=torch.float64)
            case "scaled_linear":
                betas = torch.linspace(self.start**0.5, self.end**0.5, self.steps, dtype=torch.float64) ** 2
            case "squaredcos_cap_v2":
                t = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
                alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
                betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
            case other:
                raise ValueError(f"no schedule of betas is called {other!r}")
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])

    def _table(self, like: Tensor) -> tuple[Tensor, int]:
        return self.log_alpha_bar.to(like), len(self.log_alpha_bar) - 1

    def at(self, t):
        table, n = self._table(t)
        k = (t * n).floor().clamp(0, n - 1).long()
        step = table[k + 1] - table[k]
        slope = step * n
        log = table[k] + step * (t * n - k)  # log alpha_bar = 2 log alpha
        alpha, sigma = (log / 2).exp(), (-torch.expm1(log)).sqrt()
        d_alpha = alpha * slope / 2
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def time(self, ratio):
        table, n = self._table(ratio)
        log = -torch.log1p(ratio**2)
        k = torch.searchsorted(-table, -log.contiguous()).clamp(1, n) - 1
        return (k + (log - table[k]) / (table[k + 1] - table[k])) / n


@buildable
@dataclass(frozen=True)
class VE(Path):
    """Variance exploding, as EDM: x_t = x0 + sigma eps with sigma = sigma_max t."""

    sigma_max: float = 80.0

    def at(self, t):
        one = torch.ones_like(t)
        return Coefficients(one, self.sigma_max * t, torch.zeros_like(t), self.sigma_max * one)

    def time(self, ratio):
        return ratio / self.sigma_max

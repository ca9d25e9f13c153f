"""Samplers as plain functions of a denoiser, a start and a grid of times from noise to data.

    x = heun(denoiser, eps, uniform_grid(18), y)

`callback(i, x, x0)` sees every state; methods that do not form x0 hand it the state's own prediction.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.flows.denoiser import Denoises
from stillroom.paths import convert

Callback = Callable[[int, Tensor, Tensor], None]


def _silent(i: int, x: Tensor, x0: Tensor) -> None:
    pass


def latest(denoiser: Denoises) -> Tensor:
    """The time to start from. Where alpha is 0, eps and score say nothing of x0: they start at sigma/alpha = 100, about
    where DDPM's own chain ends; all else starts at 1."""
    one = torch.ones((), dtype=torch.float64)
    if denoiser.prediction in ("eps", "score") and denoiser.path.at(one).alpha < 1e-3:
        return denoiser.path.time(100 * one)
    return one


def _pairs(times: Tensor, x: Tensor):
    """(i, t, s) from each time to the next, as [B] tensors of x's precision."""
    times = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
    for i in range(len(times) - 1):
        yield i, times[i].expand(len(x)), times[i + 1].expand(len(x))


def _over(h: Tensor, x: Tensor) -> Tensor:
    return h.reshape(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def euler(denoiser: Denoises, x: Tensor, times: Tensor, y: Tensor | None = None, callback: Callback = _silent):
    """First order in the flow dx/dt = v(x, t)."""
    for i, t, s in _pairs(times, x):
        v = denoiser.v(x, t, y)
        callback(i, x, convert(v, x, denoiser.path.over(t, x), "v", "x0"))
        x = x + _over(s - t, x) * v
    return x


@torch.no_grad()
def heun(denoiser: Denoises, x: Tensor, times: Tensor, y: Tensor | None = None, callback: Callback = _silent):
    """Second order: the mean of the slopes at both ends; Euler on the last step, where v at t=0 may not exist."""
    for i, t, s in _pairs(times, x):
        v = denoiser.v(x, t, y)
        callback(i, x, convert(v, x, denoiser.path.over(t, x), "v", "x0"))
        ahead = x + _over(s - t, x) * v
        if s[0] > 0:
            ahead = x + _over(s - t, x) * (v + denoiser.v(ahead, s, y)) / 2
        x = ahead
    return x


@torch.no_grad()
def ddim(denoiser: Denoises, x: Tensor, times: Tensor, y: Tensor | None = None, callback: Callback = _silent):
    """The deterministic step x_s = alpha_s x0 + sigma_s eps; exact when the data is a single point."""
    for i, t, s in _pairs(times, x):
        native, now, then = denoiser(x, t, y), denoiser.path.over(t, x), denoiser.path.over(s, x)
        x0, eps = (convert(native, x, now, denoiser.prediction, kind) for kind in ("x0", "eps"))
        callback(i, x, x0)
        x = then.alpha * x0 + then.sigma * eps
    return x


@torch.no_grad()
def dpmpp_2m(denoiser: Denoises, x: Tensor, times: Tensor, y: Tensor | None = None, callback: Callback = _silent):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in log(alpha/sigma), one evaluation a step.

    First order where the log ratio is infinite: leaving pure noise, and arriving at clean data.
    """
    old: tuple[Tensor, Tensor] | None = None  # x0 and h of the step before
    for i, t, s in _pairs(times, x):
        now, then = denoiser.path.over(t, x), denoiser.path.over(s, x)
        x0 = denoiser.x0(x, t, y)
        callback(i, x, x0)
        h = (then.alpha / then.sigma).log() - (now.alpha / now.sigma).log()
        slope = 0.0
        if old is not None and bool(torch.isfinite(h).all() and torch.isfinite(old[1]).all()):
            slope = (x0 - old[0]) * (h / (2 * old[1]))
        x = then.sigma / now.sigma * x + (then.alpha - now.alpha * then.sigma / now.sigma) * (x0 + slope)
        old = x0, h
    return x


samplers = {"euler": euler, "heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m}

"""The gap: the pseudo-target form of a score difference, shared by every method that follows two scores.

    L = 1/2 |x - sg(x - w (F - T))|^2      so that  dL/dx = w (F - T), with the mean over a sample's elements as |.|^2

F answers for the student's own distribution, T for the target's. SDS puts the injected noise in the place of F. What x
came from is all that tells the methods apart: a generator's sample, an encoder's latent, a point.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from stillroom.paths import Coefficients, Kind, at_least_float32, convert, sign_of, target

MATCHES: Mapping[str, tuple[float, float]] = {
    "gap": (1.0, 1.0), "teacher": (0.0, 1.0), "student": (1.0, 0.0), "half": (0.5, 1.0),
}
"""(push, pull) of `direction`: the difference of two scores (DMD); the target's alone, which seeks modes and collapses
(SDS); the student's own alone, which spreads for ever; half of that (ours), narrower than the target."""

Weight = Literal["residual", "sigma", "none"]
"""w of the gap between x0 predictions, as releases have it. residual: 1 / mean |x - T|, a number of each sample (DMD,
DMD2). sigma: alpha sigma; then w (F - T) = sigma^2 (e_T - e_F) in predictions of noise (SDS, VSD, SwiftBrush). none:
1."""


def pseudo_target(x: Tensor, direction: Tensor) -> Tensor:
    """[B]: a loss whose gradient in a sample x of d elements is `direction` / d; its value is half the mean square."""
    x = at_least_float32(x)
    target = x.detach() - at_least_float32(direction.detach())
    return (0.5 * (x - target) ** 2).flatten(1).mean(1)


def gap(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """[B]: the gap of x between two x0 predictions, both in float32 before they are subtracted."""
    return pseudo_target(x, weight * (at_least_float32(fake) - at_least_float32(real)))


def residual_weight(x: Tensor, real: Tensor) -> Tensor:
    """DMD's weight: the inverse mean absolute residual of the target's x0 prediction, one number per sample."""
    residual = (at_least_float32(x.detach()) - at_least_float32(real.detach())).abs().flatten(1).mean(1)  # [B]
    return (1 / residual.clamp(min=torch.finfo(torch.float32).tiny)).reshape(-1, *[1] * (x.ndim - 1))


def direction(target: Tensor, fake: Tensor, real: Tensor, sign: int, push: float = 1.0, pull: float = 1.0) -> Tensor:
    """[B, ...]: the gradient that x descends, from predictions F and T of one kind and what they should have said, u:

        sign (pull (u - T) + push (F - u)) / mean |u - T|,      sign = paths.sign_of(kind)

    From one kind to another u - T and F - u change by one factor, which the sample's time gives: it cancels, and with
    push = pull = 1 this is DMD's normalised gradient in x0. So networks are asked in their own prediction, nothing is
    divided by alpha or sigma, and what is subtracted is float32: converted in half precision first, most of F - T is
    rounding where F is near T. Zero where T = u. One time per sample; else the factor is no number.
    """
    u, real = (at_least_float32(part.detach()) for part in (target, real))
    size = (u - real).abs().flatten(1).mean(1).reshape(-1, *[1] * (u.ndim - 1))     # [B, 1, ...]
    moved = sign * difference(u, fake, real, push, pull)
    return torch.where(size > 0, moved, 0) / size.clamp(min=torch.finfo(size.dtype).tiny)


def difference(target: Tensor, fake: Tensor, real: Tensor, push: float = 1.0, pull: float = 1.0) -> Tensor:
    """[B, ...]: push (F - u) + pull (u - T), in another order: with push = pull, u drops out, and with it the rounding
    of two larger differences."""
    u, fake, real = (at_least_float32(part.detach()) for part in (target, fake, real))
    return push * (fake - real) + (pull - push) * (u - real)


def prediction_gap(kind: Kind, x: Tensor, eps: Tensor, c: Coefficients, fake: Tensor, real: Tensor,
                   weight: Weight = "residual", push: float = 1.0, pull: float = 1.0) -> Tensor:
    """[B]: the gap that x descends, from what both say of alpha x + sigma eps in one prediction."""
    u = target(kind, x.detach(), eps, c)
    if weight == "residual":
        return pseudo_target(x, direction(u, fake, real, sign_of(kind), push, pull))
    moved = difference(u, fake, real, push, pull)
    moved = convert(moved, torch.zeros_like(moved), c, kind, "x0")          # x0 is linear in what was predicted
    return pseudo_target(x, c.alpha * c.sigma * moved if weight == "sigma" else moved)


def augmentation(target: Tensor, conditional: Tensor, unconditional: Tensor, sign: int, guidance: float) -> Tensor:
    """[B, ...]: what guidance adds to the direction of a conditional teacher T(y), where the answer without the label
    takes the place of the fake:

        T(y) + (g - 1) (T(y) - T()) = T_g,    (F - T(y)) + (g - 1) (T() - T(y)) = F - T_g

    Over mean |u - T(y)|, as the direction from F to T(y) is, which knows no guidance: so this grows with g - 1, and the
    two add up to what a guided teacher gives, over that.
    """
    return (guidance - 1) * direction(target, unconditional, conditional, sign)

"""The gap: the pseudo-target form of a score difference, shared by every method that follows two scores.

    L = 1/2 |x - sg(x - w (F - T))|^2      so that  dL/dx = w (F - T), with the mean over a sample's elements as |.|^2

F answers for the student's own distribution, T for the target's. SDS puts the injected noise in the place of F.
"""

import torch
from torch import Tensor

from stillroom.paths import at_least_float32


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

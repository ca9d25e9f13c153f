"""Regressions: what a flow, a teacher, a fake score or a consistent student learns from."""

from torch import Tensor

from stillroom.paths import at_least_float32


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[B]: mean squared error of each sample, in float32."""
    return (at_least_float32(prediction) - at_least_float32(target)).square().flatten(1).mean(1)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 0.00054) -> Tensor:
    """[B]: sqrt(|a - b|^2 + C^2) - C with C = c sqrt(d), over sqrt(d) (Song & Dhariwal 2023, section 3.3)."""
    return (squared_error(prediction, target) + c**2).sqrt() - c

"""Denoising regression: what a flow, a teacher or a fake score learns from."""

from torch import Tensor

from stillroom.paths import at_least_float32


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[B]: mean squared error of each sample, in float32."""
    return (at_least_float32(prediction) - at_least_float32(target)).square().flatten(1).mean(1)

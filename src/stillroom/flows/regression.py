"""Denoising regression of any denoiser in its own prediction space."""

from torch import Tensor

from stillroom.flows.denoiser import Denoises
from stillroom.match import squared_error
from stillroom.paths import target


def denoising_loss(denoiser: Denoises, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
    """[B]: |prediction(x_t, t, y) - target|^2 at x_t = alpha x0 + sigma eps."""
    c = denoiser.path.over(t, x0)
    x_t = c.alpha * x0 + c.sigma * eps
    return squared_error(denoiser(x_t, t, y), target(denoiser.prediction, x0, eps, c))

"""The one table of conversions: every prediction is a combination a x0 + b eps, as is x_t = alpha x0 + sigma eps."""

from typing import Literal

import torch
from torch import Tensor

from stillroom.paths.path import Coefficients

Kind = Literal["x0", "eps", "v", "score", "angular"]


def combination(kind: Kind, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(a, b) of prediction = a x0 + b eps."""
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    match kind:
        case "x0":
            return one, zero
        case "eps":
            return zero, one
        case "v":  # dx_t/dt along the path
            return c.d_alpha, c.d_sigma
        case "score":  # of the conditional density; its posterior mean is the score of p_t
            return zero, -1 / c.sigma
        case "angular":  # "v_prediction" of variance-preserving schedulers
            return -c.sigma, c.alpha
    raise ValueError(f"no prediction is called {kind!r}")


def sign_of(kind: Kind) -> int:
    """Whether a prediction grows or falls with x0 at a given x_t: of every path whose noise ratio grows with time."""
    return 1 if kind in ("x0", "score") else -1


def target(kind: Kind, x0: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
    """What a network of this prediction should have said, given the data and the noise that made x_t."""
    a, b = combination(kind, c)
    return a * x0 + b * eps


def convert(prediction: Tensor, x_t: Tensor, c: Coefficients, source: Kind, target: Kind) -> Tensor:
    """From one prediction to another at the same x_t. Writes target = l x_t + m prediction and solves for l and m."""
    if source == target:
        return prediction
    a, b = combination(source, c)
    p, q = combination(target, c)
    determinant = c.alpha * b - c.sigma * a
    l = (p * b - q * a) / determinant  # noqa: E741
    m = (q * c.alpha - p * c.sigma) / determinant
    return l * x_t + m * prediction

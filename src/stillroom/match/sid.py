"""Score identity distillation (Zhou et al. 2024): a loss of two scores whose gradient passes through both."""

from torch import Tensor

from stillroom.match.gap import residual_weight
from stillroom.paths import at_least_float32


def score_identity(x: Tensor, fake: Tensor, real: Tensor, alpha: float = 1.0) -> Tensor:
    """[B]: (R - F)'[(R - x) - alpha (R - F)] / mean |x - R|, a mean over a sample's elements; the weight is a constant.

    R and F are x0 predictions at a noised x: of the target, and of x's own distribution. Where F is exact, it is the
    mean of x given x_t, so that E (R - F)'(F - x) = 0 and the loss is (1 - alpha) E |R - F|^2 before the weight. Its
    gradient with F's weights held is another one; between Gaussians of equal covariance it is the same for every alpha.
    """
    x, fake, real = (at_least_float32(part) for part in (x, fake, real))
    difference = real - fake
    return (residual_weight(x, real) * difference * (real - x - alpha * difference)).flatten(1).mean(1)

"""What a network of noise levels t > s should say, where samples x_s of level s are all there is: no data, no x0.

With x_t = a x_s + b eps, a = alpha_{t|s} and b = sigma_{t|s}, the mean of -eps / b given x_t is the score of p_t: that
is denoising score matching of the step from s to t, whatever law x_s is of. A score that is told as x0 and noise reads

    eps* = (sigma_t / b) eps,    x0* = (x_t - sigma_t eps*) / alpha_t
                                  = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps

and every prediction is their combination (v on the linear path: Phased DMD, arXiv 2510.27684). At s = 0 they are x0 and
eps. Here all are multiplied by b, to stay finite where t comes near s, and are to be compared with b F(x_t, t).
"""

from torch import Tensor

from stillroom.paths.convert import Kind, target
from stillroom.paths.path import Coefficients, between


def subinterval_target(kind: Kind, x_s: Tensor, eps: Tensor, s: Coefficients, t: Coefficients) -> Tensor:
    """sigma_{t|s} u, where E[u | x_t] is the ideal prediction at x_t."""
    _, b = between(s, t)
    x0 = b / s.alpha * x_s - t.alpha * (s.sigma / s.alpha) ** 2 * eps
    return target(kind, x0, t.sigma * eps, t)


def naive_target(kind: Kind, x_s: Tensor, eps: Tensor, s: Coefficients, t: Coefficients) -> Tensor:
    """sigma_{t|s} times what x_s would ask for if it were data and eps all of the noise: biased for s > 0."""
    _, b = between(s, t)
    return b * target(kind, x_s, eps, t)

"""The mean and the variance within a sample, held to those of real ones: the least that keeps samples in bounds."""

import torch
from torch import Tensor

from stillroom.paths import at_least_float32


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B], [B]: over all numbers of each sample."""
    variance, mean = torch.var_mean(at_least_float32(x).flatten(1), 1, correction=0)
    return mean, variance


def statistics_kl(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """[B]: KL(N(m, s^2) | N(mean, variance)), m and s^2 being those of each sample (Decoupled DMD, eq. 7):

        1/2 ((s^2 + (m - mean)^2) / variance - 1 - log(s^2 / variance))
    """
    m, s2 = mean_and_variance(x)
    ratio = s2.clamp(min=torch.finfo(s2.dtype).tiny) / variance
    return 0.5 * (ratio + (m - mean) ** 2 / variance - 1 - ratio.log())

"""Distances between two sets of samples, and what became of the modes of a mixture. Points as [N, D]."""

from typing import NamedTuple

import torch
from torch import Tensor


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """About a common centre: cdist works through a matrix product, which loses what is far from the origin."""
    centre = b.mean(0)
    return torch.cdist(a - centre, b - centre)


def _off_diagonal_mean(k: Tensor) -> Tensor:
    n = len(k)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))


def median_bandwidth(y: Tensor) -> Tensor:
    """The median distance between samples of the reference set."""
    d = _distance(y, y)
    return d[~torch.eye(len(y), dtype=torch.bool, device=y.device)].median()


def mmd2(x: Tensor, y: Tensor, bandwidth: Tensor | float) -> Tensor:
    """Unbiased squared maximum mean discrepancy under a Gaussian kernel. Its expectation is 0 for equal laws."""
    def kernel(a, b):
        return torch.exp(-(_distance(a, b) ** 2) / (2 * bandwidth**2))

    return _off_diagonal_mean(kernel(x, x)) + _off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased energy distance 2 E|x-y| - E|x-x'| - E|y-y'|."""
    return 2 * _distance(x, y).mean() - _off_diagonal_mean(_distance(x, x)) - _off_diagonal_mean(_distance(y, y))


class Modes(NamedTuple):
    share: Tensor  # [K]: share of samples nearest to each mode
    spread: Tensor  # within-mode standard deviation per dimension, pooled over the modes that hold samples


def modes(x: Tensor, means: Tensor) -> Modes:
    """Each sample counts for its nearest mode; the spread is taken about the mode's own sample mean."""
    nearest = _distance(x, means).argmin(1)
    counts = torch.bincount(nearest, minlength=len(means))
    centres = torch.zeros_like(means).index_add_(0, nearest, x) / counts.clamp(min=1)[:, None]
    degrees = (counts - 1).clamp(min=0).sum() * x.shape[1]  # a mode of n samples leaves n - 1
    spread = ((x - centres[nearest]).square().sum() / degrees.clamp(min=1)).sqrt()
    return Modes(counts / len(x), spread)


def total_variation(share: Tensor, target: Tensor) -> Tensor:
    """Half the summed absolute difference of two histograms."""
    return (share - target).abs().sum() / 2

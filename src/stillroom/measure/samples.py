"""Distances between two sets of samples, and what became of the modes of a mixture. Points as [N, D]."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.measure.pairs import rows_of_distances
from stillroom.settings import Refusal


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([d for _, d in rows_of_distances(a, b)])


def _mean(a: Tensor, b: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Of f(|a_i - b_j|) over all pairs, in float64; over pairs of different items, where both sets are one."""
    if a is b and len(a) < 2:
        raise Refusal(f"distances within a set need two samples or more: there are {len(a)}")
    total = torch.stack([f(d).sum(dtype=torch.float64) for _, d in rows_of_distances(a, b)]).sum()
    if a is not b:
        return total / (len(a) * len(b))
    return (total - len(a) * f(torch.zeros_like(total))) / (len(a) * (len(a) - 1))


def median_bandwidth(y: Tensor) -> Tensor:
    """The median distance between samples of the reference set; not quite 0 where most of them are equal."""
    d = _distance(y, y)
    off = d[~torch.eye(len(y), dtype=torch.bool, device=y.device)]
    if not len(off):
        raise Refusal(f"distances within a set need two samples or more: there are {len(y)}")
    return off.median().clamp(min=torch.finfo(y.dtype).tiny ** 0.5)


def mmd2(x: Tensor, y: Tensor, bandwidth: Tensor | float) -> Tensor:
    """Unbiased squared maximum mean discrepancy under a Gaussian kernel. Its expectation is 0 for equal laws."""
    def kernel(d):
        return torch.exp(-((d / bandwidth) ** 2) / 2)

    return _mean(x, x, kernel) + _mean(y, y, kernel) - 2 * _mean(x, y, kernel)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased energy distance 2 E|x-y| - E|x-x'| - E|y-y'|."""
    def same(d):
        return d

    return 2 * _mean(x, y, same) - _mean(x, x, same) - _mean(y, y, same)


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


class Held(NamedTuple):
    modes: int      # of those that have samples: at least a tenth of their fair share, all within the radius
    good: float     # share of all samples that lie within the radius of some mode


def held_modes(x: Tensor, means: Tensor, radius: float) -> Held:
    """How many modes of a mixture x keeps, and how much of x is at one. The radius is often three deviations."""
    near, nearest = _distance(x, means).min(1)
    at = near <= radius
    counts = torch.bincount(nearest[at], minlength=len(means))
    return Held(int((counts >= max(1.0, 0.1 * len(x) / len(means))).sum()), float(at.float().mean()))


def total_variation(share: Tensor, target: Tensor) -> Tensor:
    """Half the summed absolute difference of two histograms."""
    return (share - target).abs().sum() / 2

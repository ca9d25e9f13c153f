"""Percentile bootstrap over images: how far a mean, a paired difference or a sweet spot would move with other pictures.

The same seed draws the same pictures again, so that two codecs seen on the same images are resampled together. Of few
pictures such intervals are too narrow: of 8 normal values a 95 % one covers 90 %, of 8 skewed ones less.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.settings import Refusal

BLOCK = 2**22       # draws held at once: 32 MB


class Interval(NamedTuple):
    value: float    # on the images themselves
    low: float
    high: float


class SweetSpot(NamedTuple):
    scale: float
    low: float
    high: float
    shares: Mapping[float, float]   # how often each scale was the best
    at_edge: bool                   # of the sweep: the true optimum may lie beyond it


def resampled_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """[N] or [N, S] -> [R] or [R, S]: means over N images drawn with replacement, R times."""
    n, draws = len(values), torch.Generator().manual_seed(seed)
    rows, means = max(1, BLOCK // n), list[Tensor]()
    for start in range(0, resamples, rows):
        picked = torch.randint(n, (min(rows, resamples - start), n), generator=draws)
        counts = torch.zeros(picked.shape, dtype=torch.float64)
        counts.scatter_add_(1, picked, torch.ones((), dtype=torch.float64).expand(picked.shape))
        means.append(counts @ values / n)       # [r, N] @ [N, S]: no resample of the values themselves is made
    return torch.cat(means)


def mean_interval(values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    values = _values(values, 1)
    return _interval(values.mean(), resampled_means(values, resamples, seed), level)


def difference_interval(
    a: Tensor, b: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Of the mean of a - b, image by image: what the images share cancels."""
    a, b = _values(a, 1), _values(b, 1)
    if len(a) != len(b):
        raise Refusal(f"a paired difference needs the same images on both sides: {len(a)} and {len(b)} values")
    return mean_interval(a - b, level, resamples, seed)


def sweet_spot(
    scales: Sequence[float], values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> SweetSpot:
    """The scale with the highest mean of values [N, S]; give errors with a minus."""
    best, drawn = _best(scales, values, resamples, seed)
    value, low, high = _interval(best, drawn, level, nearest_rank)
    shares = {s: float((drawn == s).double().mean()) for s in scales}
    return SweetSpot(value, low, high, shares, value in (min(scales), max(scales)))


def sweet_spot_gap(
    scales: Sequence[float], a: Tensor, b: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Sweet spot of `a` minus that of `b` on the same images, [N, S] each."""
    if a.shape != b.shape:
        raise Refusal(f"two sweeps to compare need the same images and scales: {list(a.shape)} and {list(b.shape)}")
    best_a, drawn_a = _best(scales, a, resamples, seed)
    best_b, drawn_b = _best(scales, b, resamples, seed)
    return _interval(best_a - best_b, drawn_a - drawn_b, level, nearest_rank)


def _best(scales: Sequence[float], values: Tensor, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The best scale on the images themselves, and in each resample [R]. A draw goes to the smaller scale."""
    values, grid = _values(values, 2), torch.tensor(list(scales), dtype=torch.float64)
    if len(grid) != values.shape[1] or bool((grid.diff() <= 0).any()):
        raise Refusal(f"a sweep has one column per scale, scales rising: {list(scales)}, {values.shape[1]} columns")
    return grid[values.mean(0).argmax()], grid[resampled_means(values, resamples, seed).argmax(1)]


def linear(drawn: Tensor, q: Tensor) -> Tensor:
    return torch.quantile(drawn, q)


def nearest_rank(drawn: Tensor, q: Tensor) -> Tensor:
    """Only values that occurred: between two scales of a sweep there is none."""
    return torch.quantile(drawn, q, interpolation="nearest")


def _interval(value: Tensor, drawn: Tensor, level: float, quantile=linear) -> Interval:
    if not 0 < level < 1:
        raise Refusal(f"the level of an interval lies between 0 and 1, not at {level}")
    tail = (1 - level) / 2
    low, high = quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(value), low, high)


def _values(values: Tensor, ndim: int) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != ndim or 0 in values.shape:
        shape = "[N]" if ndim == 1 else "[N, S]"
        raise Refusal(f"one value per image is needed, {shape}, not {list(values.shape)}")
    if not bool(values.isfinite().all()):
        raise Refusal("values to resample must be finite: leave images out whose PSNR is inf, or take their MSE")
    return values

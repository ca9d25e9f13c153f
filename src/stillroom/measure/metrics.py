"""All distances between two sets of feature vectors at once, under fixed names: what a table of generators shows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stillroom.measure.coverage import overlap
from stillroom.measure.distances import kid, sliced_wasserstein
from stillroom.measure.frechet import Moments, distance_between
from stillroom.measure.samples import energy_distance, median_bandwidth, mmd2
from stillroom.settings import Refusal

NEIGHBOURS = 5
WITH_BALLS, PAIRED, FOR_BANDWIDTH = 10_000, 5000, 2000      # of a side at most: costs grow with the product of both

METRICS: Mapping[str, str] = {
    "frechet": "squared Fréchet distance of Gaussians (FID, where the features are Inception's)",
    "kid": "unbiased polynomial MMD^2",
    "sliced_w2": "sliced 2-Wasserstein distance",
    "energy": "unbiased energy distance",
    "mmd": "unbiased MMD^2, Gaussian kernel as wide as the median distance",
    "precision": "share of samples among real ones",
    "recall": "share of real ones among samples",
    "density": "how densely real ones lie about samples; 1 for equal laws",
    "coverage": f"share of real ones with a sample among their {NEIGHBOURS} neighbours",
}
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage")


def panel(x: Tensor, real: Tensor, seed: int = 0) -> dict[str, float]:
    """{metric: value} and `kid_std`, of samples [n, D] against real ones [N, D], in whatever order they come.

    Overlap is of equally many on both sides, because the size of a ball depends on how many points there are.
    """
    check(x, real)
    x, real = shuffled(x, seed), shuffled(real, seed)
    n = min(len(x), len(real), WITH_BALLS)
    shared = overlap(real[:n], x[:n], NEIGHBOURS)
    few, few_real = x[:PAIRED], real[:PAIRED]
    by_kernel = kid(x, real, seed=seed)
    return {
        "frechet": frechet(x, real),
        "kid": by_kernel.mean,
        "kid_std": by_kernel.std,
        "sliced_w2": sliced_wasserstein(x, real, seed=seed),
        "energy": float(energy_distance(few, few_real)),
        "mmd": float(mmd2(few, few_real, median_bandwidth(few_real[:FOR_BANDWIDTH]))),
        **shared._asdict(),
    }


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    """Files are often sorted by class: their first so many would be of a few classes only."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)]


def frechet(x: Tensor, real: Tensor) -> float:
    return distance_between(Moments(x.shape[1]).add(x), Moments(real.shape[1]).add(real))


def check(x: Tensor, real: Tensor) -> None:
    least = 2 * NEIGHBOURS
    for name, part in (("samples", x), ("real ones", real)):
        if part.ndim != 2 or len(part) < least:
            raise Refusal(f"{name}: features of shape {list(part.shape)}; distances need vectors of {least} or more")
        if not bool(part.isfinite().all()):
            raise Refusal(f"{name}: features hold NaN or infinity")
    if x.shape[1] != real.shape[1]:
        raise Refusal(f"samples have {x.shape[1]} features and real ones {real.shape[1]}: another feature space")


def is_few(n: int, dim: int) -> bool:
    """For a Fréchet distance: below this its bias, which grows as D / n, is no small part of it."""
    return n < 2 * dim


def halves(count: int, want: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers of two disjoint parts of a set: the one to compare with, and at most `want`, at most half, set aside as
    fresh real ones. Both shuffled."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    aside = min(want, count // 2)
    return order[aside:], order[:aside]

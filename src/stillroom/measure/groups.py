"""Groups in a cloud, found by k-means where nobody named them, and the index that says whether a drift would see them.

kappa = eta / (2 R), eta = tr(S_b) / tr(S), is OURS: Delta^2 / (2 R d^2), the gap between two groups' log weights under
a Laplace kernel at R times the mean distance d. In a pilot of eight settings (a ring of eight modes among nuisance
dimensions) a drift at kappa of about 3 and above found the modes, below 2 it did not. That is a reading, no law.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from stillroom.measure.geometry import (
    Cloud,
    Scope,
    Taken,
    centred,
    classes,
    members,
    residual,
    split,
)
from stillroom.settings import Refusal

WORKS, FAILS = 3.0, 2.0
LEADING = 32            # principal directions in which clusters are looked for
COUNTS = (2, 3, 4, 6, 8, 12, 16)
INNER = (2, 3, 4, 6)    # within a class
NULLS = 5
LEFT, MORE = 0.9, 1.1   # clusters are real that leave less than this of what the null leaves, or explain this much more
LEAST = 24              # samples of a class in which clusters are looked for

Reading = Literal["works", "between", "fails", "abstains"]


class Grouping(NamedTuple):
    taken: Taken
    name: str
    count: tuple[int, int]  # groups: fewest and most, where each class has its own
    eta: float              # tr(S_b) / tr(S)
    null: float | None      # the same of clusters in draws without any, of the same spectrum; None for labels
    null_std: float | None

    @property
    def real(self) -> bool:
        """Labels are. Clusters are where they explain clearly more than k-means finds where there are none."""
        if self.null is None or self.null_std is None:
            return True
        certain = self.eta > self.null + 3 * self.null_std
        return certain and (1 - self.eta < LEFT * (1 - self.null) or self.eta > MORE * self.null)


def kappa(eta: float, temperature: float) -> float:
    return eta / (2 * temperature)


def reading(grouping: Grouping, temperature: float) -> Reading:
    if not grouping.real:
        return "abstains"
    index = kappa(grouping.eta, temperature)
    return "works" if index >= WORKS else "fails" if index < FAILS else "between"


def by_labels(cloud: Cloud) -> Grouping:
    found = classes(cloud)
    return Grouping(found.taken, "labels", (found.count, found.count), found.eta, None, None)


def by_clusters(cloud: Cloud, scope: Scope = "global", seed: int = 0) -> Grouping:
    """k-means on the leading principal directions, over all samples or in each class by itself; k is the one that
    leaves least in comparison with draws of the same spectrum that have none (the gap statistic, Tibshirani et al.
    2001), Gaussian or uniform in a box, whichever k-means explains more of: it halves a box better than a Gaussian."""
    rows, group = members(cloud, scope)
    gram = centred(cloud.gram[rows][:, rows], group)
    cloud.require_spread(float(gram.trace()) / len(rows), scope)
    parts = [p for p in split(torch.arange(len(rows), device=gram.device), group) if len(p) >= LEAST]
    looked = sum(map(len, parts))
    if looked < len(rows) / 2 or not parts:
        what = f"{len(rows)} samples are" if scope == "global" else f"most classes have fewer than {LEAST} samples:"
        raise Refusal(f"{what} too few to look for clusters in")
    draws = torch.Generator().manual_seed(seed)
    tried = COUNTS if scope == "global" else INNER
    found = [clusters(leading(gram[part][:, part]), tried, draws) for part in parts]
    kept = float(sum(gram[part, part].sum() for part in parts))
    families = torch.stack([f.nulls for f in found]).sum(0) / kept
    nulls = families[families.mean(1).argmax()]
    name = "clusters of all samples" if scope == "global" else "clusters within each class"
    count = min(f.k for f in found), max(f.k for f in found)
    return Grouping(cloud.taken(scope, looked), name, count, sum(f.between for f in found) / kept,
                    float(nulls.mean()), float(nulls.std()))


def leading(gram: Tensor) -> Tensor:
    """[n, r]: coordinates in the directions of most variance, from inner products about the mean."""
    n = len(gram)
    first = max(0, n - LEADING)
    values, basis = scipy.linalg.eigh(gram.cpu().numpy(), subset_by_index=[first, n - 1])
    return torch.from_numpy(basis * values.clip(min=0) ** 0.5).flip(1)


class Clusters(NamedTuple):
    k: int
    between: float          # sum of squares between the clusters
    nulls: Tensor           # [2, NULLS] the same of Gaussian and of uniform draws


def clusters(x: Tensor, counts: Sequence[int], draws: torch.Generator) -> Clusters:
    """Of centred x [n, r]; of as many clusters as makes the gap widest."""
    n, total = len(x), x.square().sum()
    deviation, whole = (x.square().sum(0) / (n - 1)).sqrt(), torch.zeros(n, dtype=torch.int64)
    families = [[residual(law(x.shape, generator=draws, dtype=x.dtype) * side * deviation, whole)
                 for _ in range(NULLS)] for law, side in ((torch.randn, 1.0), (torch.rand, 12**0.5))]
    best, widest = None, -float("inf")
    for k in counts:
        if k > n // 8 and k > counts[0]:
            break
        between = between_of(x, kmeans(x, k, draws))
        of_null = torch.stack([torch.stack([between_of(g, kmeans(g, k, draws)) / g.square().sum() for g in family])
                               for family in families])
        left = (1 - of_null).clamp(min=1e-12).log().mean(1).amin()
        gap = float(left - (1 - between / total).clamp(min=1e-12).log())
        if gap > widest:
            best, widest = Clusters(k, float(between), of_null * total), gap
    assert best is not None
    return best


def between_of(x: Tensor, group: Tensor) -> Tensor:
    return x.square().sum() - residual(x, group).square().sum()


def kmeans(x: Tensor, k: int, draws: torch.Generator, starts: int = 2, rounds: int = 40) -> Tensor:
    """Lloyd's rounds from k-means++ starts (Arthur & Vassilvitskii 2007): the best of them, as groups that all have
    members, numbered from 0."""
    best, least = None, float("inf")
    for _ in range(starts):
        centres = spread_out(x, k, draws)
        group = torch.full((len(x),), -1)
        for _ in range(rounds):
            nearest = torch.cdist(x, centres).argmin(1)
            if torch.equal(nearest, group):
                break
            group = nearest
            count = torch.bincount(group, minlength=k)
            sums = torch.zeros_like(centres).index_add_(0, group, x)
            centres = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], centres)
        error = float((x - centres[group]).square().sum())
        if error < least:
            best, least = group.unique(return_inverse=True)[1], error
    assert best is not None
    return best


def spread_out(x: Tensor, k: int, draws: torch.Generator) -> Tensor:
    """[k, r]: each start is drawn by its squared distance from those before it."""
    chosen = [int(torch.randint(len(x), (), generator=draws))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        weights = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=draws)))
        nearest = nearest.minimum((x - x[chosen[-1]]).square().sum(1))
    return x[chosen]

"""The shape of a cloud of vectors: spectra, intrinsic dimension, classes, distances, and what a kernel makes of them.

Signs flip between tokens and whole latents, within a class and over all, before and after normalisation. So no number
stands alone: every record carries `taken`, which says over which vectors it was taken, about which centre, and on which
side of the normaliser.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stillroom.settings import Refusal

Over = Literal["token", "pooled", "element"]
Scope = Literal["global", "within class"]
Stage = Literal["before", "after"]

FLOOR = 1e-6        # of the largest eigenvalue: smaller ones count as this much, so that a condition number is finite
SAME = 1e-6         # of the mean distance: nearer points are one point
COLUMNS = 2**14     # of a wide cloud taken to float64 at a time
FEWEST = 4          # samples of a class, for unbiased squares of its covariance
SHARED = 1.15       # of TwoNN's standard error: neighbours share distances, which independent ratios would not


class Taken(NamedTuple):
    over: Over
    scope: Scope
    stage: Stage
    n: int
    d: int


@dataclass(frozen=True, eq=False)
class Cloud:
    """Vectors x [n, d] and perhaps their labels [n]. Its inner products and distances are kept once they are asked."""

    x: Tensor
    labels: Tensor | None = None
    over: Over = "element"
    stage: Stage = "after"

    def __post_init__(self):
        if self.x.ndim != 2 or len(self.x) < 2 or not self.x.shape[1]:
            raise Refusal(f"a cloud needs two vectors or more, [n, d], not {list(self.x.shape)}")
        if not bool(self.x.isfinite().all()):
            raise Refusal("the samples hold NaN or infinity")
        if self.labels is not None and self.labels.shape != (len(self.x),):
            raise Refusal(f"{len(self.x)} vectors need as many labels, not {list(self.labels.shape)}")

    def taken(self, scope: Scope, n: int | None = None) -> Taken:
        return Taken(self.over, scope, self.stage, len(self.x) if n is None else n, self.x.shape[1])

    @cached_property
    def gram(self) -> Tensor:
        """[n, n] in float64: inner products about the mean. For d > n all else follows from it."""
        n, d = self.x.shape
        gram = self.x.new_zeros(n, n, dtype=torch.float64)
        for first in range(0, d, COLUMNS):
            part = self.x[:, first : first + COLUMNS].double()
            part = part - part.mean(0)
            gram.addmm_(part, part.T)
        return gram

    @cached_property
    def distances(self) -> Tensor:
        """[n, n] in float64, about the mean, where inner products lose little."""
        square = self.gram.diagonal()
        return (square[:, None] + square - 2 * self.gram).clamp(min=0).fill_diagonal_(0).sqrt()

    def require_spread(self, variance: float | None = None, scope: Scope = "global") -> None:
        """Rounding is not variance."""
        variance = float(self.gram.diagonal().mean()) if variance is None else variance
        if not variance > 1e-12 * float(self.x.square().sum(1).double().mean()):
            raise Refusal("all samples are equal" if scope == "global" else "all samples of a class are equal")

    @property
    def named(self) -> Tensor:
        """The labels, where they tell anything apart."""
        if self.labels is None:
            raise Refusal("there are no labels")
        if bool((self.labels == self.labels[0]).all()):
            raise Refusal("all samples are of one class")
        return self.labels


def vectors(x: Tensor, over: Over) -> Tensor:
    """Samples [n, d], tokens [n, N, C] or maps [n, C, h, w] as vectors; "token" puts those of all samples together, one
    sample's in a row."""
    if over == "element" or x.ndim == 2:
        return x.flatten(1)
    return tokens(x).flatten(0, 1) if over == "token" else tokens(x).mean(1)


def tokens(x: Tensor) -> Tensor:
    """[n, N, C], not copied."""
    return x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


def cloud_of(x: Tensor, labels: Tensor | None, over: Over, stage: Stage, limit: int, seed: int = 0) -> Cloud:
    """At most `limit` vectors, drawn without replacement; a token has its sample's label."""
    each = tokens(x).shape[1] if over == "token" and x.ndim > 2 else 1
    chosen = torch.arange(len(x) * each)
    if len(chosen) > limit:
        chosen = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:limit]
    of = (chosen // each).to(x.device)
    v = vectors(x, over)[of] if each == 1 else tokens(x)[of, (chosen % each).to(x.device)]
    return Cloud(v, None if labels is None else labels[of.to(labels.device)], over, stage)


# ---- spectra ----

class Spectrum(NamedTuple):
    taken: Taken
    values: Tensor                  # [min(n, d)] eigenvalues of the covariance, falling; the other d - n are 0
    participation: float            # tr(S)^2 / tr(S^2), bias removed
    plain: float                    # the same from the sample's own eigenvalues: at most n - 1, and too small
    effective_rank: float           # exp of the entropy of the eigenvalues' shares; plain
    condition: float                # largest over least eigenvalue, the least no lower than FLOOR times the largest
    floored: int                    # how many of the d lie at or below that floor
    top: Mapping[int, float]        # share of the variance in the k largest


def spectrum(cloud: Cloud, scope: Scope = "global", top: Sequence[int] = (1, 8, 64)) -> Spectrum:
    """Of the covariance about the mean, or of sum_c pi_c S_c, the mean covariance of the classes.

    The participation ratio of a sample is biased towards n. Both its traces have unbiased estimates without any
    assumption on the law (Himeno & Yamada 2014); their ratio is kept between 1 and d, where it must lie.
    """
    rows, group = members(cloud, scope)
    n, d = len(rows), cloud.x.shape[1]
    count = torch.bincount(group).double()
    weight = (count / n / (count - 1)).sqrt()[group]                    # [n]: S = W^T W with W = weight * residual
    if d <= n:
        w = weight[:, None] * residual(cloud.x[rows].double(), group)   # [n, d]
        values = torch.linalg.eigvalsh(w.T @ w)
        squares = torch.stack([(part.T @ part).square().sum() for part in split(w, group)])
        lengths = w.square().sum(1)
    else:
        gram = weight[:, None] * centred(cloud.gram[rows][:, rows], group) * weight
        values, lengths = torch.linalg.eigvalsh(gram), gram.diagonal()
        squares = torch.stack([part.square().sum() for part in blocks(gram, group)])    # tr (pi_c S_c)^2
    values = values.clamp(min=0).flip(0)
    total, square = values.sum(), values.square().sum()
    cloud.require_spread(float(total), scope)
    traces = torch.zeros_like(count).index_add_(0, group, lengths)                      # pi_c tr S_c
    fourth = torch.zeros_like(count).index_add_(0, group, lengths.square()) * (count - 1)   # pi_c^2 Q_c
    first, second = unbiased(count, traces, squares, fourth)
    corrected = (total**2 + (first - traces**2).sum()) / (square + (second - squares).sum()).clamp(min=1e-300)
    share = values / total
    effective = (-torch.special.xlogy(share, share).sum()).exp()
    least = float(values[-1]) if d <= n else 0.0
    return Spectrum(
        cloud.taken(scope, n), values, float(corrected.clamp(1, d)), float(total**2 / square), float(effective),
        float(values[0]) / max(least, FLOOR * float(values[0])),
        int((values <= FLOOR * values[0]).sum()) + d - len(values),
        {k: float(share[:k].sum()) for k in top if k <= d},
    )


def unbiased(n: Tensor, trace: Tensor, square: Tensor, fourth: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of (tr Sigma)^2 and tr(Sigma^2) without bias for any law with four moments, from n samples' tr S,
    tr(S^2) and Q = sum |x - mean|^4 / (n - 1) (Himeno & Yamada 2014)."""
    common = (n - 1) / (n * (n - 2) * (n - 3))
    return (common * (2 * square + (n * n - 3 * n + 1) * trace**2 - n * fourth),
            common * ((n - 1) * (n - 2) * square + trace**2 - n * fourth))


def participation_ratio(x: Tensor) -> float:
    """tr(S)^2 / tr(S^2) of [n, d], bias removed; of fewer than four samples the plain one."""
    if len(x) >= FEWEST:
        return spectrum(Cloud(x.detach())).participation
    cloud = Cloud(x.detach())
    cloud.require_spread()
    return float(cloud.gram.trace() ** 2 / cloud.gram.square().sum())


def members(cloud: Cloud, scope: Scope) -> tuple[Tensor, Tensor]:
    """Which rows count, and in which group each is: one group in all, or the classes that are large enough."""
    n = len(cloud.x)
    if scope == "global":
        if n < FEWEST:
            raise Refusal(f"{n} samples: a spectrum needs {FEWEST} or more")
        return torch.arange(n, device=cloud.x.device), torch.zeros(n, dtype=torch.int64, device=cloud.x.device)
    _, group, count = cloud.named.to(cloud.x.device).unique(return_inverse=True, return_counts=True)
    rows = (count[group] >= FEWEST).nonzero().flatten()
    if not len(rows):
        raise Refusal(f"no class has {FEWEST} samples or more")
    return rows, group[rows].unique(return_inverse=True)[1]


def residual(x: Tensor, group: Tensor) -> Tensor:
    """x less its group's mean."""
    return x - means(x, group)[group]


def means(x: Tensor, group: Tensor) -> Tensor:
    """[n, d] -> [K, d]."""
    count = torch.bincount(group).to(x)
    return x.new_zeros(len(count), x.shape[1]).index_add_(0, group, x) / count[:, None]


def centred(gram: Tensor, group: Tensor) -> Tensor:
    """Inner products about the mean of each one's group: residual of the rows, then of the columns."""
    return residual(residual(gram, group).T, group)


def split(x: Tensor, group: Tensor) -> list[Tensor]:
    order = group.argsort(stable=True)
    return list(x[order].split(torch.bincount(group).tolist()))


def blocks(gram: Tensor, group: Tensor) -> list[Tensor]:
    """The square of each group's own inner products."""
    places = split(torch.arange(len(group), device=group.device), group)
    return [gram[rows][:, rows] for rows in places]


# ---- classes ----

class Classes(NamedTuple):
    taken: Taken
    count: int
    fisher: float           # tr(S_b) / tr(S_w), bias removed
    eta: float              # tr(S_b) / (tr(S_b) + tr(S_w))
    purity: float           # share of the k nearest neighbours that are of the same class
    chance: float           # the same of neighbours drawn at random
    neighbours: int


def classes(cloud: Cloud, k: int = 5) -> Classes:
    labels = cloud.named.to(cloud.x.device)
    between, within = scatter(cloud, labels)
    count = labels.unique(return_counts=True)[1].double()
    n, k = len(labels), min(k, len(labels) - 1)
    near = apart(cloud.distances).topk(k, largest=False).indices        # [n, k]
    purity = (labels[near] == labels[:, None]).double().mean()
    chance = (count * (count - 1)).sum() / (n * (n - 1))
    if within <= 0:
        raise Refusal("all samples of a class are equal: there is no spread to compare the classes' distance with")
    return Classes(cloud.taken("global"), len(count), between / within, between / (between + within), float(purity),
                   float(chance), k)


def scatter(cloud: Cloud, labels: Tensor) -> tuple[float, float]:
    """tr(S_b) and tr(S_w), both without bias: the means of n_c samples are apart by tr(S_c) / n_c even where the
    classes are one. Not below 0. Right for labels that do not come from x; those of k-means are fitted to it."""
    _, group, count = labels.unique(return_inverse=True, return_counts=True)
    count = count.double()
    if int(count.max()) < 2:
        raise Refusal("every class has one sample: nothing can be said of its spread")
    share, lengths = count / len(labels), cloud.gram.diagonal()
    sums = torch.zeros_like(count).index_add_(0, group, lengths)
    inner = torch.stack([part.sum() for part in blocks(cloud.gram, group)]) / count     # n_c |m_c|^2
    plain = inner.sum() / len(labels)                                                   # the mean of all is 0
    spread = (sums - inner) / (count - 1).clamp(min=1)                                  # tr S_c
    single = count < 2                                                                  # they have the others' spread
    spread[single] = (spread * share)[~single].sum() / share[~single].sum()
    between = plain - ((1 - share) * spread).sum() / len(labels)
    cloud.require_spread(float(lengths.mean()))
    return float(between.clamp(min=0)), float((share * spread).sum())


def apart(distances: Tensor) -> Tensor:
    """No point is its own neighbour."""
    return distances.clone().fill_diagonal_(math.inf)


# ---- distances ----

class Intrinsic(NamedTuple):
    taken: Taken
    dimension: float
    error: float            # standard error
    duplicates: int         # points left out because another one is the same


def two_nn(cloud: Cloud, kept: float = 0.9) -> Intrinsic:
    """Dimension of what the cloud lies on, from mu = r2 / r1, the two nearest neighbours' distances (TwoNN, Facco et
    al. 2017): mu is Pareto of exponent d. They fit a line and leave the largest tenth out; this is the unbiased
    maximum-likelihood estimate censored at the same place. Above ten dimensions or so a few thousand points say less
    than the truth. Clouds of 100 to 600 points in 2 to 10 dimensions deviate by 1.07 to 1.24 times what independent
    ratios would."""
    d = cloud.distances
    mean = d.sum() / (len(d) * (len(d) - 1))
    cloud.require_spread()
    double = (d <= SAME * mean).triu(1).any(0)
    d = apart(d[~double][:, ~double])
    n = len(d)
    m = int(kept * n)
    if m < 3:
        raise Refusal(f"{n} different samples: too few for a dimension")
    near = d.topk(2, largest=False).values
    log = (near[:, 1] / near[:, 0]).log().sort().values
    dimension = (m - 1) / max(float(log[:m].sum() + (n - m) * log[m - 1]), 1e-300)
    error = SHARED * dimension / math.sqrt(max(m - 2, 1))
    if dimension - 3 * error > cloud.x.shape[1]:        # neighbours at equal distances
        raise Refusal("samples lie as on a lattice, as rounded numbers do: neighbours' distances give no dimension")
    return Intrinsic(cloud.taken("global", n), dimension, error, int(double.sum()))


class Distances(NamedTuple):
    taken: Taken
    mean: float
    variation: float        # std / mean of pairwise distances; 1 / sqrt(2 PR) for a Gaussian
    quantiles: Tensor       # [101] of the distances over their mean


def concentration(cloud: Cloud, scope: Scope = "global") -> Distances:
    pairs = cloud.distances[paired(cloud, scope).triu(1)]
    mean = pairs.mean()
    if not float(mean) > 0:
        raise Refusal("all samples are equal" if scope == "global" else "all samples of a class are equal")
    ranks = (torch.linspace(0, 1, 101, dtype=torch.float64) * (len(pairs) - 1)).round().long().to(pairs.device)
    return Distances(cloud.taken(scope), float(mean), float(pairs.std(correction=0) / mean),
                     pairs.sort().values[ranks] / mean)


def paired(cloud: Cloud, scope: Scope) -> Tensor:
    """[n, n]: which pairs are compared."""
    n = len(cloud.x)
    other = ~torch.eye(n, dtype=torch.bool, device=cloud.x.device)
    if scope == "global":
        return other
    labels = cloud.named.to(cloud.x.device)
    other &= labels[:, None] == labels
    if not bool(other.any()):
        raise Refusal("every class has one sample: there are no pairs within a class")
    return other


# ---- what a kernel exp(-distance / (R mean distance)) sees ----

class Seen(NamedTuple):
    taken: Taken
    particles: int          # N: samples that the kernel weighs
    temperatures: tuple[float, ...]
    measured: tuple[float, ...]         # mean of 1 / (N sum of squared weights): the share of the N that counts
    predicted: tuple[float, ...]        # exp(-1 / (2 PR R^2)), or 1 / N where it is less


def seen(cloud: Cloud, scope: Scope, participation: float, particles: int, temperatures: Sequence[float],
         queries: int = 256, seed: int = 0) -> Seen:
    """Each query weighs N others, of its class or of all, by a softmax of -distance / R, distances in units of their
    mean. N is less where classes are small: as many as half of the samples have, or more, so that it is no matter of
    the largest class alone."""
    allowed = paired(cloud, scope)
    n = min(particles, int(allowed.sum(1).median()))
    if n < 2:
        raise Refusal("too few samples for a kernel to weigh")
    mean = cloud.distances[allowed].mean()
    if not float(mean) > 0:
        raise Refusal("all samples are equal" if scope == "global" else "all samples of a class are equal")
    draws = torch.Generator().manual_seed(seed)
    able = (allowed.sum(1) >= n).nonzero().flatten()
    rows = able[torch.randperm(len(able), generator=draws)[:queries].to(able.device)]
    order = torch.rand(len(rows), len(cloud.x), generator=draws).to(cloud.x.device)
    drawn = order.masked_fill(~allowed[rows], 2).topk(n, largest=False).indices     # [q, N], without replacement
    distance = cloud.distances[rows].gather(1, drawn) / mean
    shares = []
    for temperature in temperatures:
        log = -distance / temperature
        shares.append(float((2 * log.logsumexp(1) - (2 * log).logsumexp(1)).exp().mean() / n))
    return Seen(cloud.taken(scope), n, tuple(temperatures), tuple(shares),
                tuple(max(1 / n, predicted_share(participation, r)) for r in temperatures))


def predicted_share(participation: float, temperature: float) -> float:
    """Log weights are about Gaussian with deviation CV / R = 1 / (R sqrt(2 PR)). Ours."""
    return math.exp(-1 / (2 * participation * temperature**2))


def temperature_at(found: Seen, share: float) -> float | None:
    """The temperature at which the measured share is this one, between those that were measured; else none."""
    for (r, low), (s, high) in pairwise(zip(found.temperatures, found.measured, strict=True)):
        if low <= share < high:
            return r * (s / r) ** ((share - low) / (high - low))
    return None


class NoiseTime(NamedTuple):
    ratio: float            # s: noise over signal
    time: float             # on the linear path


def equivalent_time(participation: float, temperature: float) -> NoiseTime:
    """A Laplace drift at R supervises as DMD does at noise ratio s = sqrt(2 PR R (1 + R)), t = s / (1 + s). Ours."""
    s = math.sqrt(2 * participation * temperature * (1 + temperature))
    return NoiseTime(s, s / (1 + s))

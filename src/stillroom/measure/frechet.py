"""The Fréchet distance between Gaussians, and between two sets of pictures through their features' moments.

With `FidInception` as the features it is FID; with any other it has another name (`rf_fid` in random features).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from stillroom.measure.images import as_8bit
from stillroom.settings import Refusal


class Moments:
    """Count, mean and covariance of vectors seen batch by batch, in float64."""

    def __init__(self, dim: int):
        self.count, self.mean = 0, torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)       # sum of (x - mean)(x - mean)^T

    def add(self, x: Tensor) -> "Moments":
        """[N, D]."""
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise Refusal(f"features must be vectors [N, {len(self.mean)}], not {list(x.shape)}")
        if not bool(x.isfinite().all()):
            raise Refusal("features are not finite: look at the pictures and the weights that they come from")
        x = x.detach().to("cpu", torch.float64)
        mean = x.mean(0) if len(x) else self.mean
        return self._join(len(x), mean, (x - mean).T @ (x - mean))

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> "Moments":
        """Chan et al. 1979: nothing is subtracted from a large sum."""
        total, gap = self.count + count, mean - self.mean
        if count:
            self.scatter = self.scatter + scatter + torch.outer(gap, gap) * (self.count * count / total)
            self.mean = self.mean + gap * (count / total)
            self.count = total
        return self

    @property
    def cov(self) -> Tensor:
        if self.count < 2:
            raise Refusal(f"a covariance needs two pictures or more: there are {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), in float64.

    The last trace is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2). With S = A A^T from eigh those
    roots are the singular values of A1^T A2, which are exact to rounding where a root of a rounded zero eigenvalue is
    not (1e-8 each). There are only as many as the smaller rank: fewer pictures than features cost less.
    """
    mu1, cov1, mu2, cov2 = (x.detach().to("cpu", torch.float64) for x in (mu1, cov1, mu2, cov2))
    common = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    return float(((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * common).clamp(min=0))


def _factor(cov: Tensor) -> Tensor:
    """A [D, rank] with A A^T = cov."""
    values, vectors = torch.linalg.eigh(cov)
    real = values > values[-1] * len(cov) * torch.finfo(cov.dtype).eps      # the rest is rounding
    return vectors[:, real] * values[real].sqrt()


def distance_between(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


@torch.no_grad()
def moments_of(features: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Moments:
    """Of pictures as files would hold them (Parmar et al. 2022: a score of unrounded pictures is another score)."""
    moments = None
    for batch in batches:
        vectors = features(as_8bit(batch))
        moments = (moments or Moments(vectors.shape[1])).add(vectors)
    if moments is None:
        raise Refusal("there are no pictures to take features of")
    return moments

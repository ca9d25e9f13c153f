"""Distances between two sets of feature vectors [n, D] that need no density: KID, sliced Wasserstein; and between pairs
that began at the same noise."""

from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.settings import Refusal

SUBSET, DIRECTIONS, AT_ONCE = 1000, 256, 64
WIDE = 1e5      # of a feature, beyond which the cube of an inner product may not fit single precision


class Kid(NamedTuple):
    mean: float
    std: float      # of one subset's estimate, over subsets


def kid(x: Tensor, y: Tensor, subsets: int = 100, size: int = SUBSET, seed: int = 0) -> Kid:
    """Kernel Inception Distance (Binkowski et al. 2018), in whatever features: unbiased MMD^2 under (a.b / D + 1)^3,
    over random subsets. A subset is half of the smaller set at most, so that its spread tells something."""
    size = min(size, min(len(x), len(y)) // 2)
    if size < 2:
        raise Refusal(f"KID needs four samples of each side or more: there are {len(x)} and {len(y)}")
    if max(float(x.abs().max()), float(y.abs().max())) > WIDE:
        x, y = x.double(), y.double()
    draws = torch.Generator().manual_seed(seed)
    found = torch.stack([_polynomial_mmd2(_some(x, size, draws), _some(y, size, draws)) for _ in range(subsets)])
    return Kid(float(found.mean()), float(found.std()) if subsets > 1 else 0.0)


def _some(x: Tensor, size: int, draws: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=draws)[:size].to(x.device)]


def _polynomial_mmd2(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        k = (a @ b.T).div_(a.shape[1]).add_(1)
        return k.square().mul_(k)

    # Rounding in single precision is different in every entry and goes out in the mean; summing them so would not.
    n, f64 = len(x), torch.float64
    xx, yy = (k.sum(dtype=f64) - k.diagonal().sum(dtype=f64) for k in (kernel(x, x), kernel(y, y)))
    return (xx + yy) / (n * (n - 1)) - 2 * kernel(x, y).mean(dtype=f64)


def directions(dim: int, count: int, seed: int = 0) -> Tensor:
    """[dim, count] unit vectors, uniform on the sphere, the same for the same seed."""
    drawn = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))
    return drawn.div_(torch.linalg.vector_norm(drawn, dim=0).clamp(min=torch.finfo(drawn.dtype).tiny))


def sliced_wasserstein(x: Tensor, y: Tensor, count: int = DIRECTIONS, seed: int = 0) -> float:
    """(mean over directions of W2^2 of the projections)^(1/2). On a line W2^2 is the integral of the squared difference
    of quantile functions, exact for sets of any two sizes."""
    unit = directions(x.shape[1], count, seed).to(x)
    total = torch.stack([w2_squared(x @ u, y @ u).sum() for u in unit.split(AT_ONCE, 1)]).sum()
    return float((total / count).sqrt())


def w2_squared(a: Tensor, b: Tensor) -> Tensor:
    """[n, K], [m, K] numbers -> [K]."""
    a, b = a.sort(0).values.double(), b.sort(0).values.double()
    if len(a) == len(b):
        return (a - b).square().mean(0)
    n, m = len(a), len(b)
    # Both quantile functions are constant between neighbouring multiples of 1/n and 1/m. In units of 1/(n m), so that
    # those which coincide do so exactly.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique().to(a.device)
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    return ((a[(ends - 1) // m] - b[(ends - 1) // n]).square() * widths[:, None]).sum(0)


def has_pairs(y: Tensor | None) -> bool:
    """Whether a class has two items; without labels all items are of one."""
    return y is None or len(y.unique()) < len(y)


class Paired(NamedTuple):
    rms: float          # of x - y, per element
    relative: float     # mean square over that of x with another item's y: 0 where equal, 1 where unrelated


def paired_error(x: Tensor, teacher: Tensor, y: Tensor | None = None) -> Paired:
    """How far a student's samples [n, ...] lie from where the teacher's trajectory leads from the same noise. With
    labels y [n], "another item" is one of the same class: else a shared class would look like a shared trajectory.
    Items alone in their class are left out of `relative`; where all are, it is taken as without labels."""
    if x.shape != teacher.shape or len(x) < 2:
        raise Refusal(f"pairs are {list(x.shape)} and {list(teacher.shape)}: give two samples or more of one shape")
    x, teacher = x.flatten(1).double(), teacher.flatten(1).double()
    if not bool(x.isfinite().all() and teacher.isfinite().all()):
        raise Refusal("pairs hold NaN or infinity: nothing can be said of how far they are apart")
    labels = torch.zeros(len(x), dtype=torch.long) if y is None or not has_pairs(y) else y.cpu()
    other = torch.arange(len(x))
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        other[mine] = mine.roll(1)
    paired = (other != torch.arange(len(x))).to(x.device)
    own, foreign = ((x - ends).square().mean(1) for ends in (teacher, teacher[other.to(x.device)]))
    unrelated = float(foreign[paired].mean())
    return Paired(float(own.mean().sqrt()), float(own[paired].mean()) / unrelated if unrelated > 0 else 0.0)

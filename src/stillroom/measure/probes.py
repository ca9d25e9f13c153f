"""How much of the labels a space holds, by the two simplest readers: a linear map and a vote of neighbours. Both are
deterministic, and judged on vectors that they have not seen."""

from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.measure.pairs import rows_of_distances
from stillroom.settings import Refusal

RIDGES = tuple(10.0**k for k in range(-6, 4))       # of the largest eigenvalue of the vectors' inner products
NEIGHBOURS = 10
CONSTANT = 1e-6     # deviations below this share of a number's own size are rounding, and are not blown up


class Linear(NamedTuple):
    accuracy: float
    chance: float           # of always naming the commonest class
    ridge: float            # the one that was chosen, among RIDGES


class Votes(NamedTuple):
    accuracy: float
    neighbours: int


def linear_probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> Linear:
    """Ridge regression of one-hot labels on standardised vectors [n, D], in closed form; the largest answer is the
    class. The ridge has the least error of leave-one-out, which is r_i / (1 - h_i) with h the diagonal of the hat."""
    x, test_x = standardised(x, test_x)
    target = one_hot(x, y, test_x, test_y)                          # [n, K], sums to 1
    mean = target.mean(0)
    values, u = factored(x)                                         # X X^T = U diag(values) U^T
    inner = u.T @ (target - mean)                                   # [r, K]
    best, ridge, gain = float("inf"), RIDGES[0], values
    for share in RIDGES:
        kept = values / (values + share * values.max())
        left = (target - mean) - u @ (kept[:, None] * inner)
        hat = u.square() @ kept + 1 / len(x)                        # the mean that was taken off is fitted too
        error = float((left / (1 - hat).clamp(min=1e-9)[:, None]).square().mean())
        if error < best:
            best, ridge, gain = error, share, kept
    dual = u @ ((gain / values)[:, None] * inner)                   # (X X^T + ridge)^-1 (target - mean), [n, K]
    said = (test_x @ (x.T @ dual) + mean).argmax(1)
    chance = int(torch.bincount(test_y).max()) / len(test_y)
    return Linear(float((said == test_y.to(said.device)).double().mean()), chance, ridge)


def knn_probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, k: int = NEIGHBOURS) -> Votes:
    """The commonest class among the k nearest; of classes with as many votes, the one whose voter is nearest."""
    x, test_x = x.float(), test_x.float()
    target = one_hot(x, y, test_x, test_y)
    k = min(k, len(x))
    right = 0
    for rows, d in rows_of_distances(test_x, x):
        near = target[d.topk(k, largest=False).indices]             # [rows, k, K], nearest first
        nearest = k - near.argmax(1)                                # [rows, K]: the higher, the nearer the first voter
        votes = near.sum(1) + nearest / (k + 1)                     # the second part is less than one vote
        right += int((votes.argmax(1) == test_y[rows].to(x.device)).sum())
    return Votes(right / len(test_x), k)


def one_hot(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> Tensor:
    """[n, K], of checked labels."""
    if len(x) != len(y) or len(test_x) != len(test_y) or not len(test_x):
        raise Refusal(f"a probe needs a label for each vector: {len(x)} and {len(y)}, {len(test_x)} and {len(test_y)}")
    if len(y.unique()) < 2:
        raise Refusal("a probe needs vectors of two classes or more")
    target = torch.zeros(len(y), 1 + int(max(y.max(), test_y.max())), dtype=torch.float64, device=x.device)
    return target.scatter_(1, y.to(x.device)[:, None], 1.0)


def standardised(x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """By the mean and deviation of what is learned from, in float64."""
    x, test_x = x.double(), test_x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    if not bool(x.isfinite().all() and test_x.isfinite().all()):
        raise Refusal("vectors hold NaN or infinity")
    if not float(std.max()) > 0:
        raise Refusal("all vectors are equal")
    std = torch.where(std > CONSTANT * x.square().mean(0).sqrt(), std, 1.0)
    return (x - mean) / std, (test_x - mean) / std


def factored(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [r] > 0 of X X^T and their vectors [n, r], through whichever of X X^T and X^T X is smaller."""
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    real = values > values[-1] * max(x.shape) * torch.finfo(x.dtype).eps
    values, vectors = values[real], vectors[:, real]
    return values, vectors if wide else (x @ vectors) / values.sqrt()

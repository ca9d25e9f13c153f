"""How much of a flow's velocity its own position does not tell: Velocity Irreducible Variance,

    VIV(t) = E Var[v | x_t] / E|v - E v|^2,    v = eps - x0,  x_t = (1 - t) x0 + t eps,

the loss that no velocity net can go below, over that of the best constant. The name is arXiv 2606.03578's; the
definition is ours, as is the bracket: the truth lies between the best answer for the samples themselves (`in_sample`,
below it, far below where samples are few for their dimension) and the held-out risk of the best linear denoiser
(`linear`, above it). Since v = (x_t - x0) / t, Var[v | x_t] = Var[x0 | x_t] / t^2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.settings import Refusal

QUERIES = 512
SHRINKAGES = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


class Bracket(NamedTuple):
    times: tuple[float, ...]
    in_sample: tuple[float, ...]        # expected below the truth
    linear: tuple[float, ...]           # above it, but for the noise of the held-out samples

    @property
    def means(self) -> tuple[float, float]:
        return sum(self.in_sample) / len(self.times), sum(self.linear) / len(self.times)


def viv(x: Tensor, held_out: Tensor, times: Sequence[float], seed: int = 0) -> Bracket:
    """Of latents [N, ...], 0 < t < 1."""
    x, held_out = x.flatten(1).double(), held_out.flatten(1).double()
    if not all(0 < t < 1 for t in times):
        raise Refusal(f"times {list(times)}: variances of a velocity are taken between 0 and 1, not at them")
    if len(x) < 2 or not len(held_out) or x.shape[1] != held_out.shape[1]:
        raise Refusal(f"latents of {list(x.shape)} and {list(held_out.shape)}: give two or more, and held-out ones")
    return Bracket(tuple(times), tuple(in_sample(x, t, seed) for t in times), linear(x, held_out, times))


def in_sample(x: Tensor, t: float, seed: int = 0, queries: int = QUERIES) -> float:
    """Exact for the empirical distribution of x [N, D], whose posterior weighs x_i by exp(-|x_t - (1-t) x_i|^2 / 2t^2),
    but for the noise that is drawn. The least risk on samples is in expectation no more than the least on the law."""
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (queries,), generator=draws).to(x.device)
    eps = torch.randn(queries, x.shape[1], generator=draws, dtype=torch.float64).to(x.device)
    x = x - x.mean(0)                                               # where inner products lose little
    length, left = x.square().sum(1), x.new_zeros(())
    for i, e in zip(chosen.split(128), eps.split(128), strict=True):
        x_t = (1 - t) * x[i] + t * e
        weight = (((1 - t) * (x_t @ x.T) - (1 - t) ** 2 / 2 * length) / t**2).softmax(1)        # [Q, N]
        left = left + (weight @ length - (weight @ x).square().sum(1)).clamp(min=0).sum()
    return float(left / queries / t**2 / (length.mean() + x.shape[1]))


def linear(x: Tensor, held_out: Tensor, times: Sequence[float]) -> tuple[float, ...]:
    """Risk on `held_out` of E[x0 | x_t] for the Gaussian that has the mean and covariance of x: in each eigendirection
    x0 is answered by g x_t, g = (1-t) l / ((1-t)^2 l + t^2). The mean over noise is taken in closed form. This is the
    irreducible variance itself where the law is Gaussian and the samples are many. Where they are few, eigenvalues
    are drawn towards their mean; each time takes the best of SHRINKAGES."""
    (n, dim), mean = x.shape, x.mean(0)
    x, held_out = x - mean, held_out - mean
    small = dim <= n
    values, vectors = torch.linalg.eigh((x.T @ x if small else x @ x.T) / (n - 1))
    values, count = values.clamp(min=0), torch.ones(min(n, dim), dtype=torch.float64, device=x.device)
    if small:
        second = (held_out @ vectors).square().mean(0)                          # [D]
    else:                                       # the directions that x does not span are alike, and stand as one
        real = values > values[-1] * n * torch.finfo(x.dtype).eps
        values, count = values[real], count[real]
        basis = (x.T @ vectors[:, real]) / (values * (n - 1)).sqrt()
        second = (held_out @ basis).square().mean(0)
        rest = (held_out.square().sum(1).mean() - second.sum()).clamp(min=0)[None]
        values, second, count = (torch.cat(pair) for pair in (
            (values, values.new_zeros(1)), (second, rest), (count, count.new_tensor([dim - len(count)]))))
    constant, even = second.sum() + dim, (count * values).sum() / dim
    found = []
    for t in times:
        risks = []
        for share in SHRINKAGES:
            drawn = (1 - share) * values + share * even
            gain = (1 - t) * drawn / ((1 - t) ** 2 * drawn + t**2)
            risks.append(float(((1 - (1 - t) * gain).square() * second + count * (gain * t).square()).sum()))
        found.append(min(risks) / t**2 / float(constant))
    return tuple(found)

"""Kernels, affinities of samples to targets, and the coefficients D that are made of them."""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.linalg import vector_norm

from stillroom.match.drift.problems import BLOCK, Problems, joined
from stillroom.settings import Refusal, nearest

LOG2_E = math.log2(math.e)      # exp2 costs a CPU a third of exp

Kernel = Literal["laplace", "gauss", "matern"]
Coupling = Literal["joint", "separate"]
KERNELS, COUPLINGS = get_args(Kernel), get_args(Coupling)


class Form(NamedTuple):
    """What makes coefficients of distances.

    joint: one softmax over all targets, D = A sum(other side's A), as if by the gradient of a discriminator.
    separate: a softmax over each side, D = A / sum(own side's A), the difference of two mean shifts.
    x_softmax: A is the root of that softmax times the softmax over samples, else that softmax by itself.
    floor: the least A, before weights multiply it.
    """

    kernel: Kernel
    coupling: Coupling
    x_softmax: bool
    floor: float


def checked_form(kernel: str, coupling: str, x_softmax: bool, floor: float | None,
                 temperatures: Sequence[float]) -> Form:
    for what, name, known in (("kernel", kernel, KERNELS), ("coupling", coupling, COUPLINGS)):
        if name not in known:
            raise Refusal(f"drifting: {what} {name!r} is unknown{nearest(str(name), known)}")
    if not 0 <= (floor or 0) < 1:
        raise Refusal(f"drifting: affinity_floor {floor}: a number from 0 to below 1 is needed, or None")
    if not temperatures or not all(0 < r < math.inf for r in temperatures):
        raise Refusal(f"drifting: temperatures {list(temperatures)}: one or more positive numbers are needed")
    return Form(kernel, coupling, x_softmax, floor or 0.0)      # pyright: ignore[reportArgumentType]


def log2_kernel(d: Tensor, slope: Tensor, kernel: Kernel, out: Tensor | None = None) -> Tensor:
    """With r = d / tau and slope = -log2(e) / tau. laplace: exp(-r), gauss: exp(-r^2 / 2), matern: (1 + r) exp(-r)."""
    z = torch.mul(d, slope, out=out)
    if kernel == "gauss":
        return z.square_().mul_(-0.5 / LOG2_E)
    if kernel == "matern":
        return z.add_((z / -LOG2_E).log1p_(), alpha=LOG2_E)
    return z


def slopes(like: Tensor, taus: Sequence[float]) -> Tensor:
    """[K, 1, 1]."""
    return like.new_tensor([[[-LOG2_E / tau]] for tau in taus])


def mean_shift(x: Tensor, y: Tensor, tau: float, kernel: Kernel = "laplace") -> tuple[Tensor, Tensor]:
    """(sum_j k(|y_j - x|) (y_j - x), sum_j k(|y_j - x|)) of queries x [B, N, C] to y [B, M, C]; tau in their units.

    Their quotient is the mean shift. What each numerator is tau^2 times the gradient of: for gauss, its own sum of
    kernels, so that the quotient is tau^2 times a score; for laplace, the sum of matern kernels.
    """
    k = log2_kernel(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist"), slopes(x, [tau])[0], kernel).exp2()
    mass = k.sum(2)
    return k @ y - mass[..., None] * x, mass


# ---- coefficients ----

def stacks(part: Problems, taus: Sequence[float], form: Form) -> Iterator[tuple[Tensor, Tensor]]:
    """By groups of K' temperatures that make a block of pairs: D [b, K', N, M] where a Gram matrix is to measure it,
    else V [b, K', N, C]; and the norm of the pull, [K'], which D's rows sum to over positives.

    Blocks that are done with when V is made take turns in the same memory: pages cost more to get than to fill.
    """
    b, n, m = part.distance.shape
    size, step = len(taus) if len(taus) * b * n * m <= BLOCK else 1, max(1, BLOCK // (b * m))
    again = None
    if part.gram is None and form.coupling == "joint" and (size < len(taus) or step < n):
        again = part.distance.new_empty(b, size, min(step, n), m)
    for i in range(0, len(taus), size):
        slope = slopes(part.distance, taus[i:i + size])
        made, pulls = [], []
        for d, pull in coefficients(part, slope, form, step, again):
            made.append(d if part.gram is not None else times(d, part.targets))
            pulls.append(pull)
        yield joined(made, 2), vector_norm(joined(pulls, 2), dim=(0, 2, 3))


def times(d: Tensor, targets: Tensor) -> Tensor:
    """[b, K, n, M] by [b, M, C]: the coefficients of all temperatures in one product."""
    b, k, n, m = d.shape
    return torch.bmm(d.view(b, k * n, m), targets).view(b, k, n, -1)


def coefficients(part: Problems, slope: Tensor, form: Form, step: int,
                 again: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """D [b, K', n, M] and its pull [b, K', n, 1], by blocks of `step` rows."""
    distance = part.distance[:, None]
    sides = [distance] if form.coupling == "joint" else distance.tensor_split([part.split], 3)
    for blocks in zip(*(affinities(side, slope, form, step, again) for side in sides), strict=True):
        a = joined(blocks, 3)
        if part.weights is not None:
            a.mul_(part.weights[:, None, None])
        negative, positive = a[..., :part.split], a[..., part.split:]
        repulsion, attraction = negative.sum(3, keepdim=True), positive.sum(3, keepdim=True)
        if form.coupling == "joint":
            positive.mul_(repulsion)
            negative.mul_(-attraction)
            yield a, repulsion * attraction
        else:
            tiny = torch.finfo(a.dtype).tiny
            silent = (attraction == 0) | (repulsion == 0)       # one side alone would drag, wherever the origin is
            positive.div_(attraction.clamp_(min=tiny).masked_fill_(silent, torch.inf))
            negative.div_(-repulsion.clamp_(min=tiny).masked_fill_(silent, torch.inf))
            yield a, (~silent).to(a.dtype)


def affinities(distance: Tensor, slope: Tensor, form: Form, step: int, again: Tensor | None) -> Iterator[Tensor]:
    """A [b, K', n, m] of distances [b, 1, N, m], by blocks of `step` rows.

    One exponential serves both softmaxes: with E = k(d) / k(least d), A = E / sqrt(row sum * column sum). Where that
    underflows for a whole row, logarithms are taken instead; where for a column, the target is far from every sample
    and its softmax over targets is nothing as well.
    """
    blocks = [distance] if step >= distance.shape[2] else distance.split(step, 2)
    peak = log2_kernel(distance.amin((2, 3), keepdim=True), slope, form.kernel)
    tiny = torch.finfo(peak.dtype).tiny

    def kernel(d: Tensor) -> Tensor:
        out = None if again is None else again[:, :, :d.shape[2]]
        return log2_kernel(d, slope, form.kernel, out).sub_(peak).exp2_()

    rows, columns = [], []
    for block in blocks:
        e = kernel(block)
        rows.append(e.sum(3, keepdim=True))
        columns.append(e.sum(2, keepdim=True))
    if min(float(row.min()) for row in rows) < tiny * 2**26:    # 2^-20 of a row's largest is below the floor
        yield from wide_affinities(blocks, slope, form)
        return
    column = reduce(torch.add, columns).clamp_(min=tiny).rsqrt_()
    for block, row in zip(blocks, rows, strict=True):
        a = kernel(block) if len(blocks) > 1 else e
        a = a.mul_(row.rsqrt_()).mul_(column) if form.x_softmax else a.div_(row)
        yield a.clamp_(min=form.floor) if form.floor else a


def wide_affinities(blocks: Sequence[Tensor], slope: Tensor, form: Form) -> Iterator[Tensor]:
    def logits(d: Tensor) -> Tensor:
        return log2_kernel(d, slope, form.kernel).div_(LOG2_E)

    columns = reduce(torch.logaddexp, (logits(block).logsumexp(2, keepdim=True) for block in blocks))
    for block in blocks:
        a = logits(block)
        rows = a.logsumexp(3, keepdim=True)
        a.sub_((rows + columns) / 2 if form.x_softmax else rows)
        if form.coupling == "separate" and not form.floor:
            a.sub_(a.amax(3, keepdim=True))     # only proportions count, and they may all be about to underflow
        yield a.exp_().clamp_(min=form.floor)

"""What a field is made of: targets, their weights, their distances from samples and, where it pays, their products."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from stillroom.paths import at_least_float32
from stillroom.settings import Refusal

BLOCK = 2**22       # pairs at a time: 16 MB, which allocators reuse; larger pieces are faulted in anew each time
TILE = 128          # of triangular products: smaller ones save multiplications, larger are nearer the peak rate


class NotFinite(Refusal):
    """Distances that are no numbers."""


class Weights(NamedTuple):
    """Of the targets, [problems, n] each; None are ones."""

    x: Tensor | None = None
    negatives: Tensor | None = None
    positives: Tensor | None = None


class Problems(NamedTuple):
    targets: Tensor             # [B, M, C]: x, negatives, positives, around the mean of x
    distance: Tensor            # [B, N, M]
    gram: Tensor | None         # [B, M, M]: products of targets, on and above the diagonal
    weights: Tensor | None      # [B, M]
    split: int                  # where positives begin

    def parts(self) -> "list[Problems]":
        """As many problems at a time as make a block of pairs."""
        b, n, m = self.distance.shape
        size = max(1, BLOCK // (n * m))
        return [self] if size >= b else [self.some(slice(i, i + size)) for i in range(0, b, size)]

    def some(self, at: slice) -> "Problems":
        t, d, g, w, split = self
        return Problems(t[at], d[at], None if g is None else g[at], None if w is None else w[at], split)

    def own(self) -> Tensor:
        """[B, N]: distances of samples from themselves."""
        return self.distance.diagonal(dim1=1, dim2=2)

    def mean_distance(self) -> float:
        """Weighted by target. It is finite if all that was given is: its sum is the look for NaN."""
        d, w = self.distance, self.weights
        mean = float(d.sum()) / d.numel() if w is None else float((d.sum(1) * w).sum() / (d.shape[1] * w.sum()))
        if not math.isfinite(mean):
            raise NotFinite("drifting: samples, positives or negatives hold NaN, infinity or values beyond "
                            f"{torch.finfo(d.dtype).max**0.5:.0e}; look at what made them")
        return mean


def posed(x: Tensor, positives: Tensor, negatives: Tensor | None, weights: Weights | None, temperatures: int,
          least: float) -> Problems:
    """Distances are at least the root of `least`. The Gram matrix is made where, at so many temperatures, measuring
    forces by it (`quadratic`) and multiplying once takes fewer multiplications than multiplying for each."""
    targets, split, weights_of = gathered(x, positives, negatives, weights)
    n, (m, c) = x.shape[1], targets.shape[1:]
    triangle, gram = m * (m + min(m, TILE)) // 2, None
    if triangle * (c + temperatures * n) < temperatures * n * m * c:
        gram = upper(targets)
        squares, dots = gram.diagonal(dim1=1, dim2=2), gram[:, :n]
        for i in range(TILE, n, TILE):      # what lies below the diagonal is mirrored among the samples
            dots[:, i:i + TILE, :i] = dots[:, :i, i:min(i + TILE, n)].mT
        distance = (squares[:, :n, None] + squares[:, None]).add_(dots, alpha=-2)
    else:
        squares = vector_norm(targets, dim=2).square_()
        distance = (squares[:, :n, None] + squares[:, None]).baddbmm_(targets[:, :n], targets.mT, alpha=-2)
    return Problems(targets, distance.clamp_(min=least).sqrt_(), gram, weights_of, split)


def gathered(x: Tensor, positives: Tensor, negatives: Tensor | None,
             weights: Weights | None) -> tuple[Tensor, int, Tensor | None]:
    """Targets around the mean of x: products of vectors far from zero would round away their differences."""
    given = {name: v for name, v in (("x", x), ("negatives", negatives), ("positives", positives)) if v is not None}
    for name, v in given.items():
        check_samples(name, v, x)
    x = at_least_float32(x)
    centre, m = x.mean(1, keepdim=True), sum(v.shape[1] for v in given.values())
    targets, i = x.new_empty(len(x), m, x.shape[2]), 0
    for v in given.values():
        torch.sub(v.to(x.dtype), centre, out=targets[:, i:i + v.shape[1]])
        i += v.shape[1]
    return targets, m - positives.shape[1], None if weights is None else joined_weights(given, weights, x)


def check_samples(name: str, v: Tensor, x: Tensor) -> None:
    if v.ndim != 3 or 0 in v.shape or not v.is_floating_point():
        raise Refusal(f"drifting: {name} are {v.dtype} {list(v.shape)}: floating-point [problems, samples, channels], "
                      "at least one of each, are needed")
    if (len(v), v.shape[2]) != (len(x), x.shape[2]) or v.device != x.device:
        raise Refusal(f"drifting: {name} are {list(v.shape)} on {v.device}, x {list(x.shape)} on {x.device}: problems, "
                      "channels and device must agree")


def joined_weights(given: dict[str, Tensor], weights: Weights, x: Tensor) -> Tensor:
    """[B, M]."""
    named, pieces = weights._asdict(), []
    for name, v in given.items():
        w = named.pop(name)
        if w is not None and w.shape != v.shape[:2]:
            raise Refusal(f"drifting: weights of {name} are {list(w.shape)}: {list(v.shape[:2])} are needed")
        pieces.append(x.new_ones(v.shape[:2]) if w is None else w.to(x.dtype))
    if any(w is not None for w in named.values()):
        raise Refusal("drifting: weights of negatives, but no negatives")
    w = torch.cat(pieces, 1)
    if not bool(((w >= 0) & w.isfinite()).all() & (w.sum() > 0)):
        raise Refusal("drifting: weights must be finite, not negative, and not all zero")
    return w


def upper(t: Tensor) -> Tensor:
    """T T^t on and above the diagonal, by tiles of columns (of rows: up to a quarter slower); nothing below."""
    m = t.shape[1]
    gram = t.new_empty(len(t), m, m)
    for i in range(0, m, TILE):
        j = i + TILE
        torch.bmm(t[:, :j], t[:, i:j].mT, out=gram[:, :j, i:j])
    return gram


def quadratic(d: Tensor, gram: Tensor) -> Tensor:
    """[K]: root of tr D G D^t, of which only the upper tiles of G are read; D [b, K, N, M]."""
    b, k, n, m = d.shape
    rows, found = d.view(b, k * n, m), []
    for i in range(0, m, TILE):
        here, tile = slice(i, i + TILE), rows[:, :, i:i + TILE]
        product = torch.bmm(tile, gram[:, here, here])
        if i:
            product.baddbmm_(rows[:, :, :i], gram[:, :i, here], alpha=2)
        found.append(product.mul_(tile).view(b, k, n, -1).sum((0, 2, 3)))
    return reduce(torch.add, found).clamp_(min=0).sqrt_()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Distances are small differences of large numbers. Entering costs, and so is left out where it changes nothing."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)

"""Distances between all pairs of two sets of points, some rows at a time: memory does not grow with their product."""

from collections.abc import Iterator

import torch
from torch import Tensor

ENTRIES = 2**24         # of one block of rows


def rows_of_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, |a_i - b_j| [rows, len(b)]), about a common centre and in double precision: cdist works through a matrix
    product, which loses what is far from the origin, and what is small beside the whole set. What its rounding leaves
    between equal points is taken back to 0."""
    centre = b.mean(0, dtype=torch.float64)
    a, b = a - centre, b - centre
    rounding = 16 * torch.finfo(b.dtype).eps
    a2, b2 = a.square().sum(1), b.square().sum(1)
    step = max(1, ENTRIES // len(b))
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        d = torch.cdist(a[rows], b)
        yield rows, d.masked_fill(d.square() <= rounding * (a2[rows, None] + b2), 0)

"""What the paper's statements say of two encoders, measured.

Theorem 1 (tangent alignment): at the training resolution, student and teacher move alike along the manifold:
    J_S v = J_T v for v along the image manifold. Here: cosine and ratio of norms of central differences along v.
Theorem 2 (generalisation): |E_S - E_T| at resolution r is at most its value at r0 plus L |r - r0|. Here: the least L.
Proposition 1 (sweet spots): the best scales of both differ little. See `measure.bootstrap`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.codecs.codec import Encodes, resized

STEP = 0.02
"""Root mean square of the change of pixels, in [-1, 1]; the two sides of a central difference."""


class Alignment(NamedTuple):
    cosine: Tensor              # [B], of J_S v and J_T v
    ratio: Tensor               # [B], |J_S v| / |J_T v|


def directions(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Unit directions at each picture [B, 3, S, S]: along the resolution (what is lost when the picture is taken at
    7/8 of it), towards another picture where there is one, and white noise, which is on no image manifold."""
    size = x.shape[-1]
    found = {"resolution": resized(resized(x, (size * 7 // 8, size * 7 // 8)), (size, size)) - x}
    if len(x) > 1:
        found["another picture"] = x.roll(1, 0) - x
    found["noise"] = torch.randn(x.shape, generator=generator).to(x)
    return {name: unit(v) for name, v in found.items()}


def unit(v: Tensor) -> Tensor:
    """To a root mean square of 1, picture by picture."""
    return v / v.square().flatten(1).mean(1).sqrt().clamp(min=1e-12).view(-1, 1, 1, 1)


@torch.inference_mode()
def derivative(codec: Encodes, x: Tensor, v: Tensor) -> Tensor:
    """J v by a central difference: [B, C, h, w]. One picture at a time: there are few, and they may be large."""
    pairs = zip(x.split(1), v.split(1), strict=True)
    return torch.cat([codec.encode(x + STEP * v) - codec.encode(x - STEP * v) for x, v in pairs]) / (2 * STEP)


def alignment(student: Encodes, teacher: Encodes, x: Tensor, v: Tensor) -> Alignment:
    return aligned(derivative(student, x, v), derivative(teacher, x, v))


def aligned(mine: Tensor, theirs: Tensor) -> Alignment:
    """Of two derivatives [B, C, h, w]."""
    mine, theirs = mine.flatten(1), theirs.flatten(1)
    return Alignment(functional.cosine_similarity(mine, theirs, dim=1),
                     mine.norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-12))


def least_slope(errors: Mapping[int, float], r0: int) -> float:
    """The least L with error(r) <= error(r0) + L |r - r0| at every measured resolution; 0 where error never grows."""
    return max((max(0.0, e - errors[r0]) / abs(r - r0) for r, e in errors.items() if r != r0), default=0.0)

"""Data that already lies in memory: points, small image sets, latents."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stillroom.data.batch import Batch
from stillroom.settings import Refusal

if TYPE_CHECKING:
    from stillroom.data.latents import Encoding


class Tensors:
    """x [N, ...] and perhaps labels y [N]. Checked once, here; nothing is augmented."""

    in_memory = True

    def __init__(
        self, x: Tensor, y: Tensor | None = None, classes: Sequence[str] | None = None, name: str = "tensors"
    ):
        if x.ndim < 2 or x.numel() == 0:
            raise Refusal(f"{name}: x has shape {list(x.shape)}; give at least one item, items along the first axis")
        if not x.is_floating_point():
            raise Refusal(f"{name}: x is {x.dtype}; give floats (images in [-1, 1])")
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise Refusal(f"{name}: {len(bad)} of {len(x)} items hold NaN or infinity, the first is item {bad[0]}")
        if y is None and classes is not None:
            raise Refusal(f"{name}: classes are given but no labels y")
        self.name, self.shape, self.x, self.y = name, tuple(x.shape[1:]), x.float(), None
        self.classes: tuple[str, ...] | None = None
        self.encoding: Encoding | None = None       # of latents: how pictures became them
        if y is not None:
            self.y = check_labels(y, len(x), classes, name)
            self.classes = tuple(classes) if classes is not None else tuple(map(str, range(int(self.y.max()) + 1)))

    def __len__(self) -> int:
        return len(self.x)

    def stamp(self) -> str:
        digest = hashlib.sha256(self.x.contiguous().numpy().tobytes())
        digest.update(b"" if self.y is None else self.y.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self.x[rows], None if self.y is None else self.y[rows])


def check_labels(y: Tensor, count: int, classes: Sequence[str] | None, name: str) -> Tensor:
    """int64 labels, one per item, each naming a class; or a Refusal."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or tuple(y.shape) != (count,):
        raise Refusal(f"{name}: labels are {y.dtype} of shape {list(y.shape)}; give integers of shape [{count}]")
    top = len(classes) if classes is not None else None
    wrong = (y < 0) if top is None else (y < 0) | (y >= top)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        allowed = "0 and up" if top is None else f"0 to {top - 1}"
        raise Refusal(
            f"{name}: {int(wrong.sum())} of {count} labels are out of range ({allowed}); "
            f"the first is item {first} with label {int(y[first])}"
        )
    return y.long()

"""Parts of a source."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from stillroom.data.batch import Batch, Source, named


class Some:
    """Some items of a source, as a source."""

    def __init__(self, source: Source, rows: Tensor):
        self.source, self.rows = source, rows
        self.name, self.shape, self.classes = source.name, source.shape, source.classes
        self.encoding, self.credits = getattr(source, "encoding", None), getattr(source, "credits", ())
        self.in_memory = getattr(source, "in_memory", False)

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        return self.source.fetch(self.rows[torch.as_tensor(indices, dtype=torch.int64)].tolist(), key)

    def stamp(self) -> str:
        rows = hashlib.sha256(self.rows.contiguous().numpy().tobytes()).hexdigest()[:16]
        return f"{named(self.source)}, of which {rows}"


class Parted(Some):
    """What is learned from, with the rest at hand: none is trained on that is measured."""

    def __init__(self, source: Source, rows: Tensor, rest: Tensor):
        super().__init__(source, rows)
        self.held = Some(source, rest)

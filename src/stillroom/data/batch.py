"""What every kind of data hands out, and the two ways of reading it: by number (`Source`) or in order (`Stream`)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Batch(NamedTuple):
    """x: float32 images in [-1, 1] [B, C, H, W], latents, or points [B, D]; y: int64 labels [B]."""

    x: Tensor
    y: Tensor | None = None


@runtime_checkable
class Source(Protocol):
    """Data read by number. `key` seeds augmentations: an item is a pure function of (index, key)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...                 # of one x
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    def __len__(self) -> int: ...
    def fetch(self, indices: Sequence[int], key: int) -> Batch: ...


def named(source: Source) -> str:
    """Name, number and, of what may change in its place, a digest: what a cache is of."""
    stamp: Callable[[], str] | None = getattr(source, "stamp", None)
    return f"{source.name}, {len(source)} items" + (f", {stamp()}" if stamp else "")


class Item(NamedTuple):
    """One item of a stream, not decoded yet. `cursor` is JSON from which the stream goes on after this item."""

    name: str
    image: bytes | None
    label: int | None
    cursor: dict


@runtime_checkable
class Stream(Protocol):
    """Data read in order. Every rank reads every item (bytes are cheap) and decodes only its own slice (pixels are
    not), so the cursor after a global batch is the same on all ranks and does not depend on how many there are."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...                 # of one x
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    def iterate(self, cursor: dict | None, seed: int) -> Iterator[Item]: ...           # endless
    def decode(self, items: Sequence[Item], which: range, key: int) -> Batch: ...      # items: the global batch


def at_most(source: Source | Stream, count: int) -> int:
    """So many items, or all there are; a stream has no end."""
    return count if isinstance(source, Stream) else min(count, len(source))

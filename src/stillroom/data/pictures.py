"""Pictures outside of training: a fixed sample for statistics and gates, whole pictures for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stillroom.data.batch import Batch, Source, Stream
from stillroom.data.builtin import photographs
from stillroom.data.images import PIXEL_LIMIT, Tally, Unreadable, decode, signed, signed_picture
from stillroom.data.loader import Loader
from stillroom.data.open import BUILTIN, parted, placed, split_of
from stillroom.data.scenes import KINDS, TEST, WHOLE, Window
from stillroom.data.tables import SUFFIXES, Rows
from stillroom.settings import Refusal, expanded

SCENES = 100                # of a procedural set, where no limit is given

Entry = tuple[str, Callable[[], Tensor]]        # a name, and what reads the picture


def sample(source: Source | Stream, count: int, seed: int) -> Batch:
    """The first items in a shuffled order. More than there are come round again, cropped anew."""
    # On the CPU, as loaders' threads are, whatever the device on which a recipe is being built.
    with torch.device("cpu"), Loader(source, seed=seed, batch=count, workers=0) as loader:
        return loader.at(0)[0]


class Pictures:
    """(name, float32 [3, H, W] in [-1, 1]) of every picture that can be read, at its own size, one at a time.

    `bad` names those that could not be read the last time round, and why; `credits` says whom to name.
    """

    def __init__(self, name: str, entries: Sequence[Entry], limit: int | None = None, bad_share: float = 1.0,
                 credits: Sequence[str] = ()):
        if limit is not None and limit < 1:
            raise Refusal(f"{name}: a limit of {limit} pictures; give at least 1")
        self.name, self.credits, self.bad = name, tuple(credits), dict[str, str]()
        self._entries, self._limit, self._share = entries, limit, bad_share

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tally, shown = Tally(self.name, self._share, len(self._entries)), 0
        self.bad = tally.bad
        for title, read in self._entries:
            if shown == self._limit:
                return
            try:
                x, reason = read(), None
            except Unreadable as error:
                x, reason = None, error.reason
            tally.record(title, reason)
            if x is not None:
                shown += 1
                yield title, x
        if not shown:
            raise Refusal(f"{self.name}: none of the {tally.seen} images is readable: {tally.examples()}")


def pictures(
    data: str | Path | Sequence[str | Path], limit: int | None = None, size: int | None = None, bad_share: float = 1.0
) -> Pictures:
    """Whole pictures of a folder, a parquet, single files, `photos:test`, or `leaves:test` at a stated size.

    `limit` counts readable ones. Unreadable ones are passed over, and stop the reading where they are more than
    `bad_share` of those seen.
    """
    specs = [str(data)] if isinstance(data, str | Path) else [str(d) for d in data]
    if not specs:
        raise Refusal("pictures: no file or folder is given")
    opened = [_entries(spec, size, limit or SCENES) for spec in specs]
    if len(specs) == 1 and (folder := expanded(parted(specs[0])[0])).is_dir():
        opened = [([(_short(title, folder), read) for title, read in opened[0][0]], [])]
    name = specs[0] if len(specs) == 1 else f"{specs[0]} and {len(specs) - 1} more"
    credits = dict.fromkeys(c for _, names in opened for c in names)
    return Pictures(name, [e for entries, _ in opened for e in entries], limit, bad_share, tuple(credits))


def _entries(spec: str, size: int | None, scenes: int) -> tuple[list[Entry], list[str]]:
    """With the credits that they ask for."""
    name, split = parted(spec)
    if name in KINDS:
        return _scenes(name, split_of(name, split), size, scenes), []
    if size is not None:
        raise Refusal(f"{spec}: pictures are read at their own size; a size is for scenes ({', '.join(KINDS)})")
    if name == "photos":
        found = photographs(split_of(name, split))
        return [(c.name, partial(signed_picture, image)) for c, image in found], [str(c) for c, _ in found]
    if name in BUILTIN:
        raise Refusal(f"{name}: holds no whole pictures; give a folder, files, a parquet, photos, or scenes")
    path = expanded(name)
    if split is None and path.is_file() and path.suffix.lower() in SUFFIXES:
        return [(str(path), partial(_read, path, str(path)))], []
    where = placed(spec)
    if not isinstance(where, Rows):
        raise Refusal(f"{spec}: whole pictures are read from folders, parquet and single files only")
    return [(where.title(i), partial(_row, where, i)) for i in range(where.count)], []


def _scenes(kind: str, split: str, size: int | None, count: int) -> list[Entry]:
    if size is None or not 4 <= size <= int(PIXEL_LIMIT**0.5):
        raise Refusal(f"{kind}: scenes of size {size}; say how many pixels they are to be drawn at, 4 at least")
    first, draw = TEST if split == "test" else 0, KINDS[kind][0]
    return [(f"{kind}:{split} {i}", partial(_scene, draw, first + i, size)) for i in range(count)]


def _scene(draw: Callable[[int, int, Window], Tensor], index: int, size: int) -> Tensor:
    return signed(draw(index, size, WHOLE))


def _read(data: bytes | Path, title: str) -> Tensor:
    return signed_picture(decode(data, title))


def _row(rows: Rows, i: int) -> Tensor:
    return _read(rows.read(i), rows.title(i))


def _short(title: str, folder: Path) -> str:
    """A picture's name within its folder; rows of a table are called by the table's name."""
    file = Path(title)
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else title

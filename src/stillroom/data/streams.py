"""Webdataset tars, read in order. Python's own tarfile does it, because a byte offset is then the whole cursor:
resuming seeks. (`datasets` streams tars too, but resumes by reading all again, refuses a tar that mixes jpg and png,
and asks the hub on opening.)"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.data.batch import Batch, Item
from stillroom.data.images import Tally, Unreadable, crop_law, decode, signed
from stillroom.data.order import mirror, permutation, uniforms
from stillroom.data.tables import SUFFIXES
from stillroom.settings import Refusal, seed_of

WINDOW = 1024               # items shuffled together; a resumed stream reads at most one window again
WINDOW_BYTES = 64 * 2**20


class Sample(NamedTuple):
    name: str
    fields: dict[str, bytes]
    end: int                # where the next sample starts in the tar


def samples(tar: Path, offset: int = 0) -> Iterator[Sample]:
    """Members that share their name up to the first dot are one sample. Starts at a byte offset."""
    name, fields, size = None, {}, tar.stat().st_size
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                start = offset
                while (member := archive.next()) is not None:
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # or every header is kept
                    folder, _, base = member.name.rpartition("/")
                    stem, _, field = base.partition(".")
                    if member.isfile() and stem and field:                  # webdataset skips the others too
                        here = f"{folder}/{stem}" if folder else stem
                        if name is not None and here != name:
                            yield Sample(name, fields, start)
                            fields = {}
                        data = archive.extractfile(member)
                        name, fields[field.lower()] = here, data.read() if data else b""
                    start = archive.offset
                # tarfile ends quietly at a damaged header; a whole tar ends in zeros or at its last byte.
                file.seek(archive.offset)
                if file.read(512).strip(b"\0"):
                    raise tarfile.ReadError("no header where one should be")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Refusal(f"{tar}: damaged or truncated tar ({error}), {size} bytes; fetch it again") from error
    if name is not None:
        yield Sample(name, fields, size)


class TarStream:
    """Each epoch reads the tars in a new order and shuffles windows of samples.

    Classes come from `classnames.txt` beside the tars (one name per line; `.cls` members hold the number); without it
    the stream counts as unlabelled.
    """

    def __init__(
        self, tars: Sequence[Path], size: int, crop: str = "centre", flip: bool = False, bad_share: float = 0.01,
        name: str | None = None, shrink: tuple[float, float] = (1.0, 8.0),
    ):
        if not tars:
            raise Refusal(f"{name or 'stream'}: holds no tar")
        self.tars, self.name = sorted(tars), name or str(tars[0])
        self.law, self.flip, self.shape = crop_law(size, crop, shrink), flip, (3, size, size)
        listed = self.tars[0].parent / "classnames.txt"
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else None
        self.classes = tuple(c.strip() for c in lines if c.strip()) if lines is not None else None
        self.tally = Tally(self.name, bad_share)

    @property
    def bad(self) -> dict[str, str]:
        return self.tally.bad

    def iterate(self, cursor: dict | None, seed: int) -> Iterator[Item]:
        """A cursor says where the current window starts (epoch, tar, byte) and how many of it were taken."""
        epoch, place, offset, taken = self._start(cursor, seed)
        while True:
            order = permutation(len(self.tars), seed, epoch).tolist()
            whole, empty = place == 0 and offset == 0, True
            while place < len(order):
                window, after = self._window(order, place, offset)
                shuffle = permutation(len(window), seed, seed_of(epoch, place, offset)).tolist()
                for k in range(taken, len(window)):
                    tar = self.tars[order[place]].name
                    mark = {"epoch": epoch, "tar": tar, "offset": offset, "taken": k + 1}
                    yield self._item(window[shuffle[k]], mark)
                (place, offset), taken, empty = after, 0, empty and not window
            if whole and empty:
                raise Refusal(f"{self.name}: the tars hold no samples")
            epoch, place, offset = epoch + 1, 0, 0

    def decode(self, items: Sequence[Item], which: range, key: int) -> Batch:
        """The slice `which` of a global batch. An unreadable picture is replaced by the next readable of the batch."""
        self.tally.check()
        u = uniforms(which, key, 4)
        squares, labels = [], []
        for i, draw in zip(which, u.tolist(), strict=True):
            pixels, label = self._readable(items, i, draw)
            squares.append(pixels)
            labels.append(label)
        x = torch.stack(squares)
        return Batch(
            signed(mirror(x, u[:, 2]) if self.flip else x), None if self.classes is None else torch.tensor(labels)
        )

    def _start(self, cursor: dict | None, seed: int) -> tuple[int, int, int, int]:
        if cursor is None:
            return 0, 0, 0, 0
        names = [self.tars[i].name for i in permutation(len(self.tars), seed, cursor["epoch"]).tolist()]
        if cursor["tar"] not in names:
            raise Refusal(f"{self.name}: the run was reading {cursor['tar']!r}, which is no longer there")
        return cursor["epoch"], names.index(cursor["tar"]), cursor["offset"], cursor["taken"]

    def _window(self, order: list[int], place: int, offset: int) -> tuple[list[Sample], tuple[int, int]]:
        """The next samples to shuffle together, and where (tar, byte) the window after them starts."""
        window, held = [], 0
        while place < len(order):
            for sample in samples(self.tars[order[place]], offset):
                window.append(sample)
                held += sum(map(len, sample.fields.values()))
                if len(window) == WINDOW or held >= WINDOW_BYTES:
                    return window, (place, sample.end)
            place, offset = place + 1, 0
        return window, (place, 0)

    def _item(self, sample: Sample, cursor: dict) -> Item:
        images = {field: data for field, data in sample.fields.items() if f".{field.rpartition('.')[2]}" in SUFFIXES}
        if len(images) > 1:     # `jpg` is the picture, and `depth.png` beside it something of it
            plain = [field for field in images if "." not in field]
            if len(plain) != 1:
                raise Refusal(f"{self.name}: sample {sample.name} holds {len(images)} pictures, {', '.join(images)}; "
                              "leave one of them under a name without a dot, such as jpg")
            images = {plain[0]: images[plain[0]]}
        label = sample.fields.get("cls", b"").strip()
        return Item(sample.name, next(iter(images.values()), None), int(label) if label.isdigit() else None, cursor)

    def _readable(self, items: Sequence[Item], first: int, u: Sequence[float]) -> tuple[Tensor, int | None]:
        for k in range(len(items)):
            item = items[(first + k) % len(items)]
            try:
                pixels, reason = self._square(item, u), None
            except Unreadable as error:
                pixels, reason = None, error.reason
            if k == 0:                              # a stand-in is counted at its own place
                self.tally.record(item.name, reason)
            if pixels is not None:
                return pixels, item.label
        raise Refusal(f"{self.name}: a whole batch is unreadable: {self.tally.examples()}")

    def _square(self, item: Item, u: Sequence[float]) -> Tensor:
        if item.image is None:
            raise Unreadable(item.name, "the sample has no image")
        if self.classes is not None and (item.label is None or item.label >= len(self.classes)):
            raise Unreadable(item.name, f"label {item.label}, but there are {len(self.classes)} classes")
        return self.law.cut(self.law.kept(decode(item.image, item.name)), u)

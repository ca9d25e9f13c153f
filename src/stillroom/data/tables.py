"""Where encoded pictures lie: folders, parquet files, data sets saved or read by `datasets`. Nothing is decoded here.

No network is tried, but for a name on the hub.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from stillroom.data.tensors import check_labels
from stillroom.settings import Refusal, expanded

SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".tga",
    ".ico",
))
UNCOMPRESSED = frozenset((".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga", ".ico"))
"""What may be so: equal ends say nothing then."""
LABELS = ("label", "labels", "y", "fine_label", "class")
PARQUET_LIMIT = 2 * 2**30   # bytes of parquet held in memory; above, `datasets` keeps a memory-mapped copy in its cache


@dataclass(frozen=True)
class Rows:
    """Encoded pictures by number, with a name for each that a person can find."""

    name: str
    count: int
    read: Callable[[int], bytes | Path]
    title: Callable[[int], str]
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None

    def stamp(self) -> str:
        """Tells data from others that came to their place: by their labels, and by every encoded picture, of whose
        file the length and the end are enough where it is compressed."""
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.numpy().tobytes())
        for i in range(self.count):
            size, told = length_and_tell(self.read(i))
            digest.update(f"{size} ".encode() + told)
        return digest.hexdigest()[:16]


def length_and_tell(data: bytes | Path) -> tuple[int, bytes]:
    """Of compressed files the last 64 bytes, where JPEG has its last pixels and PNG a checksum of all; else all."""
    if isinstance(data, bytes):
        return len(data), data
    with data.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0 if data.suffix.lower() in UNCOMPRESSED else max(0, size - 64))
        return size, file.read()


def folder(path: Path) -> Rows:
    """All pictures below a folder, sorted. Its subfolders are classes when all pictures lie in two of them or more."""
    files = sorted(_walk(path), key=lambda f: f.relative_to(path).as_posix())
    if not files:
        raise Refusal(f"{path}: holds no images; known endings: {' '.join(sorted(SUFFIXES))}")
    parts = [f.relative_to(path).parts for f in files]
    tops = sorted({p[0] for p in parts if len(p) > 1})
    labelled = len(tops) > 1 and all(len(p) > 1 for p in parts)
    number = {top: c for c, top in enumerate(tops)}
    return Rows(
        name=str(path), count=len(files), read=files.__getitem__, title=lambda i: str(files[i]),
        labels=torch.tensor([number[p[0]] for p in parts]) if labelled else None,
        classes=tuple(tops) if labelled else None,
    )


def _walk(path: Path) -> list[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise Refusal(f"{error.filename}: the folder cannot be listed: {error.strerror}")

    found, visited = [], set()
    for top, below, files in os.walk(path, onerror=refuse, followlinks=True):       # class folders are often links
        real = os.path.realpath(top)
        if real in visited:                                         # a link that leads back up
            below.clear()
            continue
        visited.add(real)
        below[:] = [d for d in below if not d.startswith(".")]
        found += [Path(top, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
    return found


def parquet(files: Sequence[Path], name: str) -> Rows:
    """Held in memory as encoded pictures, read by pyarrow: no cache is written. Sets too large for that go through
    `datasets`, whose memory-mapped copy is the only way to take single rows out of row groups at random."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sum(f.stat().st_size for f in files) > PARQUET_LIMIT:
        from datasets import Dataset

        return _dataset(Dataset.from_parquet([str(f) for f in files]), name, files[0].parent)
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file, columns=_chosen(pq.read_schema(file), str(file))))
        except (pa.ArrowException, OSError) as error:
            raise Refusal(f"{file}: cannot be read as parquet: {error}") from error
        if tables[-1].schema != tables[0].schema:
            raise Refusal(f"{file}: its columns differ from those of {files[0]}")
    table = pa.concat_tables(tables)
    image, label, names = columns(table.schema, name)
    cells = table.column(image)
    labels = _labels(table.column(label).to_pylist(), names, name) if label else (None, None)
    return _rows(name, len(table), lambda i: cells[i].as_py(), files[0].parent, *labels)


def saved(path: Path, split: str) -> Rows:
    """What `Dataset.save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise Refusal(f"{path}: has no split {split!r}; it has {', '.join(map(str, data))}")
        data = data[split]
    return _dataset(data, f"{path}:{split}", path)


def loaded(place: str, split: str) -> Rows:
    """What `datasets.load_dataset` makes of a folder's files (arrow, pictures with a metadata.jsonl or .csv), or of a
    name on the hub. It keeps a memory-mapped copy in its cache."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = expanded(place)
    if not place or path.is_file() or (not path.exists() and place.startswith(("/", ".", "~"))):
        raise Refusal(f"datasets:{place}: no such folder; give one, or a name on the hub")
    try:
        data = datasets.load_dataset(str(path.resolve()) if path.exists() else place, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise Refusal(f"datasets:{place}: `datasets` cannot load its split {split!r}: {error}") from error
    return _dataset(data, f"datasets:{place}:{split}", path)


def _dataset(data: Any, name: str, base: Path) -> Rows:
    import datasets

    image, label, names = columns(data.features.arrow_schema, name)
    labels = _labels(list(data[label]), names, name) if label else (None, None)
    cells = data.with_format(None).select_columns([image])
    if isinstance(cells.features[image], datasets.Image):
        cells = cells.cast_column(image, datasets.Image(decode=False))
    return _rows(name, len(data), lambda i: cells[i][image], base, *labels)


def _rows(name: str, count: int, cell: Callable[[int], Any], base: Path, labels, classes) -> Rows:
    def read(i: int) -> bytes | Path:
        value = cell(i)
        if isinstance(value, dict):
            value = value.get("bytes") or (base / value["path"] if value.get("path") else None)
        return value or b""         # `decode` calls it empty

    return Rows(name, count, read, lambda i: f"{name} row {i}", labels, classes)


def _chosen(schema: Any, name: str) -> list[str]:
    image, label, _ = columns(schema, name)
    return [image, label] if label else [image]


def columns(schema: Any, name: str) -> tuple[str, str | None, tuple[str, ...] | None]:
    """(image column, label column, class names) of an Arrow schema, by the feature types that `datasets` writes into
    its metadata, else by the columns' own types."""
    import pyarrow as pa

    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    kind = {c: f.get("_type") for c, f in features.items() if isinstance(f, dict)}

    def holds_bytes(t) -> bool:
        return pa.types.is_binary(t) or pa.types.is_large_binary(t)

    images = [c for c in schema.names if kind.get(c) == "Image"]
    images = images or [
        f.name for f in schema
        if pa.types.is_struct(f.type) and any(g.name == "bytes" and holds_bytes(g.type) for g in f.type)
    ]
    images = images or [f.name for f in schema if holds_bytes(f.type)]
    images = [c for c in images if c in ("image", "img")] or images
    if len(images) != 1:
        what = "several columns may be the image" if images else "no column holds images"
        raise Refusal(f"{name}: {what}; columns: {', '.join(schema.names)}; call the one to use 'image'")
    named = [c for c in schema.names if kind.get(c) == "ClassLabel"]
    labels = [c for c in LABELS if c in named] or named
    labels = labels or [c for c in LABELS if c in schema.names and pa.types.is_integer(schema.field(c).type)]
    if not labels:
        return images[0], None, None
    names = features[labels[0]].get("names") if labels[0] in named else None
    return images[0], labels[0], tuple(names) if names else None


def _labels(values: list, names: tuple[str, ...] | None, name: str) -> tuple[Tensor | None, tuple[str, ...] | None]:
    if None in values:
        raise Refusal(f"{name}: row {values.index(None)} has no label; drop such rows, or the label column")
    if all(v == -1 for v in values):        # how test sets are published whose labels are secret
        return None, None
    y = check_labels(torch.tensor(values), len(values), names, name)
    return y, names or tuple(str(c) for c in range(int(y.max()) + 1))

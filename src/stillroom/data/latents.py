"""Latents on disk. They travel with their normaliser, the crop that made them and the hash of their codec, because
without these a tensor of latents cannot be told from noise. Safetensors shards; `latents.json` is written last, so a
folder that has it is whole."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillroom.data.batch import Batch
from stillroom.data.tensors import check_labels
from stillroom.settings import Refusal
from stillroom.settings.files import file_written_atomically, write_atomically

INDEX = "latents.json"
SHARD = 4096                # items; what an interrupted writer may lose


@dataclass(frozen=True)
class LatentSpace:
    """The diffusion side of a codec: z = (z_codec - shift) / scale, channel by channel, on a grid over the pixels."""

    channels: int
    factor: int                                         # pixels per latent position along a side
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    offset: float = 0.0                                 # the pixel on which latent 0 is centred; latent i: + i * factor
    image_range: tuple[float, float] = (-1.0, 1.0)      # black and white, as the codec's own nets take them

    def __post_init__(self):
        for name in ("shift", "scale", "image_range"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if not len(self.shift) == len(self.scale) == self.channels:
            raise Refusal(
                f"latent space: {self.channels} channels, but {len(self.shift)} shifts and {len(self.scale)} scales"
            )
        if not all(math.isfinite(v) for v in self.shift + self.scale) or min(self.scale, default=0.0) <= 0:
            raise Refusal("latent space: shifts must be finite and scales finite and above 0")

    def normalise(self, z: Tensor) -> Tensor:
        """Codec side to diffusion side; [B, C, H, W], or tokens [B, N, C]."""
        shift, scale = self._shaped(z)
        return (z - shift) / scale

    def denormalise(self, z: Tensor) -> Tensor:
        shift, scale = self._shaped(z)
        return z * scale + shift

    def _shaped(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1) if z.ndim == 4 else (-1,)
        if z.shape[1 if z.ndim == 4 else -1] != self.channels:
            raise ValueError(f"latents of shape {list(z.shape)} in a space of {self.channels} channels")
        return (torch.tensor(self.shift, device=z.device, dtype=z.dtype).view(shape),
                torch.tensor(self.scale, device=z.device, dtype=z.dtype).view(shape))


@dataclass(frozen=True)
class Encoding:
    """How pictures became latents: what must agree before latents of two folders can be put together."""

    space: LatentSpace
    codec: str                          # hash of the codec
    crop: str                           # how pictures became squares, in words: `centre 32`

    @property
    def size(self) -> int | None:
        """Pixels a side of the squares, where the words say it."""
        number = re.search(r"\d+", self.crop)
        return int(number[0]) if number else None

    def differences(self, other: "Encoding") -> str:
        """`codec 'a' is not 'b'` for every field that differs."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        pairs = [(name, a[name], b[name])
                 for a, b in ((mine["space"], theirs["space"]), (mine, theirs)) for name in a if name != "space"]
        return "; ".join(f"{name} {a!r} is not {b!r}" for name, a, b in pairs if a != b)


def encoding_card(source: object) -> dict[str, dict]:
    """What the card of a product says of the latents that it was made on; nothing, where it was made on pictures."""
    encoding = getattr(source, "encoding", None)
    return {} if encoding is None else {"encoding": json.loads(json.dumps(dataclasses.asdict(encoding)))}


def write_latents(
    folder: Path,
    batches: Callable[[int], Iterable[Batch]] | Iterable[Batch],
    encoding: Encoding,
    classes: Sequence[str] | None = None,
    origin: str = "",
    per_shard: int = SHARD,
) -> Path:
    """Writes codec-side latents. Interrupted, it goes on after the last whole shard.

    `batches(start)` yields everything from item `start` on, so that a resumed writer encodes nothing twice; a plain
    iterable is read from its beginning. `origin` says what was encoded; a folder of another origin is refused.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = {**dataclasses.asdict(encoding), "classes": list(classes) if classes is not None else None,
            "origin": origin, "per_shard": per_shard}
    card = json.loads(json.dumps(card))
    held = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if held and not any(name.startswith("latents") for name in held):
        raise Refusal(f"{folder}: holds other things than latents ({', '.join(held[:3])}); write to a new folder")
    if (folder / INDEX).exists():
        _same(folder / INDEX, {k: _read_index(folder).get(k) for k in card}, card)
        return folder
    shards = _finished(folder, card)
    start = sum(s["count"] for s in shards)
    rest = batches(start) if callable(batches) else _skip(batches, start)
    for x, y in _regroup(rest, per_shard):
        if shards and shards[-1]["count"] < per_shard:
            raise Refusal(f"{folder}: ends with a short shard, yet there are more latents; write to a new folder")
        shards.append(_write_shard(folder, len(shards), start, x, y, card))
        start += len(x)
    if not shards:
        raise Refusal(f"{folder}: there were no latents to write")
    index = {**card, "shape": shards[0]["shape"], "shards": [{k: s[k] for k in ("file", "count")} for s in shards]}
    write_atomically(folder / INDEX, json.dumps(index, indent=1), os.getpid())
    return folder


def _regroup(batches: Iterable[Batch], size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of any length into shards of one length (the last may be short)."""
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        while sum(len(b.x) for b in held) >= size:
            x, y = _joined(held)
            yield x[:size], None if y is None else y[:size]
            held = [Batch(x[size:], None if y is None else y[size:])]
    if sum(len(b.x) for b in held):
        yield _joined(held)


def _joined(batches: Sequence[Batch]) -> tuple[Tensor, Tensor | None]:
    labels = [b.y for b in batches if b.y is not None]
    if labels and len(labels) != len(batches):
        raise Refusal("latents: some batches have labels and some have none")
    return torch.cat([b.x for b in batches]), torch.cat(labels) if labels else None


def _skip(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    for batch in batches:
        drop = min(count, len(batch.x))
        count -= drop
        if drop < len(batch.x):
            yield Batch(batch.x[drop:], None if batch.y is None else batch.y[drop:])


def _write_shard(folder: Path, number: int, start: int, x: Tensor, y: Tensor | None, card: dict) -> dict:
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        first = start + int((~finite).nonzero()[0])
        raise Refusal(f"{folder}: latent {first} holds NaN or infinity; its shard was not written")
    classes, tensors = card["classes"], {"x": x.detach().cpu().contiguous()}
    if (y is None) != (classes is None):
        raise Refusal(f"{folder}: labels and class names come together or not at all")
    if y is not None:
        tensors["y"] = check_labels(y.cpu(), len(x), classes, str(folder)).contiguous()
    file = f"latents-{number:05d}.safetensors"
    with file_written_atomically(folder / file, os.getpid()) as new:    # runs that begin together may share a cache
        save_file(tensors, new, metadata={"card": json.dumps(card)})
    return {"file": file, "count": len(x), "shape": list(x.shape[1:])}


def _finished(folder: Path, card: dict) -> list[dict]:
    """The shards that an interrupted writer left. Each is whole, because it got its name last."""
    shards = []
    while (file := folder / f"latents-{len(shards):05d}.safetensors").exists():
        handle = _open(file)
        _same(file, json.loads((handle.metadata() or {}).get("card", "{}")), card)
        count, *shape = handle.get_slice("x").get_shape()
        shards.append({"file": file.name, "count": count, "shape": shape})
    return shards


def _same(path: Path, found: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if (other := found.get(name)) != value:
            how = f"{other!r}, not {value!r}"
            if isinstance(other, dict) and isinstance(value, dict):         # its numbers would fill a page
                how = "other " + ", ".join(k for k in value if other.get(k) != value[k])
            raise Refusal(f"{path}: holds latents of another {name}: {how}; write to a new folder")


def _read_index(folder: Path) -> dict:
    path = folder / INDEX
    if not path.is_file():
        raise Refusal(f"{folder}: has no {INDEX}: not a latent store, or its writing was interrupted (write again)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"{path}: is not JSON ({error}); write the latents again") from error


def _open(file: Path):
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise Refusal(f"{file}: is missing; write the latents again") from error
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{file}: damaged or truncated ({error}); delete it and write the latents again") from error


class Latents:
    """A latent store as a source of normalised latents. Shards are mapped, not read: a fetch touches its rows only."""

    def __init__(self, folder: Path, expect: Encoding | None = None):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        try:
            self.encoding = Encoding(LatentSpace(**index["space"]), index["codec"], index["crop"])
            self.classes = tuple(index["classes"]) if index["classes"] is not None else None
            self.shape, shards = tuple(index["shape"]), [(s["file"], int(s["count"])) for s in index["shards"]]
        except (KeyError, TypeError) as error:
            raise Refusal(f"{self.folder / INDEX}: lacks or misspells a field ({error}); write it again") from error
        self.space = self.encoding.space
        if expect is not None and self.encoding != expect:
            raise Refusal(f"{self.folder}: holds other latents: {self.encoding.differences(expect)}; "
                          "encode the images again with this codec")
        self.name, self._files = str(self.folder), [self.folder / file for file, _ in shards]
        self._handles = [_open(file) for file in self._files]
        self._x = [self._part(i, "x", (count, *self.shape)) for i, (_, count) in enumerate(shards)]
        self._y = None
        if self.classes is not None:
            y = torch.cat([self._part(i, "y", (count,)) for i, (_, count) in enumerate(shards)])
            self._y = check_labels(y, len(y), self.classes, self.name)
        self._ends = torch.tensor([count for _, count in shards]).cumsum(0)

    def _part(self, shard: int, name: str, shape: tuple[int, ...]) -> Tensor:
        handle, file = self._handles[shard], self._files[shard]
        found = tuple(handle.get_slice(name).get_shape()) if name in list(handle.keys()) else "missing"
        if found != shape:
            raise Refusal(f"{file}: {name!r} is {found}, not {shape}; delete it and write the latents again")
        return handle.get_tensor(name)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        shard = torch.searchsorted(self._ends, rows, right=True)
        z = torch.empty(len(rows), *self.shape)
        for s in shard.unique().tolist():
            mine = shard == s
            z[mine] = self._x[s][rows[mine] - (self._ends[s] - len(self._x[s]))].float()
        finite = z.isfinite().flatten(1).all(1)
        if not finite.all():
            i = int((~finite).nonzero()[0])
            raise Refusal(f"{self._files[int(shard[i])]}: latent {int(rows[i])} holds NaN or infinity; "
                          "delete the folder and write the latents again")
        return Batch(self.space.normalise(z), None if self._y is None else self._y[rows])

"""From the setting `data` to something that can be read."""

import re
from pathlib import Path
from typing import NamedTuple

from stillroom.data.batch import Source, Stream
from stillroom.data.builtin import ALL_SCALES, WIDTH, Photos, digits
from stillroom.data.images import ImageTable
from stillroom.data.latents import INDEX, Latents
from stillroom.data.mixed import Mixed, mixture
from stillroom.data.scenes import KINDS, Scenes
from stillroom.data.streams import TarStream
from stillroom.data.tables import SUFFIXES, Rows, folder, loaded, parquet, saved
from stillroom.settings import Images, Refusal, expanded, nearest

BUILTIN = ("digits", "shapes", "leaves", "photos")
SPLITS = ("train", "test", "val", "validation")
LOADED = "datasets:"        # before a folder or a name that `datasets` is to load


def open_source(settings: Images) -> Source | Stream:
    """`settings.data` is a path or a builtin name, with `:train`, `:test` (or `:val`) behind it where there are splits;
    or several of them, joined by plus signs."""
    if (settings.size is not None and settings.size < 1) or not 0 <= settings.bad_share <= 1:
        raise Refusal(f"size {settings.size} must be at least 1 and bad_share {settings.bad_share} between 0 and 1")
    least, most = settings.shrink
    if not 0 < least <= most:
        raise Refusal(f"shrink {least:g} to {most:g}: give the least first, both above 0")
    if settings.crop != "shrink" and tuple(settings.shrink) != type(settings).shrink:
        raise Refusal(f"shrink {least:g} to {most:g} has no effect with crop {settings.crop!r}; add crop 'shrink', or "
                      "leave it out")
    parts = mixture(settings.data, is_known)
    if len(parts) == 1:
        (share, name), = parts
        if share != 1:
            raise Refusal(f"data {settings.data!r}: {name} is all of it, whatever its share; leave {share:g}* out")
        return _open(name, settings)
    sources = []
    for _, name in parts:
        if not name:
            raise Refusal(f"data {settings.data!r}: a part of the mixture has no name")
        source = _open(name, settings)
        if isinstance(source, Stream):
            raise Refusal(f"data {settings.data!r}: {name} is a stream of tars, which cannot be mixed; use a folder or "
                          "parquet")
        sources.append(source)
    return Mixed(sources, [share for share, _ in parts], settings.data)


def is_known(spec: str) -> bool:
    """Is there a builtin, a file or a folder of this name, or is it one for `datasets`?"""
    name, _ = parted(spec)
    if name.startswith(LOADED):
        return "+" not in name or expanded(name.removeprefix(LOADED)).exists()
    return name in BUILTIN or (bool(name) and expanded(name).exists())


def parted(spec: str) -> tuple[str, str | None]:
    """(name, split); what `datasets` loads may have splits of any name."""
    match = re.fullmatch(rf"({LOADED}.+):([\w.-]+)|(.+):({'|'.join(SPLITS)})", spec)
    return (match[1] or match[3], match[2] or match[4]) if match else (spec, None)


def _open(spec: str, settings: Images) -> Source | Stream:
    name, split = parted(spec)
    if name in BUILTIN:
        return _builtin(name, split_of(name, split), settings)
    if not name.startswith(LOADED) and (store := store_at(spec)):
        return _latents(store, settings)
    how = {"size": size_of(spec, settings), "crop": settings.crop, "flip": settings.flip,
           "bad_share": settings.bad_share, "shrink": settings.shrink}     # asked before much is read
    where = placed(spec)
    assert not isinstance(where, Path)
    return TarStream(where.files, **how, name=where.name) if isinstance(where, Tars) else ImageTable(where, **how)


def size_of(spec: str, settings: Images) -> int:
    """Of the squares that pictures become, which could be any."""
    if settings.size is None:
        raise Refusal(f"{spec}: say how large its pictures shall be: --size PIXELS")
    return settings.size


def _latents(folder: Path, settings: Images) -> Latents:
    if settings.flip or settings.crop != "centre":
        raise Refusal(f"{folder}: latents were cropped when they were written; leave out flip and crop")
    store = Latents(folder)
    pixels, side = store.encoding.size, store.shape[-1]
    if pixels and settings.size not in (None, pixels, side):
        raise Refusal(f"{folder}: holds latents of pictures of {pixels} pixels a side, {side} a side themselves, and "
                      f"the size is {settings.size}; leave it out, or give other data")
    return store


def split_of(name: str, split: str | None) -> str:
    if split not in (None, "train", "test"):
        raise Refusal(f"{name}: has the splits train and test, not {split!r}")
    return split or "train"


def _builtin(name: str, split: str, settings: Images) -> Source:
    law = settings.shrink if settings.crop == "shrink" else None
    if name == "photos":
        return Photos(size_of(name, settings), split, flip=settings.flip, shrink=law or ALL_SCALES)
    if name in KINDS:
        return Scenes(name, size_of(name, settings), split=split, flip=settings.flip, shrink=law)
    if law:
        raise Refusal(f"digits: they are shown whole, {WIDTH} pixels wide; give --crop centre")
    if settings.flip:
        raise Refusal("digits: a mirrored digit is another sign; leave out flip")
    return digits(WIDTH if settings.size is None else settings.size, split)


class Tars(NamedTuple):
    files: list[Path]
    name: str


def placed(spec: str) -> Rows | Tars | Path:
    """What lies at a path: pictures by number, pictures in tars, or the folder of a latent store."""
    name, split = parted(spec)
    if name.startswith(LOADED):
        return loaded(name.removeprefix(LOADED), split or "train")
    path, split = within(spec)
    if path.is_file():
        if split not in (None, "train"):
            raise Refusal(f"{path}: a single file has no split {split!r}")
        if path.suffix == ".parquet":
            return parquet([path], str(path))
        if path.suffix == ".tar":
            return Tars([path], str(path))
        hint = "give the folder it lies in" if path.suffix.lower() in SUFFIXES else "give a folder, .parquet or .tar"
        raise Refusal(f"{path}: a file of this kind is not a data set; {hint}")
    if is_saved(path):
        return saved(path, split or "train")
    if store := store_at(spec):
        return store
    for ending in ("parquet", "tar"):
        found = sorted(p for p in path.glob(f"*.{ending}") if not p.name.startswith("."))
        found = found or sorted(path.glob(f"data/*.{ending}"))      # how the hub lays out a repository
        if found:
            files = _of_split(path, found, split)
            name = str(path) + (f":{split}" if split else "")
            return Tars(files, name) if ending == "tar" else parquet(files, name)
    if split not in (None, "train"):
        raise Refusal(f"{path}: has no split {split!r}: no subfolder or file is named so")
    return folder(path)


def store_at(spec: str) -> Path | None:
    """The folder of a latent store, if there is one."""
    path, split = within(spec)
    if not path.is_dir() or not ((path / INDEX).exists() or any(path.glob("latents-*.safetensors"))):
        return None
    if split not in (None, "train"):
        raise Refusal(f"{path}: a store of latents has no split {split!r}; cache that split by itself")
    return path


def within(spec: str) -> tuple[Path, str | None]:
    """The file or folder that is meant, and the split that is still to be looked for in it."""
    name, split = parted(spec)
    path = expanded(name)
    if not name or not path.exists():
        raise Refusal(f"data {name!r}: no such file or folder, and no builtin of that name{nearest(name, BUILTIN)}")
    return (path, split) if path.is_file() or is_saved(path) else _descend(path, split)


def is_saved(folder: Path) -> bool:
    """By `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _descend(path: Path, split: str | None) -> tuple[Path, str | None]:
    """Into the subfolder of the split, where subfolders are splits and not classes."""
    below = {d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith(".")}
    splits = below & set(SPLITS)
    if not splits or not (split in splits or len(splits) > 1 or splits == below):
        return path, split
    wanted = split or "train"
    if wanted not in splits:
        raise Refusal(f"{path}: has no split {wanted!r}; it has {', '.join(sorted(splits))}")
    return path / wanted, None


def _of_split(path: Path, files: list[Path], split: str | None) -> list[Path]:
    """`test.parquet`, `test-00000-of-00002.parquet`: files named after splits; where none is, all are `train`."""
    named = {f: m[1] for f in files if (m := re.match(rf"({'|'.join(SPLITS)})(?![a-z])", f.name))}
    wanted = split or "train"
    if not named and wanted == "train":
        return files
    chosen = [f for f in files if named.get(f) == wanted]
    if not chosen:
        has = ", ".join(sorted(set(named.values()))) or "none"
        raise Refusal(f"{path}: has no split {wanted!r}; splits named by its files: {has}")
    return chosen

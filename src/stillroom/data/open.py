"""From the setting `data` to something that can be read."""

import re
from pathlib import Path

from stillroom.data.batch import Source, Stream
from stillroom.data.builtin import Photos, digits
from stillroom.data.images import ImageTable
from stillroom.data.latents import INDEX, Encoding, Latents
from stillroom.data.scenes import KINDS, Scenes
from stillroom.data.streams import TarStream
from stillroom.data.tables import SUFFIXES, folder, parquet, saved
from stillroom.settings import Images, Refusal, nearest

BUILTIN = ("digits", "shapes", "leaves", "photos")
SPLITS = ("train", "test", "val", "validation")


def open_source(settings: Images, expect: Encoding | None = None) -> Source | Stream:
    """`settings.data` is a path or a builtin name, with `:train`, `:test` (or `:val`) behind it where there are splits.

    `expect` is how latents must have been made, where a codec is known.
    """
    if settings.size < 1 or not 0 <= settings.bad_share <= 1:
        raise Refusal(f"size {settings.size} must be at least 1 and bad_share {settings.bad_share} between 0 and 1")
    spec, split = settings.data, None
    if match := re.fullmatch(rf"(.+):({'|'.join(SPLITS)})", spec):
        spec, split = match[1], match[2]
    if spec in BUILTIN:
        return _builtin(spec, split or "train", settings)
    path = Path(spec).expanduser()
    if not path.exists():
        raise Refusal(f"data {spec!r}: no such file or folder, and no builtin of that name{nearest(spec, BUILTIN)}")
    return _path(path, split, settings, expect)


def _builtin(name: str, split: str, settings: Images) -> Source:
    if split not in ("train", "test"):
        raise Refusal(f"{name}: has the splits train and test, not {split!r}")
    if name == "photos":
        return Photos(settings.size, split, flip=settings.flip)
    if name in KINDS:
        return Scenes(name, settings.size, split=split, flip=settings.flip)
    if settings.flip:
        raise Refusal("digits: a mirrored digit is another sign; leave out flip")
    return digits(settings.size, split)


def _path(path: Path, split: str | None, settings: Images, expect: Encoding | None) -> Source | Stream:
    how = {"size": settings.size, "crop": settings.crop, "flip": settings.flip, "bad_share": settings.bad_share}
    if path.is_file():
        if split not in (None, "train"):
            raise Refusal(f"{path}: a single file has no split {split!r}")
        if path.suffix == ".parquet":
            return ImageTable(parquet([path], str(path)), **how)
        if path.suffix == ".tar":
            return TarStream([path], **how)
        hint = "give the folder it lies in" if path.suffix.lower() in SUFFIXES else "give a folder, .parquet or .tar"
        raise Refusal(f"{path}: a file of this kind is not a data set; {hint}")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return ImageTable(saved(path, split or "train"), **how)
    path, split = _descend(path, split)
    if (path / INDEX).exists() or any(path.glob("latents-*.safetensors")):
        if settings.flip or settings.crop == "random":
            raise Refusal(f"{path}: latents were cropped when they were written; leave out flip and crop")
        return Latents(path, expect)
    for ending in ("parquet", "tar"):
        found = sorted(p for p in path.glob(f"*.{ending}") if not p.name.startswith("."))
        found = found or sorted(path.glob(f"data/*.{ending}"))      # how the hub lays out a repository
        if found:
            files = _of_split(path, found, split)
            name = str(path) + (f":{split}" if split else "")
            if ending == "tar":
                return TarStream(files, **how, name=name)
            return ImageTable(parquet(files, name), **how)
    if split not in (None, "train"):
        raise Refusal(f"{path}: has no split {split!r}: no subfolder or file is named so")
    return ImageTable(folder(path), **how)


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

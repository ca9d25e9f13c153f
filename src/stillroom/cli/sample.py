"""`stillroom sample RUN`: pictures, or arrays, of what a run made. Killed, the same command goes on."""

import io
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cli.flags import parse
from stillroom.judge.asked import Drawing
from stillroom.judge.draws import Draws, open_draws
from stillroom.settings import Count, Natural, Refusal

SHEET = 64              # samples of --grid, at most
MARK = "stillroom"      # the text of a .png that says which draw it is of


@dataclass(frozen=True, kw_only=True)
class Settings(Drawing):
    """Draws from a run. The same seed gives the same samples at any --n and --batch."""

    n: Count = 64
    start: Natural = 0
    """Number of the first sample: several machines can draw parts of one set."""
    out: Path | None = None
    """FILE.png (a grid), FILE.npz (arrays x and y) or a folder (a PNG per image); else RUN/samples/drawn.png. A file
    or folder that was not finished is gone on with."""
    grid: Path | None = None
    """FILE.png: the first samples as a sheet, beside --out."""


def run(word: str, arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            parse(Settings, ["--help"], "stillroom sample RUN", "Draws from what a run made.")
        raise Refusal("usage: stillroom sample RUN [--n 64] [--out FILE|FOLDER]; see stillroom sample --help")
    place = Path(arguments[0])
    settings = parse(Settings, arguments[1:], "stillroom sample RUN", "Draws from what a run made.")
    draws = open_draws(place, settings)
    is_run = (place / "settings.toml").is_file()
    out = settings.out or (place / "samples" / "drawn.png" if is_run else Path("drawn.png"))
    first, stop = settings.start, settings.start + settings.n
    if draws.limit is not None and first >= draws.limit:
        raise Refusal(f"{place}: holds {draws.limit} points, and --start is {first}")
    stop = stop if draws.limit is None else min(stop, draws.limit)
    write = writer(draws, out)
    if settings.grid is not None:
        require_apart(settings.grid, out)
        require_picture(draws, settings.grid)
    write(draws, out, first, stop)
    if stop < first + settings.n:
        print(f"{place}: holds {draws.limit} points: {stop - first} are written", file=sys.stderr)
    if settings.grid is not None:           # last: what refuses --out leaves nothing
        write_sheet(draws, settings.grid, first, min(stop, first + SHEET))
    print(out)
    return 0


def writer(draws: Draws, out: Path):
    """By the name of what is to be written. Before anything is drawn."""
    kind = out.suffix.lower()
    if kind not in (".npz", ".png", ""):
        raise Refusal(f"{out}: write to FILE.png, FILE.npz or a folder")
    if kind == ".png":
        require_picture(draws, out)
    elif kind == "" and draws.kind != "pictures":
        raise no_pictures(draws)
    return {".npz": write_arrays, ".png": write_sheet, "": write_folder}[kind]


def require_picture(draws: Draws, out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise Refusal(f"{out}: a sheet is written to FILE.png")
    if draws.kind != "pictures" and draws.shape != (2,):
        raise no_pictures(draws)


def require_apart(sheet: Path, out: Path) -> None:
    """A sheet among the pictures of a draw would be taken for one of another."""
    if out.resolve() in (sheet.resolve(), *sheet.resolve().parents):
        raise Refusal(f"--grid {sheet}: would lie in --out {out}, among the samples; give it another place")


def no_pictures(draws: Draws) -> Refusal:
    decode = ", or give the --codec that decodes them" if len(draws.shape) == 3 else ""
    return Refusal(f"samples of shape {draws.shape} are no pictures; write them to FILE.npz{decode}")


# ---- a sheet ----


def write_sheet(draws: Draws, out: Path, first: int, stop: int) -> None:
    import torch

    from stillroom.settings.files import write_atomically
    from stillroom.train.pictures import cloud, grid

    x = torch.cat([part for _, part in draws.chunks(first, stop)])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, png(grid(x) if draws.kind == "pictures" else cloud(x)))


def png(image, **more) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", **more)
    return content.getvalue()


# ---- a folder of pictures, each of which says which draw it is of ----


def write_folder(draws: Draws, out: Path, first: int, stop: int) -> None:
    from PIL.PngImagePlugin import PngInfo

    from stillroom.settings.files import write_atomically
    from stillroom.train.pictures import grid

    mark = PngInfo()
    mark.add_text(MARK, draws.digest)
    there = pictures_there(draws, out, first, stop)
    if first + there == stop:
        return
    tell_if_resumed(out, there)
    for i, part in draws.chunks(first + there - there % draws.batch, stop):
        out.mkdir(parents=True, exist_ok=True)          # after the first draw: one that cannot be leaves nothing
        for k, image in enumerate(part, i):
            if k >= first + there:
                picture = grid(image[None], tile=1, gap=0).convert("RGB")
                write_atomically(out / f"{k:06d}.png", png(picture, pnginfo=mark))


def pictures_there(draws: Draws, out: Path, first: int, stop: int) -> int:
    """How many pictures of this draw the folder holds from the first on, without a gap; of any other draw, none may be
    there."""
    from PIL import Image

    held = sorted(p for p in out.glob("*.png") if not p.name.startswith(".")) if out.is_dir() else []
    for file in held[:1] + held[-1:]:
        try:
            with Image.open(file) as image:
                same = getattr(image, "text", {}).get(MARK) == draws.digest
        except OSError:
            same = False
        if not same:
            raise Refusal(f"{file}: is of another draw (another run, sampler, seed, guidance or the like); "
                          "write to a new folder")
    named = {p.name for p in held}
    if more := [name for name in sorted(named) if not name[:-4].isdigit() or not first <= int(name[:-4]) < stop]:
        raise Refusal(f"{out}: holds {more[0]} too, which is not among the {stop - first} samples from {first} on; "
                      "write to a new folder")
    return next((i for i in range(stop - first) if f"{first + i:06d}.png" not in named), stop - first)


def tell_if_resumed(out: Path, there: int) -> None:
    if there:
        print(f"{out}: going on after {there} samples", file=sys.stderr)


# ---- arrays ----


def write_arrays(draws: Draws, out: Path, first: int, stop: int) -> None:
    """Samples go to files beside the one to be written as they are drawn, and are put together at the end: memory
    holds one chunk."""
    from stillroom.settings.files import held, write_atomically

    parts = out.with_name(f".{out.name}.part")
    card = {"draw": draws.digest, "start": first}
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out.with_name(f".{out.name}.lock"), f"{out}: another command is drawing into it; wait for it, or give "
                                                  "another file"):
        there = begun(parts, card, first, out)
        tell_if_resumed(out, min(there, stop - first))
        for i, x in draws.chunks(first + there, stop):
            if not (parts / "draw.json").is_file():         # after the first draw: one that cannot be leaves no part
                parts.mkdir(exist_ok=True)
                write_atomically(parts / "draw.json", json.dumps(card))
            write_atomically(parts / f"{i:09d}.npy", npy(x.numpy()))
        put_together(parts, draws, out, first, stop)
        shutil.rmtree(parts)


def begun(parts: Path, card: dict, first: int, out: Path) -> int:
    """How many samples an unfinished draw has left."""
    import numpy as np

    from stillroom.settings.files import read_json

    if not (parts / "draw.json").is_file():
        return 0
    if read_json(parts / "draw.json") != card:
        raise Refusal(f"{out}: an unfinished draw of another run, sampler, seed, guidance or the like lies in {parts}; "
                      "give its settings again, or delete it")
    there = 0
    while (file := parts / f"{first + there:09d}.npy").is_file():
        there += len(np.load(file, mmap_mode="r"))
    return there


def put_together(parts: Path, draws: Draws, out: Path, first: int, stop: int) -> None:
    import numpy as np

    from stillroom.settings.files import file_written_atomically

    y = draws.labels(first, stop - first)
    about = {"draw": draws.digest, "start": first, "encoding": draws.encoding, **draws.card}
    small = {"card": np.array(json.dumps(about))} | ({} if y is None else {"y": y.numpy()})
    with file_written_atomically(out) as new, zipfile.ZipFile(new, "w") as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False,
                                                        "shape": (stop - first, *draws.shape)})
            i = first
            while i < stop:
                x = np.load(parts / f"{i:09d}.npy")[: stop - i]
                file.write(x.astype("<f4").tobytes())
                i += len(x)
        for name, each in small.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), npy(each))


def npy(x: Any) -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.save(content, x)
    return content.getvalue()

"""`stillroom sweep RUN --data HELDOUT`: a distilled codec over sizes and scales, beside its teacher and rivals."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stillroom.cli.flags import parse, take
from stillroom.judge.asked import Sweep
from stillroom.judge.places import CODECS, is_codec_name, require_there
from stillroom.settings import Refusal

ABOUT = ("Measures a student encoder on held-out pictures at several sizes, remapped by several scales, beside its "
         "teacher, the teacher in fewer bits, and linear codes of the same latent size and of the same latent budget; "
         "chooses a scale on a part of the pictures, and judges it on the others.")
SMALLEST, LARGEST = 16, 8192


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    place = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if not place and not {"-h", "--help"} & set(arguments):
        raise Refusal("usage: stillroom sweep RUN --data HELDOUT; see stillroom sweep --help")
    settings = parse(Sweep, arguments, "stillroom sweep RUN", ABOUT)
    require_there(place, CODECS, is_codec_name(place))
    sizes = numbers(settings.sizes, "--sizes", int, SMALLEST, LARGEST)
    scales = numbers(settings.scales, "--scales", float, 0.01, 100)
    out = place_for(settings, place)
    from stillroom.cli.progress import watch_for
    from stillroom.judge.resolutions import measured, opened, seen_before
    from stillroom.report.sweep import choice_in_words, write_sweep
    from stillroom.settings.files import require_folder

    require_folder(out)
    codecs, card = opened(settings, place)
    found, compared = measured(settings, codecs, card, sizes, tuple(sorted({*scales, 1.0})), watch_for(quiet).note)
    found = {"run": place, "card": card, "seen_before": seen_before(settings, place)} | found
    out.mkdir(parents=True, exist_ok=True)
    write_tables(out, found)
    page = write_sweep(out, found, compared)
    choice = found["choice"]
    print(f"{choice_in_words(choice)}\npage: {page}")
    if settings.save:
        keep(place, found, settings)
        print(f"{place}: saved; stillroom.load({place!r}).remapped() now means remapped({choice['scale']:g})")
    return 0


def numbers(text: str, flag: str, kind: Callable[[str], Any], low: float, high: float) -> tuple[Any, ...]:
    """`64,128` as rising numbers, each once."""
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise Refusal(f"{flag} {text!r}: give numbers with commas between them, {flag} 64,128") from None
    for n in found:
        if not (math.isfinite(n) and low <= n <= high):
            raise Refusal(f"{flag}: {n} lies outside {low:g} to {high:g}")
    return tuple(found)


def place_for(settings: Sweep, place: str) -> Path:
    from stillroom.train.teacher import is_ours

    ours = is_ours(Path(place))
    if settings.save and not ours:
        raise Refusal(f"{place}: --save writes into the product of a run, and this is none")
    if settings.out is None and not ours:
        raise Refusal(f"{place}: not a run of stillroom's, so results need a folder: --out FOLDER")
    return settings.out or Path(place) / "sweep"


def write_tables(out: Path, found: Mapping[str, Any]) -> None:
    from stillroom.settings.files import write_atomically

    write_atomically(out / "sweep.json", json.dumps(found, indent=1, allow_nan=False))
    write_atomically(out / "sweep.csv", table(found["rows"]))


def table(rows: list[Mapping[str, Any]]) -> str:
    """One line per size, scale and contender; a mean is followed by the ends of its interval over pictures."""
    means = list(dict.fromkeys(name for row in rows for name in row["means"]))
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["size", "scale", "contender", "pictures", "latents", "latents_over_native", "encode_ms",
                     *(f"{name}{end}" for name in means for end in ("", "_low", "_high")), *scores])
    for row in rows:
        spread = [row["means"].get(name, {}).get(key) for name in means for key in ("mean", "low", "high")]
        writer.writerow([row["size"], row["scale"], row["contender"], len(row["values"]["mse"]), row["latents"],
                         row["latents_over_native"], row["encode_ms"], *spread,
                         *(row["scores"].get(name) for name in scores)])
    return out.getvalue()


def keep(place: str, found: Mapping[str, Any], settings: Sweep) -> None:
    """The chosen scale, as what the codec means by `remapped()`, and on its card how it was chosen."""
    from stillroom.train.product import amend_product

    choice = found["choice"]
    if choice["scale"] is None:
        raise Refusal(f"{place}: nothing was saved: {choice['why']}")
    entry = {key: choice[key] for key in ("scale", "best", "edge", "pictures", "most_latents", "most_ms", "psnr")}
    entry |= {"data": settings.data, "scales": found["scales"],
              "sizes": [e["size"] for e in found["sizes"] if e.get("calibration")]}
    amend_product(place, {"codec": {"remap": choice["scale"]}}, {"remap": entry})

"""`stillroom demo`: the first job of this house, on what comes with it. A small encoder is distilled from the bundled
codec at low resolution, measured over resolutions on held-out photographs, and shown. What is finished is kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cli import sweep
from stillroom.cli.flags import parse, take
from stillroom.recipes import find
from stillroom.settings import Optimizer

SIZES, SCALES = "64,128,256", "0.5,1,1.5,2,3"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Distils a small encoder at low resolution, measures it over resolutions, and writes a page; some minutes."""

    out: Path = Path("demo")
    """Where the runs and the page go. Runs that are finished are kept; others go on."""


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    settings = parse(Settings, arguments, "stillroom demo", Settings.__doc__ or "")
    runs = {name: made(settings.out / name, recipe, values, quiet) for name, recipe, values in tour()}
    measured = settings.out / "student" / "sweep"
    if not (measured / "index.html").exists():
        sweep.run("sweep", [str(runs["student"]), "--data", "photos:test", "--sizes", SIZES, "--scales", SCALES,
                            "--scratch", str(runs["scratch"]), "--linear", "photos:train", "--most-latents", "2.25",
                            "--save", *(["--quiet"] if quiet else [])])
    page = settings.out / "index.html"
    from stillroom.settings.files import write_atomically

    write_atomically(page, the_page(runs, measured))
    print(f"the tour's page: {page}\nits runs:        {', '.join(str(r) for r in runs.values())}")
    return 0


def tour() -> list[tuple[str, str, dict[str, Any]]]:
    """(folder, recipe, settings) of each run. Both see pictures from far away only: 3.5 to 8 pixels in each of theirs.
    """
    low: dict[str, Any] = {"data": "0.6*photos:train+0.4*leaves:train", "size": 64, "crop": "shrink",
                           "shrink": (3.5, 8.0), "flip": True, "batch": 16, "stem": "unshuffle"}
    rate = Optimizer(lr=2e-3, clip=1.0, warmup=50, decay="cosine")
    student = low | {"teacher": "bundled", "params": 25_000, "steps": 1500, "student": rate}
    scratch = low | {"channels": 4, "factor": 4, "params": 25_000, "decoder_params": 600_000, "steps": 1000,
                     "model": rate}
    return [("student", "encoder", student), ("scratch", "codec", scratch)]


def made(folder: Path, recipe: str, values: Mapping[str, Any], quiet: bool) -> Path:
    """The run, from its start, from where it was stopped, or as it was left when it was finished."""
    from stillroom import train
    from stillroom.cli.progress import watch_for
    from stillroom.report import write_report
    from stillroom.train.run import is_finished

    if not (is_finished(folder) and (folder / "report.html").exists()):
        watch = watch_for(quiet)
        if (folder / "settings.toml").exists():
            train.resume(folder, find, watch=watch)
        else:
            kind = find(recipe)
            train.start(kind, kind.Settings(out=folder, **values), recipe, watch=watch)
        write_report(folder)
    return folder


def the_page(runs: Mapping[str, Path], measured: Path) -> str:
    from stillroom.report import Figure, Files, Header, Images, Text, page
    from stillroom.report.sweep import choice_in_words, in_words

    found = json.loads((measured / "sweep.json").read_text(encoding="utf-8"))
    count = found["encoder_parameters"]
    folder, scale = measured / "pictures", found["shown_scale"]
    shots = [(folder / f"median-loss-{who.replace(' ', '-')}.png", who)
             for who in ("original", "teacher", "student", f"student at {scale:g}")]
    files = [("student/sweep/index.html", "student/sweep", "every measurement: sizes, scales, rivals, theorems", "")]
    files += [(f"{name}/report.html", name, path_words(path), "") for name, path in runs.items()]
    return page("A tour", [
        Text("What happened", [
            f"The bundled codec's encoder has {count['teacher']:,} parameters. One of {count['student']:,} learned to "
            "answer as it does, on squares of 64 pixels of eight photographs and textures, and of drawn scenes, all "
            "seen from far away. Then both were asked about photographs that neither had learned from, at several "
            "sizes, and enlarged by several scales before they were encoded.",
            "Beside them stands a codec that learned from the same far-away squares without a teacher, and linear "
            "codes of the same latent size and of the same latent budget: they say what of the gain is due to "
            "distillation, and what to spending more latents.",
        ]),
        Images("The same photograph", shots, "Click to enlarge."),
        Figure("Over scales", measured / "plots" / "psnr-128.png",
               "klt-budget spends at native size what remapping spends; the ceiling is what resizing alone leaves."),
        Text("What was found", [choice_in_words(found["choice"]), *in_words(found)]),
        Files("Everything else", files),
    ], Header("stillroom demo", lead="A codec's encoder, distilled on this machine, from nothing but the package."))


def path_words(folder: Path) -> str:
    from stillroom.settings.files import read_json

    info = read_json(folder / "run.json")
    return f"{info['steps']} steps of {info['recipe']} in {info['seconds']:.0f} s"

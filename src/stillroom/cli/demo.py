"""`stillroom demo`: a tour on embedded data. A small flow on digits; score distillation with and without its own score;
the two used together; and a page that shows all of it. What is finished already is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cli.flags import parse, take
from stillroom.recipes import find
from stillroom.settings import Optimizer

TARGET = "ring:8"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A tour in a few minutes: trains a small flow, distils it, and writes a page."""

    out: Path = Path("demo")
    """Where the runs and the page go. Runs that are finished are kept; others go on."""


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    settings = parse(Settings, arguments, "stillroom demo", Settings.__doc__ or "")
    runs = {name: made(settings.out / name, recipe, values, quiet) for name, recipe, values in tour(settings.out)}
    page = settings.out / "index.html"
    from stillroom.train.files import write_atomically

    write_atomically(page, the_page(runs))
    print(f"the tour's page: {page}\nits runs:        {', '.join(str(r) for r in runs.values())}")
    return 0


def tour(out: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(folder, recipe, settings) of each run, in order: the last one's teacher is the first."""
    points: dict[str, Any] = {"teacher": TARGET, "steps": 2000, "precision": "float32", "sample_every": 500}
    digits = {"data": "digits", "size": 8, "net": "dit", "width": 96, "depth": 4, "steps": 1200, "batch": 64,
              "model": Optimizer(lr=2e-3, clip=1.0, warmup=100, decay="cosine"), "sample_every": 400}
    particles = {"teacher": str(out / "digits"), "batch": 100, "conditional": True, "steps": 300, "spread": 1.0,
                 "times": (0.02, 0.9), "score": Optimizer(lr=5e-4, name="adam"),
                 "particles": Optimizer(lr=0.05, name="adam", decay="cosine"), "sample_every": 100}
    return [
        ("digits", "flow", digits), ("sds", "sds", points), ("vsd", "vsd", points), ("digits-vsd", "vsd", particles),
    ]


def made(folder: Path, recipe: str, values: Mapping[str, Any], quiet: bool) -> Path:
    """The run, from its start, from where it was stopped, or as it was left when it was finished."""
    from stillroom import train
    from stillroom.cli.progress import watch_for
    from stillroom.report import write_report

    if not (folder / "product").exists():
        watch = watch_for(quiet)
        if (folder / "settings.toml").exists():
            train.resume(folder, find, watch=watch)
        else:
            kind = find(recipe)
            train.start(kind, kind.Settings(out=folder, **values), recipe, watch=watch)
        write_report(folder)
    return folder


def the_page(runs: Mapping[str, Path]) -> str:
    from stillroom.report import Files, Header, Images, Panels, Table, Text, page, scatter

    header = Header("stillroom demo", lead="Distillation of generative models, on this machine, from nothing.")
    clouds = {name: points(runs[name]) for name in ("sds", "vsd")}
    return page("A tour", [
        Text("What happened", [
            "A small flow was trained on scikit-learn's 8x8 digits: the teacher. Then 512 points were moved to eight "
            "Gaussian modes by score distillation, twice. SDS follows the target's score alone, averaged over noise "
            "levels, and every point falls to where that average leads: the empty middle. VSD subtracts the score of "
            "the points themselves, which is learned as they move, and the points keep the target's modes and their "
            "spread. Last, VSD moved 100 noise images by the score of the digits teacher.",
            "Each run's own page has its curves, settings and samples.",
        ]),
        Panels("The same target, the same start", {"": scatter(clouds, target=truth())},
               "512 points each; the target's density in grey."),
        Table("How far from the target", *compared(clouds)),
        Images("Digits", [
            (last_sample(runs["digits"]), "The teacher's samples, 18 steps of Heun's method, ten classes in turn"),
            (last_sample(runs["digits-vsd"]), "Images moved from noise by VSD, ten classes in turn"),
        ]),
        Files("Runs", [(f"{name}/report.html", name, path_words(path), "") for name, path in runs.items()]),
    ], header)


def path_words(folder: Path) -> str:
    from stillroom.train.files import read_json

    info = read_json(folder / "run.json")
    return f"{info['steps']} steps of {info['recipe']} in {info['seconds']:.0f} s"


def points(folder: Path):
    from stillroom.train import load

    return load(folder)


def truth(count: int = 4000):
    """Samples of the target itself."""
    import torch

    return target().draw(count, torch.Generator().manual_seed(0))[0]


def target():
    from stillroom.flows import Mixture
    from stillroom.train.teacher import open_teacher

    mixture = open_teacher(TARGET).denoiser
    assert isinstance(mixture, Mixture)
    return mixture


def compared(clouds: Mapping[str, Any]) -> tuple[list[str], list[list[Any]], str]:
    from stillroom.measure import energy_distance, median_bandwidth, mmd2, modes

    reference, means = truth(), target().means
    bandwidth, spread = median_bandwidth(reference[:1000]), modes(reference, means).spread
    rows = [
        [name, float(mmd2(x, reference, bandwidth)), float(energy_distance(x, reference)),
         float(modes(x, means).spread / spread)]
        for name, x in {"fresh samples of the target": truth(512 + 4000)[4000:], **clouds}.items()
    ]
    return ["points", "squared MMD", "energy distance", "spread within a mode / true"], rows, (
        "Unbiased estimates against 4000 samples: they may fall below zero when the two laws are equal."
    )


def last_sample(folder: Path) -> Path:
    return sorted((folder / "samples").glob("step-*.png"))[-1]

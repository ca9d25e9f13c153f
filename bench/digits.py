"""One table of every way to few steps, on the digits: one teacher, one network for all students, as many updates of
each, and the same three rates to choose from.

    python bench/digits.py --place FOLDER [--jobs 2]

Of the digits' training pictures every fifth of each class is a validation set, which no student sees: it chooses the
rate, by the Fréchet distance of a run of seed 1. Runs of that rate with three other seeds are then held against the
test pictures by `stillroom compare`. What FOLDER holds already is used again. Writes digits.json and DIGITS.md.
"""

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from commands import stillroom
from compare import HERE, finite, folder_of, machine
from stillroom.claims.run import run_in
from stillroom.data import digits
from stillroom.data.builtin import every_fifth
from stillroom.measure import panel
from stillroom.recipes import find
from stillroom.recipes.features import MaskedFeatures
from stillroom.recipes.flow import FlowMatching
from stillroom.report.compare_runs import sheets
from stillroom.report.words import number
from stillroom.settings import Optimizer
from stillroom.train import load
from stillroom.train.loop import Diverged

UPDATES, BATCH, N = 400, 120, 2000
RATES = (3e-4, 1e-3, 3e-3)
CHOOSING, SEEDS = 1, (101, 102, 103)
STRENGTH = 1.5
"""Of guidance, for methods that are about it, and for dmd beside them; all others follow the teacher without."""
GAP: dict[str, Any] = {"steps": 2 * UPDATES, "every": 2}      # two updates of the fake score for one of the student
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "endpoint": ("endpoint", {"pairs": 2000}),
    "consistency": ("consistency", {}),
    "hyper-sd": ("hyper-sd", {}),
    "boot": ("boot", {}),
    "twinflow": ("twinflow", {"wait": 100}),
    "drifting": ("drifting", {"groups": 10, "support": 64}),
    "gdd": ("gdd", {}),
    "dmd": ("dmd", GAP),
    "sid": ("sid", {}),
    "swiftbrush": ("swiftbrush", {}),
    "disback": ("disback", {**GAP, "steps": 2 * UPDATES + 200, "record": 200, "kept": 3, "advance": 100}),
    "msd, 2 students": ("msd", {"steps": 2 * UPDATES, "students": 2, "options": ("every=2",)}),
    "decoupled-dmd, guided": ("decoupled-dmd", {**GAP, "guidance": STRENGTH}),
    "dmd, guided": ("dmd", {**GAP, "guidance": STRENGTH}),
    "dmd, 4 steps": ("dmd", {**GAP, "student_steps": 4}),
    "phased-dmd, 4 steps": ("phased-dmd", GAP),
    "guidance-lora": ("guidance-lora", {"guidance": STRENGTH}),
}
RESULT, PAGE = HERE / "digits.json", HERE / "DIGITS.md"


def parts() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """What is learned from, and the validation pictures."""
    source = digits(8, "train")
    assert source.y is not None
    aside = every_fifth(source.y)
    return (source.x[~aside], source.y[~aside]), source.x[aside]


def once(place: Path, name: str, recipe: type, given: Mapping[str, Any] | None, **settings: Any) -> Path:
    """The run of that name; one that was cut short begins anew."""
    out = place / name
    if (out / "product").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    return run_in(out, recipe, given, **settings)


def taught(place: Path) -> None:
    """The teacher, and the feature net, which has seen every digit but the test set's."""
    x, y = parts()[0]
    once(place, "teacher", FlowMatching, {"data": (x, y)}, data="given", size=8, net="dit", width=64, depth=2,
         steps=4000, seed=CHOOSING, model=Optimizer(lr=2e-3, clip=1.0, warmup=100, decay="cosine"))
    once(place, "features", MaskedFeatures, None, data="digits", size=8, blocks=(1, 1, 1), steps=1500, seed=CHOOSING)


def run_of(place: Path, method: str, rate: float, seed: int) -> Path:
    """A student, unless it is there: its optimizer is the recipe's own but for the rate. Of what learns beside it a
    score takes the same rate, and a critic its own."""
    torch.set_num_threads(1)
    word, settings = METHODS[method]
    recipe = find(word)
    told = {"teacher": str(place / "teacher"), "steps": UPDATES, "batch": BATCH, "average": 0.99, "seed": seed}
    told |= {field.name: dataclasses.replace(cast(Any, field.default_factory)(), lr=rate, warmup=50)
             for field in dataclasses.fields(recipe.Settings) if field.name in ("student", "score")}
    told |= {"data": "given", "size": 8} if recipe.inputs else {}
    given = {"data": parts()[0]} if recipe.inputs else None
    return once(place, f"{folder_of(method)}/{rate:g}-{seed}", recipe, given, **{**told, **settings})


def distance(place: Path, method: str, rate: float) -> float:
    """Of the run that chooses, to the validation pictures; infinite where its losses did not stay finite."""
    try:
        x = load(run_of(place, method, rate, CHOOSING)).sample(N, CHOOSING)
    except Diverged:
        return math.inf
    of = load(place / "features").eval()
    with torch.no_grad():
        return panel(of.pooled(x), of.pooled(parts()[1]))["frechet"]


def compared(place: Path, chosen: Mapping[str, float]) -> dict[str, Any]:
    """What compare.json holds."""
    lines = [f"{folder_of(m)}=" + ",".join(str(place / folder_of(m) / f"{rate:g}-{seed}") for seed in SEEDS)
             for m, rate in chosen.items()]
    stillroom("compare", *lines, "--data", "digits:test", "--heldout", "digits", "--size", "8", "--features",
              str(place / "features"), "--n", str(N), "--out", str(place / "compare"), "--device", "cpu")
    return json.loads((place / "compare/compare.json").read_text())


def measured(place: Path, jobs: int) -> dict[str, Any]:
    taught(place)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        asked = [(method, rate) for method in METHODS for rate in RATES]
        said = dict(zip(asked, pool.map(distance, *zip(*((place, *a) for a in asked), strict=True)), strict=True))
        chosen = {m: min(RATES, key=lambda rate: said[m, rate]) for m in METHODS}
        runs = [(place, m, rate, seed) for m, rate in chosen.items() for seed in SEEDS]
        list(pool.map(run_of, *zip(*runs, strict=True)))
    return {"command": "python bench/digits.py --place FOLDER", "machine": machine(), "chosen": chosen,
            "validation": {m: {f"{rate:g}": said[m, rate] for rate in RATES} for m in METHODS},
            "tables": [{"title": s.title, **of_runs(s.columns, s.rows()), "note": s.note}
                       for s in sheets(compared(place, chosen))]}


def of_runs(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Without what is of the process: runs go after and beside each other there, and perhaps beside other work."""
    kept = [i for i, name in enumerate(columns) if name not in ("wall time, s", "memory, GiB")]
    return {"columns": [columns[i] for i in kept], "rows": [[row[0], *(row[1 + i] for i in kept)] for row in rows]}


# ---- the page ----

def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
            *("| " + " | ".join(cell(value) for value in row) + " |" for row in rows)]


def cell(value: object) -> str:
    return number(value) if isinstance(value, int | float) else "" if value is None else str(value)


def page(found: Mapping[str, Any]) -> str:
    m, validation = found["machine"], found["validation"]
    rates = [[name, *(f"**{cell(d)}**" if float(rate) == found["chosen"][name] else cell(d)
                      for rate, d in said.items())] for name, said in validation.items()]
    lines = ["# Every way to few steps, on the digits", "",
             f"`{found['command']}`, which says how; {m['processor']}, torch {m['torch']}. {UPDATES} updates of "
             f"{BATCH} samples of every student, three seeds; what it cost is told in evaluations. Small networks "
             "on small pictures: an order here says little of another.", "", "## The rate", "",
             f"Fréchet distance to validation pictures, one run (seed {CHOOSING}) of each; the least is chosen, and "
             "none stands where losses did not stay finite.", "",
             *table(["", *next(iter(validation.values()))], rates)]
    for t in found["tables"]:
        lines += ["", f"## {t['title']}", "", *table(["", *t["columns"]], t["rows"]), "", t["note"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    found = finite(measured(asked.place.resolve(), asked.jobs))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))

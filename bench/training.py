"""What students of the bundled teacher come to on photographs: by their size, by the resolution they learn at, and by
the terms of their loss. Each row is one run of `stillroom distill encoder` in a process of its own.

    STILLROOM_DATA=DATA python bench/training.py [sizes] [resolutions] [losses] [seeds]

    ... python bench/training.py times [sizes] [resolutions]

DATA holds bsds500/train, which the students learn from, and bsds500/val, on whose photographs at native size they are
judged. They learn by the squared error, where no row says otherwise; the recipe's default was chosen by the table of
losses. Writes training/NAME.json and TRAINING.md; rows that a file holds already are kept. Then `times` measures the
time of a step, each row in turn and twice round, on a machine that should do nothing else: tables without it show none.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compare import HERE, machine
from stillroom.codecs import Codec
from stillroom.data import pictures
from stillroom.measure import high_frequency_ratio, psnr
from stillroom.recipes.encoder import EncoderDistillation, Settings, Weights
from stillroom.settings import from_mapping
from stillroom.train import Silent, load, start
from stillroom.train.folder import read_rows
from stillroom.train.teacher import open_codec

STEPS, BATCH, SEED = 2000, 16, 1
TIMED = 40         # steps of a row of `times`
RESULTS, PAGE = HERE / "training", HERE / "TRAINING.md"
PLAIN: dict[str, dict[str, float]] = {
    "mse": {"huber": 0.0, "mse": 1.0}, "l1": {"huber": 0.0, "l1": 1.0}, "huber": {"huber": 1.0}}
MSE = PLAIN["mse"]
COMMON = {"teacher": "bundled", "crop": "shrink", "shrink": [1.0, 5.0], "size": 64, "steps": STEPS, "batch": BATCH,
          "seed": SEED, "params": 300_000, "precision": "bfloat16", "flip": True, "weights": MSE}
SMALL = {"steps": 1500, "params": 100_000}
TABLES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sizes": (
        f"Students by size: {STEPS} steps of {BATCH} squares of 64 pixels. The bound: 0.3M within 0.7 dB of the "
        "teacher.",
        {f"{p / 1e6:g}M, {stem}": {"params": p, "stem": stem}
         for p, stem in ((20_000, "unshuffle"), (100_000, "unshuffle"), (300_000, "unshuffle"), (300_000, "conv"))},
    ),
    "resolutions": (
        "Students of 0.3M by the size of the squares they learn from: 1500 steps of 8, so that only the size differs; "
        "and at 64 pixels, from pictures taken far away (shrunk 3.5 to 5 times), or with as many pixels as at 256.",
        {
            "64 px": {"size": 64, "steps": 1500, "batch": 8},
            "128 px": {"size": 128, "steps": 1500, "batch": 8, "shrink": [1.0, 2.5]},
            "256 px": {"size": 256, "steps": 1500, "batch": 8, "shrink": [1.0, 1.25]},
            "64 px, shrunk 3.5 to 5": {"size": 64, "steps": 1500, "batch": 8, "shrink": [3.5, 5.0]},
            "64 px, 128 squares a step": {"size": 64, "steps": 1500, "batch": 128},
        },
    ),
    "losses": (
        "Students of 0.1M by the terms of their loss: 1500 steps of 16 squares of 64 pixels.",
        {
            name: SMALL | {"weights": weights} | more
            for name, weights, more in (
                *((name, weights, {}) for name, weights in PLAIN.items()),
                ("mse + statistics", MSE | {"statistics": 1.0}, {}),
                ("mse + features", MSE | {"features": 0.3}, {}),
                ("mse + pixels", MSE | {"pixels": 1.0}, {}),
                ("mse + blur", MSE | {"blur": 0.3}, {}),
                ("pixels alone", {"huber": 0.0, "pixels": 1.0}, {}),
                ("mse, with moments", MSE | {"logvar": 0.01}, {"moments": True}),
                ("kl", {"huber": 0.0, "logvar": 0.0, "kl": 0.1}, {"moments": True}),
                ("wasserstein", {"huber": 0.0, "logvar": 0.0, "wasserstein": 1.0}, {"moments": True}),
            )
        },
    ),
    "seeds": (
        "The plain losses again with two more seeds: what a difference in the table of losses is worth.",
        {f"{name}, seed {seed}": SMALL | {"weights": weights, "seed": seed}
         for name, weights in PLAIN.items() for seed in (1, 2, 3)},
    ),
}


def judged(codec: Codec, teacher: Codec, folder: Path) -> dict[str, float]:
    """On photographs as they are: means over pictures."""
    sums: dict[str, float] = {}
    found = 0
    with torch.inference_mode():
        for _, x in pictures(str(folder)):
            x, found = x[None], found + 1
            mine, theirs = codec.encode(x), teacher.encode(x)
            again, reference = (teacher.decode(z, (x.shape[-2], x.shape[-1])).clamp(-1, 1) for z in (mine, theirs))
            values = {
                "PSNR, dB": float(psnr(again, x)[0]),
                "teacher's PSNR, dB": float(psnr(reference, x)[0]),
                "nMSE": float(((mine - theirs).square() / theirs.var((0, 2, 3)).view(-1, 1, 1)).mean()),
                "deviation / teacher's": float((mine.std((0, 2, 3)) / theirs.std((0, 2, 3))).mean()),
                "high frequencies": float(high_frequency_ratio(again, x)[0]),
                "teacher's high frequencies": float(high_frequency_ratio(reference, x)[0]),
            }
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
    return {"pictures": found} | {name: total / found for name, total in sums.items()}


def begun(values: dict[str, Any], data: Path, place: str) -> Path:
    """The run, in this process."""
    weights = from_mapping(Weights, values.pop("weights", {}), "weights")
    settings = from_mapping(Settings, values | {"out": f"{place}/run", "data": str(data / "bsds500/train")}, "bench")
    return start(EncoderDistillation, replace(settings, weights=weights), "encoder", watch=Silent())


def one(values: dict[str, Any], data: Path) -> dict[str, Any]:
    """A run and its judgement, in this process, which does nothing else: its peak memory is the run's."""
    with tempfile.TemporaryDirectory() as place:
        before = time.perf_counter()
        out = begun(values, data, place)
        seconds = time.perf_counter() - before
        peak, codec = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, load(out)
        info = json.loads((out / "run.json").read_text())
    return {
        "parameters": sum(p.numel() for p in codec.encoder.parameters()), "steps": info["steps"],
        "seconds": seconds, "peak memory, GB": peak / 1e9,
        **judged(codec, open_codec("bundled"), data / "bsds500/val"),
    }


def pace(values: dict[str, Any], data: Path) -> dict[str, Any]:
    """Of some steps after the first ones, which the run's own rows of metrics tell."""
    with tempfile.TemporaryDirectory() as place:
        out = begun(values | {"steps": TIMED, "log_every": TIMED // 4}, data, place)
        rows = read_rows(out / "metrics.jsonl")
    return {"ms per step": min(1e3 / row["steps_per_second"] for row in rows[1:])}


def apart(mode: str, values: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
    said = subprocess.run([sys.executable, __file__, mode, json.dumps(values)], check=True, stdout=subprocess.PIPE,
                          text=True)
    return json.loads(said.stdout.splitlines()[-1])


def run(name: str) -> None:
    about, rows = TABLES[name]
    result = {"title": about, "command": f"python bench/training.py {name}", "machine": machine(), "rows": {}}
    if (file := RESULTS / f"{name}.json").exists():
        result["rows"] = json.loads(file.read_text())["rows"]
    for title, changes in rows.items():
        if title not in result["rows"]:
            result["rows"][title] = apart("--one", COMMON | changes)
            print(title, result["rows"][title], flush=True)
            write(name, result)


def write(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def times(name: str) -> None:
    """The lesser of two measurements, between which those of all other rows lie."""
    result, rows = json.loads((RESULTS / f"{name}.json").read_text()), TABLES[name][1]
    taken = [{title: apart("--pace", COMMON | rows[title])["ms per step"] for title in result["rows"]}
             for _ in range(2)]
    for title, row in result["rows"].items():
        row["ms per step"] = min(t[title] for t in taken)
    write(name, result | {"times": machine()})


COLUMNS = {
    "parameters": ",d", "peak memory, GB": ".2f", "PSNR, dB": ".2f", "teacher's PSNR, dB": ".2f",
    "nMSE": ".4f", "deviation / teacher's": ".3f", "high frequencies": ".3f", "teacher's high frequencies": ".3f",
}


def page() -> str:
    lines = ["# Students of the bundled teacher on photographs", "",
             "Generated by `python bench/training.py`, which says what the columns are. One seed, chosen before, but "
             "for the table of seeds: differences under 0.1 dB say nothing.", ""]
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        m = result.get("times", result["machine"])
        columns = COLUMNS | ({"ms per step": ".0f"} if "times" in result else {})
        lines += [f"## {file.stem}", "", result["title"], "",
                  f"`{result['command']}`; {m['processor']}, {m['threads']} threads, torch {m['torch']}; "
                  f"load {m['load'][0]} at the start.", "",
                  "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += ["| " + " | ".join([title, *(format(row[c], f) for c, f in columns.items())]) + " |"
                  for title, row in result["rows"].items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if "STILLROOM_DATA" not in os.environ:
        sys.exit("set STILLROOM_DATA to the folder that holds bsds500")
    data = Path(os.environ["STILLROOM_DATA"])
    if sys.argv[1:2] in (["--one"], ["--pace"]):
        print(json.dumps({"--one": one, "--pace": pace}[sys.argv[1]](json.loads(sys.argv[2]), data)))
    else:
        timed = sys.argv[1:2] == ["times"]
        for name in sys.argv[1 + timed:] or TABLES:
            (times if timed else run)(name)
        PAGE.write_text(page())

"""One step from a CIFAR-10 latent teacher: drifting beside endpoint regression, consistency and DMD, in the latents of
a representation autoencoder and of a KL codec that are trained here.

    STILLROOM_DATA=DATA python bench/onestep.py rae|kl --place FOLDER

DATA holds cifar10-jpeg/{train,test}.parquet. What FOLDER holds already (codec, latents, teacher, features, finished
students) is used again. Every student is looked at on its way: seconds of the processor so far, which do not see
neighbours, looks not counted, and the Fréchet distance and coverage of 2000 decoded samples against training pictures,
in pooled features of a net that knew no latents. Four methods learn at three rates each, of which the distance to other
training pictures chooses; those learn from one more seed, on the same teacher. Writes onestep/SPACE.json and
ONESTEP.md. Seeds were chosen before.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from commands import cifar, command
from compare import HERE, finite, machine
from stillroom.codecs import Codec
from stillroom.data import Source, open_source
from stillroom.flows import Flow
from stillroom.measure import panel, trajectories
from stillroom.paths import uniform_grid
from stillroom.recipes.consistency import Consistency
from stillroom.recipes.dmd import DMD
from stillroom.recipes.drifting import Drifting
from stillroom.recipes.endpoint import Endpoint
from stillroom.settings import Images, Optimizer
from stillroom.train import Silent, load, start

STEPS, BATCH, SEED, N = 600, 128, 1, 2000
LOOKS = (100, 200, 400, 600)
RATE = Optimizer(lr=3e-4, clip=1.0, warmup=100)
RATES = (1e-4, 3e-4, 1e-3)          # each takes the four methods half an hour to an hour
FOUR = ("drifting", "endpoint", "consistency", "DMD")
SEEDS = (SEED, 2)                   # each takes the students an hour or more
RESULTS, PAGE = HERE / "onestep", HERE / "ONESTEP.md"
CODECS = {
    "rae": ["--preset", "rae", "--patch", "4", "--own.width", "96", "--own.depth", "4", "--encoder-steps", "1200",
            "--steps", "1200", "--perceptual", "0.1", "--batch", "32"],
    "kl": ["--preset", "kl", "--factor", "4", "--channels", "4", "--params", "400000", "--decoder-params", "600000",
           "--crop", "centre", "--steps", "3000", "--batch", "32"],
}
NETS = {"rae": ["--net", "ddt", "--width", "64", "--depth", "4", "--head-width", "128"],      # of 96 numbers a token
        "kl": ["--net", "dit", "--width", "96", "--depth", "4"]}
TEACHER = ["--patch", "1", "--batch", "64", "--steps", "3000", "--model.decay", "cosine"]
COLUMNS = {"frechet": ".2f", "precision": ".3f", "recall": ".3f", "density": ".3f", "coverage": ".3f"}


class Judge:
    """Distances of decoded latents to pictures."""

    def __init__(self, codec: Codec, features: Any):
        self.codec, self.features = codec, features
        self.train, self.choosing, self.test = (
            self.of(pictures(cifar(split), rows)) for split, rows in
            (("train", slice(10_000)), ("train", slice(10_000, 15_000)), ("test", slice(N))))

    @torch.inference_mode()
    def of(self, x: Tensor) -> Tensor:
        return torch.cat([self.features.pooled(part) for part in x.split(250)])

    @torch.inference_mode()
    def decoded(self, z: Tensor) -> Tensor:
        return torch.cat([self.codec.decode(part).clamp(-1, 1) for part in z.split(250)])

    def seen(self, z: Tensor) -> dict[str, float]:
        return kept(panel(self.of(self.decoded(z)), self.train))

    def chooses(self, z: Tensor) -> float:
        return panel(self.of(self.decoded(z)), self.choosing)["frechet"]

    def floors(self, encoded: Tensor) -> dict[str, dict[str, float]]:
        return {"real pictures of the test split": kept(panel(self.test, self.train)),
                "the same through the codec": self.seen(encoded)}


def kept(figures: dict[str, float]) -> dict[str, float]:
    return {name: figures[name] for name in COLUMNS}


def opened(place: str) -> Source:
    return cast(Source, open_source(Images(data=place, size=32)))


def pictures(file: str, rows: slice) -> Tensor:
    """Of a shuffled order."""
    source = opened(file)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[rows]
    return source.fetch(chosen.sort().values.tolist(), 0).x


def students(teacher: str, latents: str, features: str, rate: Optimizer = RATE,
             seed: int = SEED) -> dict[str, tuple[type, dict]]:
    shared = {"teacher": teacher, "steps": STEPS, "batch": BATCH, "seed": seed, "student": rate, "average": 0.99,
              "precision": "float32", "device": "cpu"}
    data = {"data": latents, "size": 32}
    drifting = {**shared, **data, "groups": 4, "support": 64}
    return {
        "drifting": (Drifting, drifting),
        "drifting, teacher's samples": (Drifting, {**drifting, "positives": "teacher", "teacher_samples": 2000}),
        "drifting, feature net": (Drifting, {**drifting, "taps": ("identity", "features"), "features": features}),
        "endpoint": (Endpoint, {**shared, "pairs": 2000}),
        "consistency": (Consistency, {**shared, **data}),
        "DMD": (DMD, {**shared, "every": 2, "score": rate}),
    }


def distilled(recipe: type, settings: dict[str, Any], out: Path, judge: Judge) -> list[dict[str, float]]:
    """The looks at a run on its way; of a finished one they lie beside its product."""
    looks = out / "looks.json"
    if looks.exists():
        return json.loads(looks.read_text())
    shutil.rmtree(out, ignore_errors=True)
    rows, looking, begun = [], 0.0, time.process_time()

    class Looked(recipe):
        def after(self, batch, turn):
            nonlocal looking
            super().after(batch, turn)
            if turn.step + 1 in LOOKS:
                now = time.process_time()
                made = self.generator() if hasattr(self, "generator") else self.mean.module
                z = made.sample(N, SEED)
                rows.append({"step": turn.step + 1, "seconds": now - begun - looking} | judge.seen(z))
                looking += time.process_time() - now

    start(Looked, recipe.Settings(out=out, **settings), recipe.__name__.lower(), watch=Silent())
    looks.write_text(json.dumps(finite(rows)))
    return rows


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it made, or what the file kept of that."""
    if not file.exists():
        file.write_text(json.dumps(finite(make())))
    return json.loads(file.read_text())


def of_teacher(flow: Flow, judge: Judge, encoded: Tensor) -> dict[str, Any]:
    noise = torch.randn(256, *flow.shape, generator=torch.Generator().manual_seed(SEED))
    bends = trajectories(lambda x, t: flow.denoiser.v(x, t, flow.labels(0, 256)), noise, uniform_grid(50))
    return {"floors": judge.floors(encoded), "straightness": bends.straightness,
            "teacher": {str(k): judge.seen(flow.sample(N, SEED, steps=k)) for k in (50, 18, 8, 2, 1)}}


def median_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def measured(space: str, place: Path) -> dict[str, Any]:
    train = ["--data", cifar("train"), "--size", "32"]
    codec = command(place / "codec", "train", "codec", *train, "--flip", *CODECS[space])
    latents = command(place / "latents", "cache", *train, "--codec", str(codec))
    encoded = command(place / "test", "cache", "--data", cifar("test"), "--size", "32",
                      "--codec", str(codec))
    taught = command(place / "teacher", "train", "flow", "--data", str(latents), "--size", "32", *NETS[space], *TEACHER)
    features = command(place / "features", "train", "features", "--data", str(latents), "--size", "32", "--width", "16",
                       "--patch", "1", "--steps", "600")
    pixels = command(place.parent / "judge", "train", "features", *train, "--flip", "--width", "16",
                     "--steps", "1000")
    judge = Judge(cast(Codec, load(codec)), load(pixels).eval())
    flow, held = load(taught), opened(str(encoded))
    assert isinstance(flow, Flow)
    result: dict[str, Any] = {"command": f"python bench/onestep.py {space} --place FOLDER", "machine": machine(),
                              "latents": list(flow.shape)}
    result |= once(place / "taught.json", lambda: of_teacher(flow, judge, held.fetch(range(N), 0).x))
    print(json.dumps(finite(result)), flush=True)
    result["students"] = {}
    runs = str(taught), str(latents), str(features)
    for name, (recipe, settings) in students(*runs).items():
        result["students"][name] = distilled(recipe, settings, place / "students" / folder_of(name), judge)
        print(name, result["students"][name], flush=True)
    result["rates"] = {name: {f"{lr:g}": at(place, name, lr, runs, judge) for lr in RATES} for name in FOUR}
    chosen = {name: least(by_rate) for name, by_rate in result["rates"].items()} | {"drifting, feature net": RATE.lr}
    result["chosen"] = chosen
    result["seeds"] = [{name: at(place, name, lr, runs, judge, seed) for name, lr in chosen.items()} for seed in SEEDS]
    one = load(place / "students/drifting")
    result["seconds for 64 pictures"] = {
        "1 step": median_seconds(lambda: judge.decoded(one.sample(64, SEED))),
        "50 steps": median_seconds(lambda: judge.decoded(flow.sample(64, SEED, steps=50)), 3),
        "decoding alone": median_seconds(lambda: judge.decoded(held.fetch(range(64), 0).x)),
    }
    return finite(result)


def at(place: Path, name: str, lr: float, runs: tuple[str, str, str], judge: Judge, seed: int = SEED) -> dict[str, Any]:
    """What chooses, and the last look."""
    recipe, settings = students(*runs, dataclasses.replace(RATE, lr=lr), seed)[name]
    out = place / "students" / (folder_of(name) + ("" if lr == RATE.lr else f"-{lr:g}")
                                + ("" if seed == SEED else f"-seed{seed}"))
    last = distilled(recipe, settings, out, judge)[-1]
    found = {"chooses": judge.chooses(load(out).sample(N, SEED)), **last}
    print(name, lr, seed, found, flush=True)
    return found


def least(by_rate: dict[str, dict[str, float]]) -> float:
    """The rate whose samples come nearest to the pictures that choose."""
    return float(min(by_rate, key=lambda rate: by_rate[rate]["chooses"]))


def folder_of(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace("'", "")


def reached(rows: list[dict[str, float]], bound: float) -> str:
    """The first look at which the distance is at most that of another."""
    found = next((r for r in rows if r["frechet"] <= bound), None)
    return "not reached" if found is None else f"{found['seconds']:.0f} s"


def page() -> str:
    lines = ["# One step from a CIFAR-10 latent teacher", "",
             "Generated by `python bench/onestep.py`, which says how. One teacher a space, and but for the last table "
             "one seed of the student: small differences say nothing. `frechet` and the others are in features learned "
             f"here, and compare with nothing elsewhere. All students learn at one rate, {RATE.lr:g}, chosen for none "
             "of them, but where a table says otherwise.", ""]
    for file in sorted(RESULTS.glob("*.json")):
        r = json.loads(file.read_text())
        m, looked = r["machine"], r["students"]
        eight, endpoint = r["teacher"]["8"]["frechet"], looked["endpoint"][-1]["frechet"]
        lines += [f"## {file.stem}: latents {' x '.join(map(str, r['latents']))}", "",
                  f"`{r['command']}`; {m['processor']}, {m['threads']} threads, torch {m['torch']}; straightness of "
                  f"the teacher {r['straightness']:.3f}.", "",
                  "| | steps | seconds | " + " | ".join(COLUMNS) + " | endpoint's distance after | teacher-8's after |",
                  "|---" * (len(COLUMNS) + 5) + "|"]
        rows = [(name, "", "", figures, "", "") for name, figures in r["floors"].items()]
        rows += [(f"teacher, {k} steps", "", "", figures, "", "") for k, figures in r["teacher"].items()]
        rows += [(name, f"{seen[-1]['step']}", f"{seen[-1]['seconds']:.0f}", seen[-1], reached(seen, endpoint),
                  reached(seen, eight)) for name, seen in looked.items()]
        lines += ["| " + " | ".join([name, steps, seconds, *(format(figures[c], f) for c, f in COLUMNS.items()), a, b])
                  + " |" for name, steps, seconds, figures, a, b in rows]
        lines += ["", "Seconds are of the processor and include what a method prepares (pairs, samples, banks). Every "
                  "second step of DMD moves its student. The same students on their way, Fréchet distance after so "
                  "many steps:", "",
                  "| | " + " | ".join(map(str, LOOKS)) + " |",
                  "|---" * (len(LOOKS) + 1) + "|"]
        lines += ["| " + " | ".join([name, *(f"{row['frechet']:.2f} ({row['seconds']:.0f} s)" for row in seen)]) + " |"
                  for name, seen in looked.items()]
        lines += of_rates(r["rates"]) + of_seeds(r["seeds"], r["chosen"])
        drawn = r["seconds for 64 pictures"]
        lines += ["", "64 pictures, decoded: " + ", ".join(f"{what} {s:.2f} s" for what, s in drawn.items()) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def of_rates(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    rates = list(next(iter(found.values())))
    lines = ["", f"At three rates: Fréchet distance after {STEPS} steps, and behind it that to 5000 other training "
             "pictures, whose least chooses.", "", "| | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for name, by_rate in found.items():
        least = min(at["chooses"] for at in by_rate.values())
        cells = [(f"{at['frechet']:.2f} ({at['chooses']:.2f})", "**" * (at["chooses"] == least))
                 for at in by_rate.values()]
        lines.append("| " + " | ".join([name, *(f"{mark}{cell}{mark}" for cell, mark in cells)]) + " |")
    return lines


def of_seeds(found: list[dict[str, dict[str, float]]], chosen: dict[str, float]) -> list[str]:
    lines = ["", f"At the rate so chosen (with a feature net at {RATE.lr:g}, the only one), seeds "
             f"{', '.join(map(str, SEEDS))} of the student: Fréchet distance after {STEPS} steps, and coverage.", "",
             "| | rate | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean +- sd |",
             "|---" * (len(SEEDS) + 3) + "|"]
    for name, lr in chosen.items():
        far = [seed[name]["frechet"] for seed in found]
        cells = [f"{seed[name]['frechet']:.2f} ({seed[name]['coverage']:.3f})" for seed in found]
        spread = f"{statistics.mean(far):.2f} +- {statistics.stdev(far):.2f}"
        lines.append("| " + " | ".join([name, f"{lr:g}", *cells, spread]) + " |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("space", choices=CODECS)
    parser.add_argument("--place", type=Path, required=True)
    asked = parser.parse_args()
    found = measured(asked.space, asked.place)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{asked.space}.json").write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page())

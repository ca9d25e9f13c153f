"""How long a person waits for `stillroom --help` and `stillroom recipes`, in a new process each time."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compare import bench, interleave, row

LIMIT = 0.4
"""Seconds."""
HEAVY = {"torch", "numpy", "diffusers", "datasets"}

BIN = Path(sys.executable).parent
FLOOR, TORCH, PEER = "python -c pass", "python -c 'import torch'", "accelerate --help"
OURS = {name: [str(BIN / "stillroom"), word] for name, word in
        (("stillroom --help", "--help"), ("stillroom recipes", "recipes"))}
OTHERS = {FLOOR: [sys.executable, "-c", "pass"], TORCH: [sys.executable, "-c", "import torch"],
          PEER: [str(BIN / "accelerate"), "--help"]}


def call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stderr


def imported(command: Sequence[str]) -> set[str]:
    """Top-level names of the modules that a console script imports."""
    lines = call([sys.executable, "-X", "importtime", *command]).splitlines()
    return {x.rpartition("|")[2].strip().partition(".")[0] for x in lines if x.startswith("import time:")}


def run(quick: bool) -> tuple[list[dict], list[str]]:
    notes = []
    for name, command in OURS.items():
        modules = imported(command)
        assert "stillroom" in modules, f"{name}: the list of imports is not that of stillroom"
        if heavy := modules & HEAVY:
            raise SystemExit(f"{name} imports {', '.join(sorted(heavy))}")
        notes.append(f"`{name}` imports {len(modules)} top-level modules; not {', '.join(sorted(HEAVY))}.")
    runs = {name: lambda c=command: call(c) for name, command in (OTHERS | OURS).items()}
    samples = interleave(runs, 3 if quick else 9)
    floor = FLOOR, samples[FLOOR]
    rows = [row(FLOOR, samples[FLOOR])]
    rows += [row(name, samples[name], below=LIMIT) for name in OURS]
    rows += [row(f"{name}, against the floor", samples[name], floor) for name in (*OURS, TORCH, PEER)]
    return rows, notes


if __name__ == "__main__":
    bench("Start of the command line", run)

"""What `--plan` foretells of a step and of the peak of memory, beside what the run then takes."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from compare import Figure, bench, row

STEPS, SHARE = 60, 0.2
BIN = str(Path(sys.executable).parent / "stillroom")
ON_DIGITS = ["--teacher", "teacher", "--data", "digits", "--size", "8"]
COMMANDS = {
    "train flow": ["--data", "digits", "--size", "8", "--net", "dit", "--width", "96", "--depth", "4"],
    "distill dmd": ["--teacher", "teacher"],
    "distill drifting": ON_DIGITS,
    "distill hyper-sd": ON_DIGITS,
    "distill encoder": ["--teacher", "bundled", "--data", "photos"],
}


def said(place: Path, *words: str) -> str:
    done = subprocess.run([BIN, *words, "--quiet"], capture_output=True, text=True, cwd=place)
    if done.returncode:
        raise SystemExit(f"stillroom {' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def once(place: Path, command: str, k: int) -> dict[str, tuple[float, float]]:
    """(planned, taken) of a step's seconds and of GiB."""
    words = [*command.split(), *COMMANDS[command], "--steps", str(STEPS), "--precision", "float32"]
    told = said(place, *words, "--out", "planned", "--plan")
    out = f"{command.replace(' ', '-')}-{k}"
    said(place, *words, "--out", out)
    record = json.loads((place / out / "run.json").read_text())
    stages = [(int(steps), float(ms)) for steps, ms in re.findall(r"(\d+) steps of ([\d.]+) ms", told)]
    planned = sum(steps * ms for steps, ms in stages) / 1e3 / record["steps"]
    return {"seconds": (planned, record["seconds"] / record["steps"]),
            "GiB": (number(told, r"memory +([\d.]+) GiB"), record["memory_gib"])}


def within(ratio: Figure) -> str:
    met, missed = (ratio.verdict(1 + SHARE, None), ratio.verdict(None, 1 - SHARE))
    return "met" if (met, missed) == ("met", "met") else "missed" if "missed" in (met, missed) else "open"


def run(quick: bool) -> tuple[list[dict], list[str]]:
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        said(place, "train", "flow", *COMMANDS["train flow"], "--steps", "400", "--out", "teacher")
        for command in COMMANDS:
            tried = [once(place, command, k) for k in range(2 if quick else 6)]
            planned, taken = zip(*(each["seconds"] for each in tried), strict=True)
            of_step = row(f"{command}: a step of the run", taken, ("planned", planned))
            rows += [row(f"{command}: a step as planned", planned), of_step]
            peaks = sorted(b / a for a, b in (each["GiB"] for each in tried))
            notes.append(f"{command}: time within {SHARE:.0%} of the plan: {within(of_step['ratio'])}; the peak of "
                         f"memory was {peaks[0]:.2f} to {peaks[-1]:.2f} times what was planned.")
    return rows, notes


if __name__ == "__main__":
    bench("--plan: what was foretold, and what it took", run)

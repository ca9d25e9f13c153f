"""What every bench shares: contenders interleaved (A B A B), medians with 95 % intervals, ratios, results on disk.

The round is the unit. A round runs each contender once, so what slows the machine down slows them all, and a ratio
compares what stood side by side.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
LEVEL = 0.95
UNBOUNDED = (-math.inf, math.inf)


# ---- measuring ----

def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the first `warmup` rounds are run and left out."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


RESIDENT = """
def resident(what):         # VmHWM; not getrusage, whose maximum is inherited from the process that started this one
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])
"""


def peak_of(code: str) -> float:
    """GB that code for another interpreter prints of itself; it may ask for `resident("VmHWM")`."""
    said = subprocess.run([sys.executable, "-c", RESIDENT + code], capture_output=True, text=True, check=True)
    return int(said.stdout) / 1e9


# ---- figures ----

class Figure(NamedTuple):
    value: float
    low: float
    high: float

    def verdict(self, below: float | None, above: float | None) -> str:
        """"met" or "missed" only where the whole interval lies on that side of the bound."""
        if below is not None:
            return "met" if self.high < below else "missed" if self.low >= below else "open"
        if above is not None:
            return "met" if self.low > above else "missed" if self.high <= above else "open"
        return ""


def tail(n: int, k: int) -> float:
    """P(Binomial(n, 1/2) < k)."""
    return sum(math.comb(n, i) for i in range(k)) / 2**n


def median(samples: Sequence[float]) -> Figure:
    """With the interval between the k-th lowest and the k-th highest sample, which needs no distribution: the true
    median lies outside it with probability 2 P(Binomial(n, 1/2) < k). Below 6 samples no pair reaches 95 %."""
    n, ordered = len(samples), sorted(samples)
    k = sum(2 * tail(n, j) <= 1 - LEVEL for j in range(1, n // 2 + 1))  # tail grows with j: the last that fits
    bounds = (ordered[k - 1], ordered[n - k]) if k else UNBOUNDED
    return Figure(statistics.median(samples), *bounds)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """The median of the ratios of the rounds, whose two sides stand next to each other in time: a machine that slows
    down slows both. With the interval of a median."""
    a, b = np.asarray(ours), np.asarray(theirs)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} samples against {len(b)}: a ratio wants both sides of each round")
    return median((a / b).tolist())


def row(name: str, samples: Sequence[float], against: tuple[str, Sequence[float]] | None = None,
        below: float | None = None, above: float | None = None, inverse: bool = False) -> dict[str, Any]:
    """A contender in seconds. The bound is on the ratio where there is one, else on the median.

    inverse: the ratio says how many times faster, not how many times slower.
    """
    time_taken, times = median(samples), None
    if against is not None:
        times = ratio(against[1], samples) if inverse else ratio(samples, against[1])
    judged = time_taken if times is None else times
    return {
        "name": name, "median": time_taken, "against": against and against[0], "ratio": times,
        "below": below, "above": above, "verdict": judged.verdict(below, above), "samples": list(samples),
    }


# ---- keeping ----

def folder_of(name: str) -> str:
    """Of a row that has a name for people."""
    return name.replace(", ", "-").replace(" ", "-")


def machine() -> dict[str, Any]:
    import torch

    from stillroom.train.folder import machine as described

    return described(torch.device("cpu")) | {"load": [round(x, 2) for x in os.getloadavg()]}


def finite(thing: Any) -> Any:
    """JSON knows no infinity: an end that does not exist is null."""
    if isinstance(thing, dict):
        return {k: finite(v) for k, v in thing.items()}
    if isinstance(thing, list | tuple):
        return [finite(v) for v in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


def bench(title: str, run: Callable[[bool], tuple[list[dict], list[str]]]) -> None:
    """The command line of one bench. `run(quick)` gives its rows and what else there is to say."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="a smoke run of three rounds: no intervals")
    parser.add_argument("--out", type=Path, help="folder of the results; bench/results, or nowhere with --quick")
    asked = parser.parse_args()
    name, before, start = Path(parser.prog).stem, machine(), time.perf_counter()
    rows, notes = run(asked.quick)
    result = {
        "title": title, "command": f"python bench/{name}.py" + (" --quick" if asked.quick else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.perf_counter() - start),
        "machine": before, "load after": [round(x, 2) for x in os.getloadavg()],
        "rounds": len(rows[0]["samples"]), "rows": rows, "notes": notes,
    }
    result = finite(result)
    print("\n".join(markdown(result)), flush=True)
    if out := asked.out or (None if asked.quick else HERE / "results"):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def spread(figure: Sequence[float | None], scale: float, digits: int) -> str:
    value, low, high = (None if x is None else f"{x * scale:.{digits}f}" for x in figure)
    return f"{value}" + (f" ({low} to {high})" if low and high else "")


def bound(row: Mapping[str, Any]) -> str:
    for word in ("below", "above"):
        if (x := row[word]) is not None:
            return f"{word} {x:g}" if row["ratio"] else f"{word} {1e3 * x:g} ms"
    return ""


def markdown(result: Mapping[str, Any]) -> list[str]:
    m = result["machine"]
    lines = [
        f"## {result['title']}", "",
        f"`{result['command']}`, {result['date'][:10]}, {result['rounds']} rounds, {result['seconds']} s; "
        f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}; "
        f"load {m['load'][0]} before, {result['load after'][0]} after.", "",
        "| what | median, ms (95 %) | ratio (95 %) | to | bound | verdict |", "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        times = spread(r["ratio"], 1, 3) if r["ratio"] else ""
        time_taken = spread(r["median"], 1e3, 1 if r["median"][0] > 0.02 else 2)
        cells = [r["name"], time_taken, times, r["against"] or "", bound(r), r["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *(f"- {note}" for note in result["notes"]), ""]


def regenerate(folder: Path = HERE / "results", page: Path = HERE / "RESULTS.md") -> None:
    lines = ["# Bench results", "", "Generated by `python bench/run.py`; how to read them is in README.md.", ""]
    for path in sorted(folder.glob("*.json")):
        lines += markdown(json.loads(path.read_text(encoding="utf-8")))
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")

"""docs/claims.md, from the claims' files and the stored results: nothing on the page is written by hand."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.claims import Entry, listing, stored

HEAD = """# Claims

Each method states what it can show on a laptop, as an experiment with controls, seeds and a margin. The verdict is
computed from the measured values, which are stored with the package; this page is generated from them by
`stillroom claims docs`. How a verdict comes about:

- A *check* is a margin, taken within each seed, that is positive where the statement is true.
- It **holds** if Student's t interval of the margin over the seeds (95 %) lies above zero, **does not hold** if it lies
  below, and is **mixed** otherwise. A single seed has no interval: it can refute, not establish.
- The claim holds if all checks of all its subjects hold, does not hold if one does not, and is mixed otherwise.
- The *null* arm is the method with its objective's gradient zeroed. It stands before the same checks, and must fail
  them (*does not hold*); otherwise the claim is invalid.
- `stillroom claims picture NAME --out FILE.png` draws the clouds of each arm of `vsd` and of `dmvae-toy`.
"""

ROUNDING = 1e-9
"""Of a mean: deviations below it are of sums that were taken in another order."""


def page() -> str:
    entries = listing()
    rows = [[f"[{e.name}](#{e.name})", e.title, _word(stored(e.name))] for e in entries]
    return "\n".join([HEAD, table(["claim", "statement", "verdict"], rows), *map(section, entries)])


def _word(result: dict[str, Any] | None) -> str:
    return "not run yet" if result is None else f"**{result['verdict']}**"


def section(entry: Entry) -> str:
    result = stored(entry.name)
    parts = [f"\n## {entry.name}\n", f"{entry.title}\n", f"{entry.text}\n"]
    if result is None:
        return "\n".join([*parts, f"Not run yet: `stillroom claims run {entry.name}`.\n"])
    parts += [f"**Verdict: {result['verdict']}**{'; ' + result['reason'] if result['reason'] else ''}\n"]
    parts += [f"Mean ± standard deviation over the seeds {_list(result['seeds'])}:\n", means(result)]
    parts += ["Margins, one per seed:\n", margins(result["checks"])]
    if result["null"]:
        parts += ["The null arm before the same checks:\n", margins(result["null"], says=False)]
    parts += ["Values of every seed:\n", raw(result), facts(result)]
    return "\n".join(parts)


def means(result: Mapping[str, Any]) -> str:
    rows = [[metric, *(mean_of(result, arm, metric) for arm in result["arms"])] for metric in metrics_of(result)]
    return table(["", *(f"{arm} ({part})" if part != arm else arm for arm, part in result["arms"].items())], rows)


def margins(checks: Sequence[Mapping[str, Any]], says: bool = True) -> str:
    rows = [
        [row["arm"], f"{row['check']}: {row['says']}" if says else row["check"],
         ", ".join(number(m) for m in row["margins"].values()), bounds(row["interval"]), row["verdict"]]
        for row in checks
    ]
    return table(["arm", "check", "margins", "95 % interval", "verdict"], rows)


def raw(result: Mapping[str, Any]) -> str:
    metrics = metrics_of(result)
    rows = [
        [arm, seed, *(number(values[metric]) if metric in values else "–" for metric in metrics)]
        for arm, seeds in result["values"].items() for seed, values in seeds.items()
    ]
    return table(["arm", "seed", *metrics], rows)


def facts(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    seconds = ", ".join(f"{arm} {value:.0f}" for arm, value in result["seconds"].items())
    lines = [
        f"- Budget: {result['budget']}.",
        f"- Seconds of one thread, all seeds: {seconds}.",
        f"- Machine: {machine['processor']}, {machine['cores']} cores, {result['jobs']} jobs, one thread "
        f"each, torch {machine['torch']}, Python {machine['python']}; stillroom {result['stillroom']}, "
        f"{result['date'][:10]}.",
        f"- Again: `{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def metrics_of(result: Mapping[str, Any]) -> list[str]:
    """Of all arms: one need not have what another has."""
    return list(dict.fromkeys(m for seeds in result["values"].values() for m in next(iter(seeds.values()))))


def mean_of(result: Mapping[str, Any], arm: str, metric: str) -> str:
    """With its standard deviation over seeds; a dash where the arm has no such metric."""
    found = [values[metric] for values in result["values"][arm].values() if metric in values]
    return mean_and_sd(found) if found else "–"


def mean_and_sd(values: Sequence[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if len(numbers) < len(values):
        return "not finite"
    if len(numbers) == 1:
        return number(numbers[0])
    mean, sd = statistics.mean(numbers), statistics.stdev(numbers)
    if sd < ROUNDING * abs(mean):
        sd = 0.0
    return f"{as_precise(mean, sd)} ± {number(sd, 2)}"


def as_precise(mean: float, sd: float) -> str:
    """As many decimals as its deviation shows; four significant digits where there is none."""
    if not 1e-5 <= sd < abs(mean) < 1e5:
        return number(mean, 4 if sd == 0 else 3)
    return f"{mean:.{max(0, 1 - math.floor(math.log10(sd)))}f}"


def bounds(interval: Sequence[float] | None) -> str:
    return "none" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; in powers of ten only what would be mostly zeros."""
    if value is None:
        return "not finite"
    if value == 0 or not 1e-5 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}" if value else "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _list(things: Sequence[Any]) -> str:
    return ", ".join(map(str, things))

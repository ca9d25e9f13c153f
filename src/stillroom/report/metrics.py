"""metrics.jsonl, read in one pass: a series per role/term, the stages, and the lines that could not be read."""

import json
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillroom.report.words import is_number

POINTS = 400  # of one curve: more than the pixels of a panel
HUGE = 1e100  # beyond this a value is drawn as not finite: axes overflow before floats do
TIMES = {"step", "stage", "seconds"}  # of a row, not measured


class Series(NamedTuple):
    steps: array
    values: array


class Thin(NamedTuple):
    """At most POINTS bins: mean step, mean value, least and greatest finite value; NaN where a bin has none."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass
class Metrics:
    series: dict[str, Series] = field(default_factory=dict)
    stages: list[tuple[float, str]] = field(default_factory=list)
    """(first step logged in the stage, its name)."""
    step: int | None = None
    """The last step logged."""
    seconds: float | None = None
    """Wall time at that step, where rows tell it."""


def rows(path: Path, unreadable: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of a file that may still be written to; numbers of the lines that are no rows go to `unreadable`."""
    if not path.exists():
        return
    with path.open("rb") as lines:  # bytes: a torn line may end inside a character
        for index, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                unreadable.append(index)
                continue
            if isinstance(row, dict) and is_number(row.get("step")):
                yield row
            else:
                unreadable.append(index)


def gather(rows: Iterable[Mapping[str, Any]]) -> Metrics:
    """Rows -> series. A null is a value that was not finite. Steps written again after a resume replace the first."""
    metrics = Metrics()
    for row in rows:
        step = row["step"]
        metrics.step = step
        metrics.seconds = row["seconds"] if is_number(row.get("seconds")) else metrics.seconds
        if isinstance(row.get("stage"), str):
            _enter(metrics.stages, step, row["stage"])
        for key, value in row.items():
            if key in TIMES or not (value is None or is_number(value)):
                continue
            steps, values = metrics.series.setdefault(key, Series(array("d"), array("d")))
            if steps and step <= steps[-1]:
                keep = bisect_left(steps, step)
                del steps[keep:], values[keep:]
            steps.append(step)
            values.append(_float(value))
    return metrics


def _enter(stages: list[tuple[float, str]], step: float, name: str) -> None:
    while stages and stages[-1][0] >= step:  # a resume went back before this stage
        stages.pop()
    if not stages or stages[-1][1] != name:
        stages.append((step, name))


def _float(value: float | None) -> float:
    if value is None:
        return float("nan")
    try:
        return float(value)
    except OverflowError:  # JSON integers have no bound
        return float("inf")


def finite(values: np.ndarray) -> np.ndarray:
    return np.abs(values) < HUGE  # False for NaN


def thin(steps: np.ndarray, values: np.ndarray, most: int = POINTS) -> Thin:
    """Bin means over the finite values; runs of equal numbers of rows make the bins."""
    count = min(len(values), most)
    if count == 0:
        return Thin(*(np.zeros(0) for _ in range(4)))
    starts = np.arange(count) * len(values) // count
    good = finite(values)
    hits = np.add.reduceat(good.astype(float), starts)
    mean = np.add.reduceat(np.where(good, values, 0.0), starts) / np.where(hits, hits, np.nan)
    low = np.minimum.reduceat(np.where(good, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(good, values, -np.inf), starts)
    step = np.add.reduceat(steps, starts) / np.diff(np.append(starts, len(values)))
    return Thin(step, mean, np.where(hits, low, np.nan), np.where(hits, high, np.nan))

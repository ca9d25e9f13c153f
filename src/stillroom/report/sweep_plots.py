"""Figures of a sweep, from the mapping that sweep.json holds."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

from stillroom.report.plots import ACCENT, BAD, INK, MUTED, NAME, RULE, SECOND, SMALL, plain
from stillroom.report.words import number


class Line(NamedTuple):
    colour: str
    dashes: Any = "-"
    width: float = 1.3


LINES = {
    "ceiling": Line(MUTED, (0, (1, 2)), 1.1),
    "teacher": Line(INK),
    "teacher-bf16": Line(INK, (0, (5, 2)), 1.0),
    "teacher-int8": Line(INK, (0, (1, 1.5)), 1.0),
    "student": Line(ACCENT, "-", 2.0),
    "scratch": Line(SECOND),
    "recon-only": Line(SECOND, (0, (4, 2))),
    "klt": Line(MUTED),
    "klt-budget": Line(BAD, (0, (6, 2)), 1.3),
}
INHERITING = ("teacher-bf16", "teacher-int8", "student", "scratch", "recon-only")
"""Whose latents may be compared with the teacher's."""
Curves = Mapping[str, Sequence[tuple[float, float]]]


def curves_of(rows: Iterable[Mapping[str, Any]], size: int, metric: str, across: str = "scale",
              names: Iterable[str] = LINES) -> dict[str, list[tuple[float, float]]]:
    """{contender: [(scale, mean of the metric)]} at one size; what has no value there is left out."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row in rows:
        mean = row["means"].get(metric, {}).get("mean")
        if row["size"] == size and row["contender"] in found and None not in (mean, row[across]):
            found[row["contender"]].append((row[across], mean))
    return {name: points for name, points in found.items() if points}


def over_scale(curves: Curves, told: str, mark: float | None = None) -> Figure:
    """One line per contender, named at its right end."""
    figure, axes = _wide()
    _draw(axes, curves)
    if mark is not None:
        axes.axvline(mark, color=RULE, linewidth=1, zorder=0)
    _scales(axes, curves)
    axes.set_xlabel("scale s", color=MUTED, size=SMALL)
    _named(axes, curves)
    figure.text(0.005, 0.94, told, size=NAME, color=INK, parse_math=False)
    figure.set_label(told)
    return figure


def cost(curves: Curves, told: str) -> Figure:
    """Milliseconds against decibels, a contender's scales joined."""
    figure, axes = _wide()
    _draw(axes, curves, marks=True)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("milliseconds to encode one picture", color=MUTED, size=SMALL)
    _named(axes, curves)
    figure.text(0.005, 0.94, told, size=NAME, color=INK, parse_math=False)
    figure.set_label(told)
    return figure


def panel(curves: Curves, told: str, log: bool = False) -> Figure:
    """The same, small and without names: a key stands beside."""
    figure = Figure(figsize=(3.1, 1.95), facecolor="none")
    axes = plain(figure.add_axes((0.15, 0.15, 0.83, 0.66), facecolor="none"), 5)
    _draw(axes, curves)
    _scales(axes, curves, 0.12)
    if log and curves:
        _decades(axes)
    figure.text(0.005, 0.9, told, size=NAME, color=INK, parse_math=False)
    figure.set_label(told)
    return figure


def key(names: Iterable[str]) -> Figure:
    names = [name for name in LINES if name in set(names)]
    figure = Figure(figsize=(3.1, 1.95), facecolor="none")
    axes = figure.add_axes((0.02, 0.05, 0.96, 0.9), facecolor="none")
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6))
    axes.set_axis_off()
    for i, name in enumerate(names):
        line = LINES[name]
        axes.plot([0.02, 0.2], [i, i], color=line.colour, linestyle=line.dashes, linewidth=line.width)
        axes.text(0.25, i, name, size=SMALL + 0.5, color=INK, va="center")
    figure.set_label("key: " + ", ".join(names))
    return figure


def channels(rows: Sequence[Mapping[str, Any]], what: str) -> Figure:
    """Mean or std of every latent channel over the size of the picture, at scale 1; the teacher in ink, the student in
    dashes over it. (The paper's Figure 5.)"""
    figure, axes = _wide(right=0.86)
    ends: dict[str, tuple[float, float]] = {}
    for name in ("teacher", "student"):
        native = sorted((r["size"], r["channels"][what]) for r in rows if r["contender"] == name and r["scale"] == 1)
        sizes, values = [s for s, _ in native], np.array([v for _, v in native])            # [sizes, C]
        line = LINES[name]
        dashes = (0, (3, 2)) if name == "student" else "-"
        axes.plot(sizes, values, color=line.colour, linestyle=dashes, linewidth=1.1, alpha=0.85,
                  marker="o" if len(sizes) == 1 else "", markersize=3)
        ends[name] = sizes[-1], float(values[-1].max())
    axes.set_xscale("log", base=2)
    sizes = sorted({r["size"] for r in rows})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(lambda tick, _: number(round(tick)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("pixels a side", color=MUTED, size=SMALL)
    _named(axes, {name: [end] for name, end in ends.items()})
    told = {"mean": "Mean of each latent channel", "std": "Standard deviation of each latent channel"}[what]
    figure.text(0.005, 0.94, told, size=NAME, color=INK)
    figure.set_label(f"{told}, teacher and student, over {sizes}")
    return figure


def principal(paths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name: [n, C]} -> {name: [n, 2]}: the two directions in which all points together differ most. A direction's
    sign is open; here its largest part is positive."""
    every = np.concatenate(list(paths.values()))
    centre = every.mean(0)
    _, _, v = np.linalg.svd(every - centre, full_matrices=False)
    axes = np.zeros((2, every.shape[1]))
    axes[: min(2, len(v))] = v[:2]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
    return {name: (points - centre) @ axes.T for name, points in paths.items()}


def paths_of(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Mean latents [n, C] of teacher, student and scratch from low to high resolution, and what each step is: the sizes
    at scale 1, or, where there is only one size, its scales."""
    sizes = sorted({row["size"] for row in rows})
    across = "size" if len(sizes) > 1 else "scale"
    found: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        if row["contender"] in ("teacher", "student", "scratch") and (across == "scale" or row["scale"] == 1):
            found.setdefault(row["contender"], []).append((row[across], row["channels"]["mean"]))
    width = len(found["teacher"][0][1])
    steps = [f"{at:g} px" if across == "size" else f"s = {at:g}" for at, _ in sorted(found["teacher"])]
    return {n: np.array([m for _, m in sorted(p)]) for n, p in found.items() if len(p[0][1]) == width}, steps


def latent_map(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean latents in two dimensions, arrows from low to high resolution."""
    paths, steps = paths_of(rows)
    figure, axes = _wide(right=0.98, height=3.9)
    for name, points in principal(paths).items():
        line = LINES[name]
        axes.plot(*points.T, "o", color=line.colour, markersize=4, label=name)
        for a, b in pairwise(points):
            axes.annotate("", b, a, arrowprops={"arrowstyle": "-|>", "color": line.colour, "linewidth": line.width,
                                                "linestyle": line.dashes, "shrinkA": 3, "shrinkB": 3})
        for i in {0, len(points) - 1} if name == "teacher" else ():
            axes.annotate(steps[i], points[i], xytext=(6, 6), textcoords="offset points", size=SMALL, color=MUTED)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("first principal direction", color=MUTED, size=SMALL)
    axes.set_ylabel("second", color=MUTED, size=SMALL)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="best")
    told = f"Mean latents from {steps[0]} to {steps[-1]}"
    figure.text(0.005, 0.945, told, size=NAME, color=INK)
    figure.set_label(told)
    return figure


def departure(theorem: Mapping[str, Any]) -> Figure:
    """Theorem 2: distance of the latents over the resolution, and the wedge that the least slope allows."""
    figure, axes = _wide(right=0.97, height=3.0)
    errors = [e for e in theorem["errors"] if e["mean"] is not None]
    r, mean = [e["size"] for e in errors], [e["mean"] for e in errors]
    axes.fill_between(r, [e["low"] for e in errors], [e["high"] for e in errors], color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(r, mean, color=ACCENT, marker="o", markersize=4, linewidth=1.5)
    r0, slope = theorem["trained_at"], theorem["slope"]
    if slope is not None:
        start = next(e["mean"] for e in errors if e["size"] == r0)
        wedge = np.linspace(min(r), max(r), 100)
        axes.plot(wedge, start + slope * np.abs(wedge - r0), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("trained here", (r0, start), xytext=(4, -14), textcoords="offset points", size=SMALL, color=MUTED)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(r))
    axes.set_xlabel("pixels a side", color=MUTED, size=SMALL)
    told = "Distance of the student's latents from the teacher's, in the teacher's deviations"
    figure.text(0.005, 0.94, told, size=NAME, color=INK)
    figure.set_label(told)
    return figure


# ---- parts of a figure ----

def _wide(right: float = 0.86, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), facecolor="none")
    return figure, plain(figure.add_axes((0.075, 0.14, right - 0.075, 0.74), facecolor="none"), 5)


def _draw(axes: Axes, curves: Curves, marks: bool = False) -> None:
    for name, points in curves.items():
        line = LINES[name]
        axes.plot(*zip(*points, strict=True), color=line.colour, linestyle=line.dashes, linewidth=line.width,
                  marker="o" if marks or len(points) == 1 else "", markersize=3, zorder=3 if name == "student" else 2)


def _scales(axes: Axes, curves: Curves, gap: float = 0.06) -> None:
    """Ticks where something was measured; of two that stand closer than `gap` of the width, one."""
    measured, shown = sorted({x for points in curves.values() for x, _ in points}), list[float]()
    for x in measured:
        if not shown or x - shown[-1] > gap * (measured[-1] - measured[0]):
            shown.append(x)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")


def _decades(axes: Axes) -> None:
    low, high = axes.dataLim.intervaly
    if low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())
        axes.yaxis.set_minor_locator(NullLocator())


def _named(axes: Axes, curves: Curves, gap: float = 0.062) -> None:
    """Names to the right of the lines' ends, moved apart where they would overlap. `gap`: of the axes' height."""
    axes.autoscale_view()
    (low, high), at = axes.get_ylim(), {}
    for name, points in curves.items():
        at[name] = (max(points)[1] - low) / (high - low or 1)
    places = apart([at[name] for name in at], gap)
    for name, y in zip(at, places, strict=True):
        axes.annotate(name, (1.0, y), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points", va="center",
                      size=SMALL, color=LINES[name].colour, annotation_clip=False)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The same places moved as little as a few rounds of pushing need, until neighbours are `gap` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(200):
        for i in range(len(moved) - 1):
            lack = gap - (moved[i + 1] - moved[i])
            if lack > 0:
                moved[i], moved[i + 1] = moved[i] - lack / 2, moved[i + 1] + lack / 2
    back = dict(zip(order, moved, strict=True))
    return [back[i] for i in range(len(places))]

"""Pictures of a run: curves and point clouds. Figures here have no background and take the page's colours."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator
from scipy.ndimage import gaussian_filter

from stillroom.report.metrics import POINTS, Metrics, finite, gather, thin
from stillroom.report.words import number
from stillroom.train.pictures import Array, array

# Colours of the light page; the page swaps each for its variable, so that a figure follows the reader's dark mode.
INK, MUTED, RULE, ACCENT, SECOND, BAD = "#1d2126", "#686f76", "#d8d5ce", "#b05a2b", "#2a6f77", "#b3261e"
THIRD, FOURTH, FIFTH, PAPER = "#5d4a9c", "#3a6ea5", "#7d8a2e", "#fdfcfa"
VARIABLES = {PAPER: "paper", INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", SECOND: "second", BAD: "bad",
             THIRD: "third", FOURTH: "fourth", FIFTH: "fifth"}
DENSITY = "#8a9097"  # a grey that shows on light and on dark paper
CLOUD = 4_000  # points drawn of one cloud
NAME, SMALL = 10.5, 8.5  # points; the page shows a panel at about a quarter above its printed size



def curves(rows: Iterable[Mapping[str, Any]] | Metrics) -> dict[str, list[Figure]]:
    """{role: [one small panel per term]}, all over the same steps; what belongs to no role stands under ''."""
    metrics = rows if isinstance(rows, Metrics) else gather(rows)
    groups: dict[str, list[Figure]] = {}
    for key, (steps, values) in metrics.series.items():
        role, _, term = key.rpartition("/")
        panel = curve(term, np.array(steps), np.array(values), metrics.stages, metrics.step or 0)
        panel.set_label(f"{key}, {panel.get_label()}")
        groups.setdefault(role, []).append(panel)
    return dict(sorted(groups.items(), key=lambda item: item[0] == ""))  # stable: roles as logged, then the run itself


def curve(name: str, steps: np.ndarray, values: np.ndarray, stages=(), last: float = 0) -> Figure:
    """One panel from step 0 to `last` or further: bin means as a line, least to greatest as a band, dashes where a
    later stage opens, ticks on the axis where values are not finite."""
    figure, axes = _panel()
    line, good = thin(steps, values), finite(values)
    if len(values) > len(line.step):
        axes.fill_between(line.step, line.low, line.high, color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(line.step, line.mean, color=ACCENT, linewidth=1.3, marker="o" if good.sum() == 1 else "", markersize=4)
    _height(axes, line.mean[np.isfinite(line.mean)], bool((values[good] > 0).all()))
    end = max(float(steps[-1]) if len(steps) else 0.0, last, 1.0)
    axes.set_xlim(min(0.0, float(steps[0]) if len(steps) else 0.0), end)
    for step, _ in stages[1:]:
        axes.axvline(step, color=MUTED, linewidth=0.7, linestyle=(0, (3, 3)))
    lost = steps[~good]
    if len(lost):
        ticks = lost[:: math.ceil(len(lost) / POINTS)]
        axes.plot(ticks, np.zeros(len(ticks)), "|", color=BAD, markersize=6, clip_on=False,
                  transform=axes.get_xaxis_transform())
    told = number(float(values[-1])) if len(values) else "no values"
    told = f"{len(lost):,} not finite · {told}" if len(lost) else told
    figure.text(0.005, 0.9, name, size=NAME, color=INK, parse_math=False)
    figure.text(0.985, 0.9, told, size=NAME, color=BAD if len(lost) else MUTED, ha="right", parse_math=False)
    figure.set_label(f"{name}: {told} at the end")
    return figure


def _height(axes: Axes, line: np.ndarray, positive: bool) -> None:
    """Decades where every value is positive and the line spans more than two of them; else a linear axis, a constant
    in its middle."""
    least, most = (float(line.min()), float(line.max())) if len(line) else (0.0, 1.0)
    if positive and least > 0 and most / least > 100:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())
        axes.yaxis.set_minor_locator(NullLocator())
        return
    if least == most:
        axes.set_ylim(least - (abs(least) or 1.0), most + (abs(most) or 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda tick, _: number(float(tick), 6))


def plain(axes: Axes, ticks: int) -> Axes:
    """The house's look: a line below, a faint grid, at most `ticks` numbers beside it."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=SMALL, labelcolor=MUTED, length=0, pad=4)
    axes.yaxis.set_major_locator(MaxNLocator(ticks))
    axes.yaxis.set_major_formatter(lambda tick, _: number(float(tick), 6))
    return axes


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.1, 1.95), facecolor="none")
    axes = figure.add_axes((0.15, 0.15, 0.835, 0.66), facecolor="none")  # fixed, so that panels line up on the page
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, labelcolor=MUTED, length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, axes


def scatter(points: Mapping[str, Array], target: Array | Callable | None = None) -> list[Figure]:
    """One square panel per cloud [N, 2], all on the same axes; behind them the target, as samples [M, 2] or as a
    density, a function [K, 2] -> [K]. The axes are the target's where it has samples: strays are counted, not shown."""
    clouds = {name: array(cloud) for name, cloud in points.items()}
    for name, cloud in clouds.items():
        if cloud.ndim != 2 or cloud.shape[1] != 2:
            raise ValueError(f"cloud {name!r} has shape {list(cloud.shape)}; a scatter shows points of shape [N, 2]")
    known = None if target is None or callable(target) else array(target)
    low, high = _window([known] if known is not None and len(known) else list(clouds.values()))
    density = None if target is None else _density(target if callable(target) else known, low, high)
    return [_cloud(name, cloud, density, low, high) for name, cloud in clouds.items()]


def _window(clouds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A square that holds nearly all points: one runaway sample must not shrink the rest to a dot."""
    ends = [np.quantile(c[finite(c).all(1)], [0.005, 0.995], axis=0) for c in clouds if finite(c).all(1).any()]
    if not ends:
        return -np.ones(2), np.ones(2)
    least, most = np.min([e[0] for e in ends], 0), np.max([e[1] for e in ends], 0)
    centre, half = (least + most) / 2, max(float((most - least).max()) * 0.62, 1e-6)
    return centre - half, centre + half


def _density(target: Callable | np.ndarray | None, low: np.ndarray, high: np.ndarray, cells: int = 96) -> np.ndarray:
    """[cells, cells], row 0 at the bottom, greatest value 1."""
    edges = [np.linspace(low[i], high[i], cells + 1) for i in (0, 1)]
    if callable(target):
        x, y = ((e[1:] + e[:-1]) / 2 for e in edges)
        grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        field = array(target(grid.astype(np.float32))).reshape(cells, cells)
    else:
        field = np.histogram2d(*np.asarray(target).T[:2], bins=edges)[0].T
        field = gaussian_filter(field, 1.6)  # few samples must still show a shape
    field = np.where(np.isfinite(field), field, 0).clip(0)
    return field / max(field.max(), 1e-300)


def _cloud(name: str, cloud: np.ndarray, density: np.ndarray | None, low: np.ndarray, high: np.ndarray) -> Figure:
    figure = Figure(figsize=(2.6, 2.86), facecolor="none")
    axes = figure.add_axes((0.005, 0.005, 0.99, 0.9), facecolor="none")  # the same place whatever is written
    if density is not None:
        shade = np.empty((*density.shape, 4))
        shade[..., :3], shade[..., 3] = to_rgb(DENSITY), 0.45 * np.sqrt(density)
        axes.imshow(shade, extent=(low[0], high[0], low[1], high[1]), origin="lower", interpolation="bilinear")
    good = finite(cloud).all(1)
    inside = good & ((cloud >= low) & (cloud <= high)).all(1)
    drawn = cloud[inside][:: max(1, math.ceil(inside.sum() / CLOUD))]
    axes.plot(drawn[:, 0], drawn[:, 1], ".", color=ACCENT, ms=3.0, alpha=0.8, mew=0, rasterized=True)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)
    strays = {"outside": int((good & ~inside).sum()), "not finite": int((~good).sum())}
    told = ", ".join(f"{count:,} {what}" for what, count in strays.items() if count)
    axes.set_title(name, loc="left", size=NAME + 1, color=INK, parse_math=False)
    if told:
        axes.text(0.975, 0.03, told, size=SMALL + 1, color=BAD, ha="right", transform=axes.transAxes)
    figure.set_label(f"{name}: {len(cloud):,} points" + (f", {told}" if told else ""))
    return figure

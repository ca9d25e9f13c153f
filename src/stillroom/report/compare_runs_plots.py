"""Figures of a comparison of flows and generators, from the mapping that compare.json holds: a colour for each method,
the teacher in grey."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullLocator

from stillroom.report.compare_plots import BELOW, _decades_where_wide, _titled, _wide
from stillroom.report.geometry_plots import colour
from stillroom.report.plots import MUTED, PAPER, SMALL
from stillroom.report.sweep_plots import apart
from stillroom.report.words import number

Found = Mapping[str, Any]
GAP, LONGEST = 0.02, 40
"""How far a name stands from its dot, as a share of the axes; letters of a name that are shown."""
LINE = 0.15
"""Inches: how high a name is."""


def quality(found: Found) -> Figure | None:
    """Fréchet distance over the evaluations that a sample takes, of what is evaluated for one."""
    if all(run["evaluations"] is None for entry in found["entries"] for run in entry["runs"]):
        return None
    figure, axes = _high(found)
    main = found["about"]["main"]
    places = list[Place]()
    for guidance in sorted({line["guidance"] for line in found["teacher"]}):
        lines = sorted((line for line in found["teacher"] if line["guidance"] == guidance),
                       key=lambda line: line["evaluations"])
        x, y = [line["evaluations"] for line in lines], [line["spaces"][main]["frechet"] for line in lines]
        axes.plot(x, y, color=MUTED, linewidth=1.2, zorder=1)
        axes.plot(x, y, "o", color=MUTED, markersize=3.5, zorder=3)      # above names, which lie above lines
        name = "teacher" + ("" if guidance == 1 else f", guidance {guidance:g}")
        places.append(Place(x[-1], y[-1], name, MUTED))
    places += dots(axes, found, lambda run: run["evaluations"])
    _floor(axes, found)
    heights(axes, found, found["teacher"])
    over_evaluations(axes, "evaluations of a network for a sample")
    named(figure, axes, places)
    return _titled(figure, f"Fréchet distance in {main}: lower is better")


def training(found: Found) -> Figure | None:
    """The same over what training has asked of all networks, for runs that recorded it."""
    def spent(run: Mapping[str, Any]) -> float | None:
        return sum((run["cost"]["evaluations"] or {}).values()) or None

    if not any(spent(run) for entry in found["entries"] for run in entry["runs"]):
        return None
    figure, axes = _high(found)
    places = dots(axes, found, spent)
    _floor(axes, found)
    heights(axes, found, [])
    over_evaluations(axes, "evaluations of all networks in training")
    named(figure, axes, places)
    return _titled(figure, f"Fréchet distance in {found['about']['main']}: lower is better")


def _high(found: Found) -> tuple[Figure, Axes]:
    """As high as names below one another ask for."""
    return _wide(height=3.6 + LINE * max(0, len(found["entries"]) - 6))


class Place(NamedTuple):
    """Where a dot is, in the units of the axes, and whose."""

    x: float
    y: float
    text: str
    colour: str


def dots(axes: Axes, found: Found, cost: Callable[[Mapping[str, Any]], float | None]) -> list[Place]:
    """A dot for each method, with a deviation where there are several runs."""
    main, places = found["about"]["main"], list[Place]()
    for i, entry in enumerate(found["entries"]):
        spent = [c for run in entry["runs"] if (c := cost(run)) is not None]
        values = [run["spaces"][main]["frechet"] for run in entry["runs"]]
        if spent:
            x, y = statistics.fmean(spent), statistics.fmean(values)
            axes.errorbar(x, y, yerr=statistics.stdev(values) if len(values) > 1 else None, color=colour(i), marker="o",
                          markersize=6, linewidth=1.1, zorder=3)
            places.append(Place(x, y, shortened(entry["name"]), colour(i)))
    return places


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def width_of(name: str, inches: float) -> float:
    """Of a name and the gap before it, as a share of axes so wide; at most so much that some of them is left."""
    drawn = TextPath((0, 0), name.replace("$", "S"), size=SMALL + 0.5).get_extents().width / 72
    return min(GAP + 1.1 * drawn / inches, 0.6)       # a screen's letters stand on whole pixels


def widened(axes: Axes, places: Sequence[Place], widths: Sequence[float]) -> None:
    """The axis goes on to the right until every name ends inside."""
    axes.autoscale_view()
    low, high = axes.get_xlim()
    needed = max(math.log(place.x / low) / (1 - width) for place, width in zip(places, widths, strict=True))
    axes.set_xlim(low, max(high, low * math.exp(needed)))


def named(figure: Figure, axes: Axes, places: Sequence[Place]) -> None:
    """Names right of their dots, and apart in height where one would reach into another."""
    inches = figure.get_figwidth() * axes.get_position().width
    widths = [width_of(place.text, inches) for place in places]
    widened(axes, places, widths)
    where = axes.transData + axes.transAxes.inverted()
    high = LINE / (figure.get_figheight() * axes.get_position().height)
    columns: list[list[tuple[float, float, Place]]] = []
    end = 0.0
    for x, y, place, width in sorted((*where.transform((place.x, place.y)), place, width)
                                     for place, width in zip(places, widths, strict=True)):
        if columns and x < end:
            columns[-1].append((x, y, place))
        else:
            columns.append([(x, y, place)])
        end = max(end, x + width)
    for column in columns:
        heights = kept_inside(apart([y for _, y, _ in column], high), high)
        for (x, y, place), at in zip(column, heights, strict=True):
            line = {"arrowstyle": "-", "color": place.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3,
                    "relpos": (0, 0.5)}
            axes.annotate(place.text, (x, y), (x + GAP, at), xycoords="axes fraction", textcoords="axes fraction",
                          va="center", size=SMALL + 0.5, color=place.colour, parse_math=False, arrowprops=line,
                          zorder=2, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5})


def kept_inside(places: Sequence[float], gap: float) -> list[float]:
    """The same heights, `gap` apart, above the foot of the axes and below their head, as long as there is room."""
    order, kept = sorted(range(len(places)), key=lambda i: places[i]), [*places]
    least, most = gap / 2, 1.0
    for i in order:
        kept[i] = max(kept[i], least)
        least = kept[i] + gap
    for i in reversed(order):
        kept[i] = min(kept[i], most)
        most = kept[i] - gap
    return kept


def _floor(axes: Axes, found: Found) -> None:
    value = found["floor"]["spaces"][found["about"]["main"]]["frechet"]
    axes.axhline(value, color=MUTED, linewidth=1, linestyle=BELOW, zorder=0)
    axes.annotate("fresh real ones" if found["about"]["is_data"] else "the teacher, of other noise", (1.0, value),
                  xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points", ha="right",
                  size=SMALL - 0.5, color=MUTED)


def heights(axes: Axes, found: Found, lines: Sequence[Mapping[str, Any]]) -> None:
    main = found["about"]["main"]
    runs = [run for entry in found["entries"] for run in entry["runs"]]
    _decades_where_wide(axes, [each["spaces"][main]["frechet"] for each in (*runs, *lines, found["floor"])])


def over_evaluations(axes: Axes, told: str) -> None:
    axes.set_xscale("log")
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter(lambda tick, _: number(round(tick)) if tick >= 1 else f"{tick:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(told, color=MUTED, size=SMALL)

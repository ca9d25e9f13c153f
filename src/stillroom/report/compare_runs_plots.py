"""Figures of a comparison of flows and generators, from the mapping that compare.json holds: a colour for each method,
the teacher in grey."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from stillroom.report.compare_plots import BELOW, _decades_where_wide, _titled, _wide
from stillroom.report.geometry_plots import colour
from stillroom.report.plots import MUTED, SMALL
from stillroom.report.sweep_plots import apart
from stillroom.report.words import number

Found = Mapping[str, Any]
LETTER, LINE, GAP, FAR = 0.0115, 0.055, 0.02, 0.8
"""Shares of the axes: how wide a letter is, how high a name, how far it stands from its dot, and from where on to the
left of it."""


def quality(found: Found) -> Figure | None:
    """Fréchet distance over the evaluations that a sample takes, of what is evaluated for one."""
    if all(run["evaluations"] is None for entry in found["entries"] for run in entry["runs"]):
        return None
    figure, axes = _wide()
    main = found["about"]["main"]
    places = list[Place]()
    for guidance in sorted({line["guidance"] for line in found["teacher"]}):
        lines = sorted((line for line in found["teacher"] if line["guidance"] == guidance),
                       key=lambda line: line["evaluations"])
        x, y = [line["evaluations"] for line in lines], [line["spaces"][main]["frechet"] for line in lines]
        axes.plot(x, y, color=MUTED, linewidth=1.2, marker="o", markersize=3.5)
        name = "teacher" + ("" if guidance == 1 else f", guidance {guidance:g}")
        places.append(Place(x[-1], y[-1], name, MUTED, line=True))
    places += dots(axes, found, lambda run: run["evaluations"])
    _floor(axes, found)
    heights(axes, found, found["teacher"])
    over_evaluations(axes, "evaluations of a network for a sample")
    named(axes, places)
    return _titled(figure, f"Fréchet distance in {main}: lower is better")


def training(found: Found) -> Figure | None:
    """The same over what training has asked of all networks, for runs that recorded it."""
    def spent(run: Mapping[str, Any]) -> float | None:
        return sum((run["cost"]["evaluations"] or {}).values()) or None

    if not any(spent(run) for entry in found["entries"] for run in entry["runs"]):
        return None
    figure, axes = _wide()
    places = dots(axes, found, spent)
    _floor(axes, found)
    heights(axes, found, [])
    over_evaluations(axes, "evaluations of all networks in training")
    named(axes, places)
    return _titled(figure, f"Fréchet distance in {found['about']['main']}: lower is better")


class Place(NamedTuple):
    """Where a dot is, in the units of the axes, and whose."""

    x: float
    y: float
    text: str
    colour: str
    line: bool = False      # one falls to it from the left


def dots(axes: Axes, found: Found, cost: Callable[[Mapping[str, Any]], float | None]) -> list[Place]:
    """A dot for each method, with a deviation where there are several runs."""
    main, places = found["about"]["main"], list[Place]()
    for i, entry in enumerate(found["entries"]):
        spent = [c for run in entry["runs"] if (c := cost(run)) is not None]
        values = [run["spaces"][main]["frechet"] for run in entry["runs"]]
        if spent:
            x, y = statistics.fmean(spent), statistics.fmean(values)
            axes.errorbar(x, y, yerr=statistics.stdev(values) if len(values) > 1 else None, color=colour(i), marker="o",
                          markersize=6, linewidth=1.1)
            places.append(Place(x, y, entry["name"], colour(i)))
    return places


class Name(NamedTuple):
    """Beside its dot at (x, y); all in shares of the axes."""

    text: str
    x: float
    y: float
    colour: str
    line: bool

    @property
    def height(self) -> float:
        """Of the dot, and on the left below a line."""
        return self.y - LINE if self.line and self.side < 0 else self.y

    @property
    def side(self) -> float:
        """Of the dot: right of it, or left where there is little room."""
        return -1 if self.x > FAR else 1

    @property
    def ends(self) -> tuple[float, float]:
        far = self.x + self.side * (GAP + LETTER * len(self.text))
        return min(self.x, far), max(self.x, far)


def named(axes: Axes, places: Sequence[Place]) -> None:
    """Names beside their dots, inside the axes, and apart in height where one would reach into another."""
    axes.autoscale_view()
    where = axes.transData + axes.transAxes.inverted()
    names = list[Name]()
    for place in places:
        x, y = where.transform((place.x, place.y))
        names.append(Name(place.text, x, y, place.colour, place.line))
    columns: list[list[Name]] = []
    for name in sorted(names, key=lambda name: name.ends):
        if columns and name.ends[0] < max(other.ends[1] for other in columns[-1]):
            columns[-1].append(name)
        else:
            columns.append([name])
    for column in columns:
        for name, at in zip(column, kept_inside(apart([name.height for name in column], LINE), LINE), strict=True):
            line = {"arrowstyle": "-", "color": name.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate(name.text, (name.x, name.y), (name.x + name.side * GAP, at), xycoords="axes fraction",
                          textcoords="axes fraction", va="center", ha="left" if name.side > 0 else "right",
                          size=SMALL + 0.5, color=name.colour, parse_math=False, arrowprops=line)


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
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter(lambda tick, _: number(round(tick)) if tick >= 1 else f"{tick:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(told, color=MUTED, size=SMALL)

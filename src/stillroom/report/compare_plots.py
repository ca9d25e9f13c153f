"""Figures of a comparison, from the mapping that compare.json holds: a colour for each codec."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from stillroom.report.compare_words import CLEAR, last, psnr
from stillroom.report.geometry_plots import _decades, _panel, colour, key
from stillroom.report.plots import INK, MUTED, NAME, SMALL, plain
from stillroom.report.sweep_plots import apart
from stillroom.report.words import number

Found = Mapping[str, Any]
BELOW = (0, (1, 2))


def tradeoff(found: Found) -> Figure:
    """A dot for each codec, with its interval over pictures and CLEAR deviations over samples."""
    figure, axes = _wide()
    shown = [(i, c) for i, c in enumerate(found["codecs"]) if psnr(c) is not None]
    for i, c in shown:
        x, y = c["reconstruction"]["means"]["psnr"], last(c)
        axes.errorbar(x["mean"], y["frechet"], yerr=CLEAR * y["deviation"],
                      xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]], color=colour(i), linewidth=1.1,
                      marker="o", markersize=6)
    axes.margins(0.16)
    _floor(axes, found)
    _decades_where_wide(axes, [last(c)["frechet"] for _, c in shown])
    for order, (i, c) in enumerate(sorted(shown, key=lambda pair: psnr(pair[1]) or 0)):     # neighbours: above, below
        axes.annotate(c["name"], (psnr(c) or 0, last(c)["frechet"]), xytext=(7, -13 if order % 2 else 7),
                      textcoords="offset points", size=SMALL + 0.5, color=colour(i), parse_math=False)
    axes.set_xlabel("PSNR of reconstructions, dB: further right is more faithful", color=MUTED, size=SMALL)
    return _titled(figure, "Fréchet distance of the prior's samples: lower is easier to model")


def curves(found: Found) -> Figure:
    """Over the steps of the prior; dashes with guidance."""
    figure, axes = _wide(0.84)
    ends: dict[int, float] = {}
    for i, c in enumerate(found["codecs"]):
        for scale in dict.fromkeys(row["guidance"] for row in c["generation"]):
            rows = [row for row in c["generation"] if row["guidance"] == scale]
            steps, values = [r["step"] for r in rows], [r["frechet"] for r in rows]
            axes.plot(steps, values, color=colour(i), linewidth=1.5, marker="o", markersize=3,
                      linestyle="-" if scale == 1 else (0, (4, 2)))
            if scale == 1:
                ends[i] = values[-1]
    _floor(axes, found)
    _decades_where_wide(axes, [row["frechet"] for c in found["codecs"] for row in c["generation"]])
    axes.xaxis.set_major_locator(FixedLocator(sorted({r["step"] for c in found["codecs"] for r in c["generation"]})))
    axes.xaxis.set_major_formatter(lambda tick, _: number(round(tick)))
    axes.set_xlabel("steps of the prior", color=MUTED, size=SMALL)
    _named(axes, {i: (found["codecs"][i]["name"], y) for i, y in ends.items()})
    return _titled(figure, "Fréchet distance of samples")


def losses(found: Found) -> list[Figure]:
    """Of the velocity, over that of its mean: all codecs together, then each between the two sides of VIV."""
    every, axes = _panel("held-out loss in v")
    for i, c in enumerate(found["codecs"]):
        axes.plot(c["prior"]["times"], c["prior"]["v"], color=colour(i), linewidth=1.4)
    _unit(axes)
    panels = [key([c["name"] for c in found["codecs"]]), every]
    for i, c in enumerate(found["codecs"]):
        figure, axes = _panel(f"{c['name']}: loss, and VIV")
        bracket = c["latents"]["viv"]
        if "why" not in bracket:
            axes.fill_between(bracket["times"], bracket["in_sample"], bracket["linear"], color=colour(i), alpha=0.2,
                              linewidth=0)
        axes.plot(c["prior"]["times"], c["prior"]["v"], color=colour(i), linewidth=1.4)
        _unit(axes)
        panels.append(figure)
    return panels


def spectra(found: Found) -> list[Figure]:
    """Covariance over rank, of tokens and whole latents; power over frequency."""
    codecs = found["codecs"]
    panels = [key([c["name"] for c in codecs])]
    for over, told in (("token", "Covariance of tokens"), ("element", "Covariance of latents")):
        figure, axes = _panel(told)
        for i, c in enumerate(codecs):
            s = c["latents"]["spectra"].get(over, {"why": ""})
            if "why" not in s:
                values = np.array(s["values"])
                values = values[values > 1e-6 * values[0]] / values.sum()
                axes.plot(np.arange(1, len(values) + 1), values, color=colour(i), linewidth=1.3,
                          marker="o" if len(values) == 1 else "", markersize=3)
        panels.append(_log(figure, axes))
    figure, axes = _panel("Power over frequency")
    for i, c in enumerate(codecs):
        s = c["latents"]["slope"]
        if "why" not in s:
            axes.plot(*binned(s["radii"], s["power"]), color=colour(i), linewidth=1.3)
    return [*panels, _log(figure, axes)]


def binned(radii: Sequence[float], power: Sequence[float], each: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Geometric means over thirds of octaves: single frequencies differ by direction and by chance."""
    x, y = np.log(radii), np.log(power)
    _, place = np.unique(np.round(x / np.log(2) * each), return_inverse=True)
    count = np.bincount(place)
    return np.exp(np.bincount(place, x) / count), np.exp(np.bincount(place, y) / count)


# ---- parts of a figure ----

def _wide(right: float = 0.97, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), facecolor="none")
    foot, head = 0.5 / height, 0.43 / height
    return figure, plain(figure.add_axes((0.085, foot, right - 0.085, 1 - foot - head), facecolor="none"), 5)


def _titled(figure: Figure, told: str) -> Figure:
    figure.text(0.005, 1 - 0.22 / figure.get_figheight(), told, size=NAME, color=INK, parse_math=False)
    figure.set_label(told)
    return figure


def _floor(axes: Axes, found: Found) -> None:
    """Real pictures against real ones."""
    floor = found["about"]["floor"]["frechet"]
    axes.axhline(floor, color=MUTED, linewidth=1, linestyle=BELOW, zorder=0)
    axes.annotate("held-out pictures", (0.0, floor), xycoords=("axes fraction", "data"), xytext=(3, 3),
                  textcoords="offset points", size=SMALL - 0.5, color=MUTED)


def _decades_where_wide(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > 12 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)


def _unit(axes: Axes) -> None:
    """1 is the mean velocity's."""
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=BELOW, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)


def _log(figure: Figure, axes: Axes) -> Figure:
    if axes.lines:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _decades(axes.xaxis)
        _decades(axes.yaxis)
    return figure


def _named(axes: Axes, ends: Mapping[int, tuple[str, float]]) -> None:
    """Names to the right of the lines' ends, moved apart where they would overlap."""
    axes.autoscale_view()
    places = [axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1] for _, y in ends.values()]
    for (i, (name, _)), at in zip(ends.items(), apart(places, 0.062), strict=True):
        axes.annotate(name, (1.0, at), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
                      va="center", size=SMALL, color=colour(i), annotation_clip=False, parse_math=False)

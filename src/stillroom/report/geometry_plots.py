"""Figures of an inspection: a colour for each place, dashes within classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from stillroom.report.plots import ACCENT, BAD, FIFTH, FOURTH, INK, MUTED, NAME, RULE, SECOND, SMALL, THIRD, plain

Found = Mapping[str, Any]
COLOURS = (ACCENT, SECOND, INK, THIRD, BAD, FOURTH, FIFTH, MUTED)
DASHES: Mapping[str, Any] = {"global": "-", "within class": (0, (4, 2))}
OVER = {"element": "over elements", "token": "over tokens", "pooled": "over pooled samples"}


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def key(who: Sequence[str]) -> Figure:
    figure = Figure(figsize=(3.1, 1.95), facecolor="none")
    axes = figure.add_axes((0.02, 0.05, 0.96, 0.9), facecolor="none")
    axes.set(xlim=(0, 1), ylim=(max(len(who), 4) - 0.4, -0.6))
    axes.set_axis_off()
    for i, name in enumerate(who):
        axes.plot([0.02, 0.14], [i, i], color=colour(i), linewidth=1.6)
        axes.text(0.18, i, name, size=SMALL + 0.5, color=INK, va="center", parse_math=False)
    figure.set_label("key: " + ", ".join(who))
    return figure


def spectra(found: Found, over: str) -> Figure:
    figure, axes = _panel(f"Spectrum {OVER[over]}")
    for i, scope, p in _portraits(found, over):
        s = p["spectra"][scope]
        if "why" in s:
            continue
        values = np.array(s["values"])
        values = values[values > 1e-6 * values[0]] / values.sum()
        axes.plot(np.arange(1, len(values) + 1), values, color=colour(i), linestyle=DASHES[scope], linewidth=1.3,
                  marker="o" if len(values) == 1 else "", markersize=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _decades(axes.xaxis)
    _decades(axes.yaxis)
    return figure


def distances(found: Found, over: str) -> Figure:
    """Densities from quantiles: between two of them lies one part in a hundred."""
    figure, axes = _panel(f"Distances {OVER[over]}")
    for i, scope, p in _portraits(found, over):
        s = p["distances"][scope]
        if "why" in s:
            continue
        edges = np.array(s["quantiles"])[::5]
        widths = np.maximum(np.diff(edges), 1e-3)
        axes.stairs(0.05 / widths, edges, color=colour(i), linestyle=DASHES[scope], linewidth=1.3, baseline=None)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return figure


def seen(found: Found, over: str) -> Figure:
    figure, axes = _panel(f"Share seen {OVER[over]}")
    for i, scope, p in _portraits(found, over):
        s = p["curves"][scope]
        if "why" in s:
            continue
        axes.plot(s["temperatures"], s["measured"], color=colour(i), linestyle=DASHES[scope], linewidth=1.3)
        if scope == "global":
            axes.plot(s["temperatures"], s["predicted"], color=colour(i), linestyle=(0, (1, 2)), linewidth=1.1)
    for r in found["settings"]["temperatures"]:
        axes.axvline(r, color=RULE, linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def bends(found: Found, who: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7.2, 3.2), facecolor="none")
    axes = plain(figure.add_axes((0.075, 0.15, 0.9, 0.73), facecolor="none"), 4)
    for i, (name, place) in enumerate(zip(who, found["places"], strict=True)):
        t = place["trajectories"]
        if "why" not in t:
            axes.plot(t["times"], t["bends"], color=colour(i), linewidth=1.5, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("t: 0 data, 1 noise", color=MUTED, size=SMALL)
    if len(who) > 1:
        axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
    _titled(figure, "|dv/dt| over the mean speed", 0.94)
    return figure


def _portraits(found: Found, over: str):
    """(number of the place, scope, portrait) at the first stage that each place has: after its normaliser, if any."""
    for i, place in enumerate(found["places"]):
        for p in [p for p in place["portraits"] if p["over"] == over][:1]:
            for scope in DASHES:
                yield i, scope, p


def _panel(told: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.1, 1.95), facecolor="none")
    axes = plain(figure.add_axes((0.15, 0.15, 0.83, 0.66), facecolor="none"), 4)
    _titled(figure, told, 0.9)
    return figure, axes


def _titled(figure: Figure, told: str, height: float) -> None:
    figure.text(0.005, height, told, size=NAME, color=INK, parse_math=False)
    figure.set_label(told)


def _decades(axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 30 * low else (1, 2, 5), numticks=4))
    axis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axis.set_minor_locator(NullLocator())

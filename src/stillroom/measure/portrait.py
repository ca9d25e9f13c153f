"""All of a cloud's geometry in one record. What cannot be said of it says why, and the rest is said."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

from stillroom.measure.geometry import (
    Classes,
    Cloud,
    Distances,
    Intrinsic,
    Over,
    Scope,
    Seen,
    Spectrum,
    Stage,
    classes,
    concentration,
    seen,
    spectrum,
    two_nn,
)
from stillroom.measure.groups import Grouping, by_clusters, by_labels
from stillroom.settings import Refusal

P = ParamSpec("P")
T = TypeVar("T")
GRID = tuple(float(r) for r in np.geomspace(0.005, 1.28, 25))
"""Temperatures of the curves of what a kernel sees."""
SCOPES: tuple[Scope, ...] = ("global", "within class")


class Abstains(NamedTuple):
    why: str


class Portrait(NamedTuple):
    over: Over
    stage: Stage
    spectra: Mapping[Scope, Spectrum | Abstains]
    intrinsic: Intrinsic | Abstains
    classes: Classes | Abstains
    distances: Mapping[Scope, Distances | Abstains]
    seen: Mapping[Scope, Seen | Abstains]           # at the temperatures asked for
    curves: Mapping[Scope, Seen | Abstains]         # over GRID
    groupings: Mapping[str, Grouping | Abstains]


def portrait(cloud: Cloud, temperatures: Sequence[float] = (0.02, 0.05, 0.2), particles: int = 64, seed: int = 0,
             look_for_clusters: bool = True) -> Portrait:
    spectra: dict[Scope, Spectrum | Abstains] = {scope: said(spectrum, cloud, scope) for scope in SCOPES}

    def kernel(scope: Scope, at: Sequence[float]) -> Seen | Abstains:
        found = spectra[scope]
        if isinstance(found, Abstains):
            return found
        return said(seen, cloud, scope, found.participation, particles, at, seed=seed)

    groupings: dict[str, Grouping | Abstains] = {"labels": said(by_labels, cloud)}
    if look_for_clusters:
        groupings |= {"clusters": said(by_clusters, cloud, "global", seed),
                      "clusters within class": said(by_clusters, cloud, "within class", seed)}
    return Portrait(
        cloud.over, cloud.stage, spectra, said(two_nn, cloud), said(classes, cloud),
        {scope: said(concentration, cloud, scope) for scope in SCOPES},
        {scope: kernel(scope, temperatures) for scope in SCOPES}, {scope: kernel(scope, GRID) for scope in SCOPES},
        groupings,
    )


def said(measure: Callable[P, T], *args: P.args, **more: P.kwargs) -> T | Abstains:
    """The measure, or, for data that it cannot be taken of, the reason in words."""
    try:
        return measure(*args, **more)
    except Refusal as refusal:
        return Abstains(str(refusal))

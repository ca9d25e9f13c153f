"""Paths from data to noise, conversions between predictions, laws and grids of time."""

from stillroom.paths.convert import Kind, combination, convert, sign_of, target
from stillroom.paths.path import VE, Coefficients, Cosine, Linear, Path, Tabulated, at_least_float32, between, expand
from stillroom.paths.times import (
    Law,
    LogitNormal,
    LogNormal,
    Restricted,
    Shifted,
    Uniform,
    dimension_shift,
    karras_grid,
    shift,
    uniform_grid,
)

__all__ = [
    "VE", "Coefficients", "Cosine", "Kind", "Law", "Linear", "LogNormal", "LogitNormal", "Path", "Restricted",
    "Shifted", "Tabulated", "Uniform", "at_least_float32", "between", "combination", "convert", "dimension_shift",
    "expand", "karras_grid", "shift", "sign_of", "target", "uniform_grid",
]

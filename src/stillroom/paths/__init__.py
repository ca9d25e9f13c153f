"""Paths from data to noise, conversions between predictions, laws and grids of time."""

from stillroom.paths.convert import Kind, combination, convert, sign_of, target
from stillroom.paths.path import VE, Coefficients, Cosine, Linear, Path, Tabulated, at_least_float32, between, expand
from stillroom.paths.plans import lower_edge
from stillroom.paths.subinterval import naive_target, subinterval_target
from stillroom.paths.times import (
    Clocked,
    Law,
    LawName,
    LogitNormal,
    LogNormal,
    Restricted,
    Shifted,
    Uniform,
    clock,
    clock_at,
    dimension_shift,
    karras_grid,
    law_of,
    shift,
    uniform_grid,
)

__all__ = [
    "VE", "Clocked", "Coefficients", "Cosine", "Kind", "Law", "LawName", "Linear", "LogNormal", "LogitNormal", "Path",
    "Restricted", "Shifted", "Tabulated", "Uniform", "at_least_float32", "between", "clock", "clock_at", "combination",
    "convert", "dimension_shift", "expand", "karras_grid", "law_of", "lower_edge", "naive_target", "shift", "sign_of",
    "subinterval_target", "target", "uniform_grid",
]

"""Measurements of tensors and callables. Nothing here learns."""

from stillroom.measure.samples import Modes, energy_distance, median_bandwidth, mmd2, modes, total_variation

__all__ = ["Modes", "energy_distance", "median_bandwidth", "mmd2", "modes", "total_variation"]

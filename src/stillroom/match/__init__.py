"""Matches: pure functions that say how far two things are apart, and which way to move."""

from stillroom.match.denoising import squared_error
from stillroom.match.gap import gap, pseudo_target, residual_weight

__all__ = ["gap", "pseudo_target", "residual_weight", "squared_error"]

"""Matches: pure functions that say how far two things are apart, and which way to move."""

from stillroom.match.alignment import marginal_cosine, marginal_distance
from stillroom.match.coverage import uncovered
from stillroom.match.denoising import pseudo_huber, squared_error
from stillroom.match.drift import (
    Drift,
    Weights,
    auto_temperatures,
    diagnose,
    drift,
    drift_loss,
    field,
    mean_shift,
    real_floor,
)
from stillroom.match.gap import MATCHES, direction, gap, pseudo_target, residual_weight
from stillroom.match.parzen import parzen_x0

__all__ = [
    "MATCHES", "Drift", "Weights", "auto_temperatures", "diagnose", "direction", "drift", "drift_loss", "field", "gap",
    "marginal_cosine", "marginal_distance", "mean_shift", "parzen_x0", "pseudo_huber", "pseudo_target", "real_floor",
    "residual_weight", "squared_error", "uncovered",
]

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
    drift_or_nan,
    field,
    mean_shift,
    real_floor,
)
from stillroom.match.gap import (
    MATCHES,
    Weight,
    augmentation,
    direction,
    gap,
    prediction_gap,
    pseudo_target,
    residual_weight,
)
from stillroom.match.parzen import parzen_x0
from stillroom.match.sid import score_identity
from stillroom.match.statistics import mean_and_variance, statistics_kl

__all__ = [
    "MATCHES", "Drift", "Weight", "Weights", "augmentation", "auto_temperatures", "diagnose", "direction", "drift",
    "drift_loss", "drift_or_nan", "field", "gap", "marginal_cosine", "marginal_distance", "mean_and_variance",
    "mean_shift", "parzen_x0", "prediction_gap", "pseudo_huber", "pseudo_target", "real_floor", "residual_weight",
    "score_identity", "squared_error", "statistics_kl", "uncovered",
]

"""Drifting (Deng et al. 2026, arXiv 2602.04770): samples x are drawn to positives y+ and driven from negatives y-.

    V(x_i) = sum_j D_ij y_j,    D_ij = A_ij sum_(k in y-) A_ik for positives, -A_ij sum_(k in y+) A_ik for negatives
    loss   = |x/s - sg(x/s + sum_R V_R / rms V_R)|^2,      s = mean distance / sqrt(C)

A is the affinity of x_i to y_j at temperature R, a part of the mean distance: the root of its softmax over targets
times its softmax over samples. Samples are their own negatives. Rows of D sum to zero: only differences are seen.
"""

from stillroom.match.drift.affinity import Coupling, Kernel, mean_shift
from stillroom.match.drift.field import RELEASED, Drift, drift, drift_loss, drift_or_nan, field
from stillroom.match.drift.looks import auto_temperatures, diagnose, real_floor, temperature_for
from stillroom.match.drift.problems import Weights

__all__ = [
    "RELEASED", "Coupling", "Drift", "Kernel", "Weights", "auto_temperatures", "diagnose", "drift", "drift_loss",
    "drift_or_nan", "field", "mean_shift", "real_floor", "temperature_for",
]

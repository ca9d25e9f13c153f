"""Measurements of tensors and callables. Nothing here learns."""

from stillroom.measure.bootstrap import (
    Interval,
    SweetSpot,
    difference_interval,
    mean_interval,
    sweet_spot,
    sweet_spot_gap,
)
from stillroom.measure.coverage import Overlap, overlap
from stillroom.measure.distances import Kid, Paired, kid, paired_error, sliced_wasserstein
from stillroom.measure.frechet import Moments, distance_between, frechet_distance, moments_of
from stillroom.measure.geometry import Cloud, cloud_of, participation_ratio, spectrum
from stillroom.measure.images import as_8bit, gmsd, high_frequency_ratio, ms_ssim, mse, psnr, ssim
from stillroom.measure.inception import FidInception
from stillroom.measure.metrics import METRICS, panel
from stillroom.measure.perceptual import Lpips, RandomFeatures, feature_distance_of, pooled
from stillroom.measure.portrait import portrait
from stillroom.measure.reference import Statistics, read_statistics
from stillroom.measure.samples import (
    Held,
    Modes,
    energy_distance,
    held_modes,
    median_bandwidth,
    mmd2,
    modes,
    total_variation,
)
from stillroom.measure.trajectory import trajectories

__all__ = [
    "METRICS", "Cloud", "FidInception", "Held", "Interval", "Kid", "Lpips", "Modes", "Moments", "Overlap", "Paired",
    "RandomFeatures", "Statistics", "SweetSpot", "as_8bit", "cloud_of", "difference_interval", "distance_between",
    "energy_distance", "feature_distance_of", "frechet_distance", "gmsd", "held_modes",
    "high_frequency_ratio", "kid", "mean_interval", "median_bandwidth", "mmd2", "modes", "moments_of", "ms_ssim",
    "mse", "overlap", "paired_error", "panel", "participation_ratio", "pooled", "portrait", "psnr",
    "read_statistics", "sliced_wasserstein", "spectrum", "ssim", "sweet_spot", "sweet_spot_gap", "total_variation",
    "trajectories",
]

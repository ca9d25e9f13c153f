"""Measurements of tensors and callables. Nothing here learns."""

from stillroom.measure.bootstrap import (
    Interval,
    SweetSpot,
    difference_interval,
    mean_interval,
    sweet_spot,
    sweet_spot_gap,
)
from stillroom.measure.frechet import Moments, distance_between, fid_of, frechet_distance, moments_of
from stillroom.measure.images import as_8bit, gmsd, high_frequency_ratio, ms_ssim, mse, psnr, ssim
from stillroom.measure.inception import FidInception
from stillroom.measure.perceptual import Lpips, RandomFeatures, feature_distance_of, pooled
from stillroom.measure.samples import Modes, energy_distance, median_bandwidth, mmd2, modes, total_variation

__all__ = [
    "FidInception", "Interval", "Lpips", "Modes", "Moments", "RandomFeatures", "SweetSpot", "as_8bit",
    "difference_interval", "distance_between", "energy_distance", "feature_distance_of", "fid_of", "frechet_distance",
    "gmsd", "high_frequency_ratio", "mean_interval", "median_bandwidth", "mmd2", "modes", "moments_of", "ms_ssim",
    "mse", "pooled", "psnr", "ssim", "sweet_spot", "sweet_spot_gap", "total_variation",
]

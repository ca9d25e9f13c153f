"""Oracles of the distances between pictures: scikit-image, the published formulas in float64, closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stillroom.measure import images
from stillroom.measure.images import (
    LEVELS,
    MS_SSIM_SMALLEST,
    as_8bit,
    gmsd,
    high_frequency_ratio,
    ms_ssim,
    mse,
    psnr,
    ssim,
)
from stillroom.settings import Refusal

MEASURES = [mse, psnr, ssim, ms_ssim, gmsd, high_frequency_ratio]
each_measure = pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)


def photograph(height=200, width=230):
    x = torch.from_numpy(data.astronaut()[60 : 60 + height, 100 : 100 + width].copy()).permute(2, 0, 1)
    return x[None].float() / 127.5 - 1


def damaged(x, noise=0.1, seed=0):
    """A little blurred and noisy."""
    y = 0.5 * (x + x.roll(1, -1)) + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return y.clamp(-1, 1)


def unit(x):
    """[1, 3, H, W] -> float64 [H, W, 3] in [0, 1], as scikit-image and the papers count."""
    return (x[0].double().permute(1, 2, 0).numpy() + 1) / 2


def test_psnr_and_ssim_are_scikit_images():
    x = photograph()
    for noise in (0.02, 0.1, 0.5):
        y = damaged(x, noise)
        assert math.isclose(float(psnr(y, x)), peak_signal_noise_ratio(unit(x), unit(y), data_range=1), abs_tol=1e-4)
        theirs = structural_similarity(unit(x), unit(y), gaussian_weights=True, use_sample_covariance=False,
                                       data_range=1, channel_axis=2)
        assert math.isclose(float(ssim(y, x)), theirs, abs_tol=1e-5)


def test_ssim_rounds_little_in_flat_regions():
    """Variances as differences of squares lose what is small beside a mean: flat regions far from grey are the test."""
    x = torch.full((1, 3, 40, 40), 0.97)
    y = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    theirs = structural_similarity(unit(x), unit(y), gaussian_weights=True, use_sample_covariance=False, data_range=1,
                                   channel_axis=2)
    assert math.isclose(float(ssim(x, y)), theirs, abs_tol=2e-4)


def ms_ssim_in_float64(x, y):
    """Wang et al. 2003 on planes in [0, 1]: window 11, 2 x 2 means of the mirrored picture, every second pixel."""
    away = np.arange(-5, 6)
    g = np.exp(-(away**2) / 4.5)
    window = np.outer(g, g) / g.sum() ** 2

    def blurred(a):
        return signal.convolve2d(a, window, mode="valid")

    def halved(a):
        return ndimage.correlate(a, np.full((2, 2), 0.25), mode="reflect", origin=-1)[::2, ::2]

    product = 1.0
    for level, exponent in enumerate(LEVELS):
        x, y = (halved(x), halved(y)) if level else (x, y)
        mx, my = blurred(x), blurred(y)
        vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
        structure = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        product *= (luminance * structure if level == 4 else structure).mean() ** exponent
    return product


@pytest.mark.parametrize("size", [(161, 161), (176, 192), (173, 205)])
def test_ms_ssim_is_the_published_formula(size):
    x = photograph(*size)
    y = damaged(x, 0.2)
    exact = np.mean([ms_ssim_in_float64(unit(x)[..., c], unit(y)[..., c]) for c in range(3)])
    assert math.isclose(float(ms_ssim(y, x)), exact, abs_tol=1e-5)


def test_ms_ssim_of_a_negative_is_nothing():
    noise = torch.rand(1, 1, 170, 170, generator=torch.Generator().manual_seed(0)) - 0.5
    assert float(ms_ssim(noise, -noise)) == 0.0
    assert float(ssim(noise, -noise)) < -0.5


def gmsd_in_float64(x, y):
    """Xue et al. 2014 on [H, W, 3] in [0, 1]."""
    def similarity(a, b):
        return (2 * a * b + 170) / (a**2 + b**2 + 170)

    def gradient(a):
        grey = signal.convolve2d(255 * a @ np.array([0.299, 0.587, 0.114]), np.full((2, 2), 0.25))[1:, 1:][::2, ::2]
        prewitt = np.array([[1, 0, -1]] * 3) / 3
        return np.hypot(*(signal.convolve2d(grey, k, mode="same") for k in (prewitt, prewitt.T)))

    return similarity(gradient(x), gradient(y)).std(ddof=1)


@pytest.mark.parametrize("size", [(64, 80), (63, 51)])
def test_gmsd_is_the_published_formula(size):
    x = photograph(*size)
    for noise in (0.0, 0.1, 0.4):
        y = damaged(x, noise)
        assert math.isclose(float(gmsd(x, y)), gmsd_in_float64(unit(x), unit(y)), abs_tol=1e-5)
    assert float(gmsd(x, x)) == 0.0
    grey = x.mean(1, keepdim=True)
    y = damaged(grey)
    assert torch.allclose(gmsd(grey, y), gmsd(grey.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)), atol=1e-5)


def waves(*of, size=(64, 48)):
    """Sum of amplitude * cos(2 pi (fy y + fx x)), frequencies in cycles per pixel."""
    y, x = torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij")
    return sum(a * torch.cos(2 * math.pi * (fy * y + fx * x) + 0.3) for a, fy, fx in of)[None, None].expand(1, 3, *size)


def test_high_frequency_energy_counts_above_half_nyquist_only():
    low = (0.4, 0.1, 0.05)
    for fy, fx in ((0.0, 0.4), (0.4, 0.0), (0.25, 0.25), (0.5, 0.5), (-0.3, 0.1)):
        reference = waves(low, (0.3, fy, fx))
        assert math.isclose(float(high_frequency_ratio(waves(low, (0.1, fy, fx)), reference)), 1 / 9, rel_tol=1e-3)
    reference = waves(low, (0.3, 0.0, 0.4))
    for (fy, fx), share in (((0.1, 0.15), 0.0), ((0.2, 0.25), 1.0)):        # |f| = 0.18 lies below, 0.32 above
        assert math.isclose(float(high_frequency_ratio(waves((0.3, fy, fx)), reference)), share, abs_tol=2e-3)


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (51, 64)])
def test_high_frequency_energy_knows_no_direction(size):
    x, y = photograph(*size), damaged(photograph(*size))
    ratio = high_frequency_ratio(y, x)
    assert torch.allclose(ratio, high_frequency_ratio(y.mT, x.mT), rtol=1e-4)      # the half spectrum is weighed right
    assert torch.allclose(ratio, high_frequency_ratio(y.flip(-1), x.flip(-1)), rtol=1e-4)
    assert torch.allclose(high_frequency_ratio(0.5 * x + 0.2, x), torch.tensor(0.25), rtol=1e-4)
    assert float(high_frequency_ratio(0.5 * (x + x.roll(1, -1)), x)) < 1 < float(high_frequency_ratio(damaged(x), x))


def test_opposite_edges_are_no_detail():
    """A ramp has no detail, but as one period of a wave it jumps."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert float(high_frequency_ratio(ramp, ramp + 0.02 * torch.randn(ramp.shape))) < 1e-3


def test_8_bits_are_what_a_file_holds():
    levels = torch.arange(256).float() / 127.5 - 1
    assert torch.allclose(as_8bit(levels), levels, atol=1e-7)
    x = 1.2 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(((as_8bit(x) + 1) * 127.5).round().to(torch.uint8), pixels)
    assert torch.equal(as_8bit(as_8bit(x)), as_8bit(x))
    assert float((as_8bit(x) - x.clamp(-1, 1)).abs().max()) <= 0.5 / 127.5 + 1e-6


@each_measure
def test_measures_answer_image_by_image(measure):
    x = torch.cat([photograph(), photograph().flip(-1), photograph().roll(40, -2)])
    y = torch.cat([damaged(x[:1], 0.05), damaged(x[1:2], 0.1), damaged(x[2:], 0.3)])
    together = measure(y, x)
    assert together.shape == (3,) and together.dtype == torch.float32
    assert torch.allclose(together, torch.cat([measure(y[i : i + 1], x[i : i + 1]) for i in range(3)]), rtol=1e-5)
    inside = measure(y.to(memory_format=torch.channels_last), x)
    assert torch.allclose(together, inside, rtol=1e-5)      # codecs answer in either order of memory
    if measure is not high_frequency_ratio:
        assert torch.allclose(together, measure(x, y), rtol=1e-5)


@each_measure
def test_equal_pictures_are_at_the_optimum(measure):
    x = photograph()
    best = {mse: 0.0, psnr: math.inf, gmsd: 0.0}.get(measure, 1.0)
    assert float(measure(x, x)) == pytest.approx(best, abs=1e-6)
    assert float(measure(x.bfloat16(), x.bfloat16())) == pytest.approx(best, abs=1e-6)


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 4, 5)
    y = torch.stack([torch.full((3, 4, 5), 0.2), torch.full((3, 4, 5), -2.0)])
    assert torch.allclose(mse(x, y), torch.tensor([0.04, 4.0]))
    assert torch.allclose(psnr(x, y), torch.tensor([20.0, 0.0]), atol=1e-5)


@each_measure
def test_what_cannot_be_compared_is_refused(measure):
    x = photograph()
    with pytest.raises(Refusal, match=r"\[1, 3, 200, 230\]"):
        measure(x, x[..., :-1])
    with pytest.raises(Refusal, match="floats"):
        measure(x, (127 * x).to(torch.uint8))
    with pytest.raises(Refusal):
        measure(x[0], x[0])


def test_small_pictures_have_no_ms_ssim():
    assert MS_SSIM_SMALLEST == 161
    with pytest.raises(Refusal, match="161"):
        ms_ssim(photograph(160, 200), photograph(160, 200))
    with pytest.raises(Refusal, match="11 or more"):
        ssim(photograph(10, 200), photograph(10, 200))
    with pytest.raises(Refusal, match="luminance"):
        gmsd(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))


def test_the_blur_is_in_full_precision_on_an_accelerator_too(monkeypatch):
    conv2d, seen = images.functional.conv2d, []

    def asked(*given, **how):
        seen.append(torch.backends.cudnn.allow_tf32)
        return conv2d(*given, **how)

    monkeypatch.setattr(images.functional, "conv2d", asked)
    before = torch.backends.cudnn.allow_tf32
    ssim(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16))
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32 == before

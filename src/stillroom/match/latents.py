"""Distances of a student codec from its teacher: of latents, posteriors, feature maps, and of what is decoded.

Latents [B, C, h, w] stand on the diffusion side, where channels have a variance of about 1. Every function answers one
number per picture, [B], in float32 (float64 of float64), whatever the inputs' precision: means over elements, so that
terms keep their size when pictures grow, unless a sum is named. Decoders and feature nets come as callables.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.paths import at_least_float32

LOGVAR = 40.0       # exp of it, squared, still fits float32; codecs answer within [-30, 20]
ROUNDING = 1e-6     # less than the high-frequency energy of rounding to 8 bits, 5e-6
FLAT = 1e-6         # keeps a root's gradient finite where a map is constant


def latent_mse(student: Tensor, teacher: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared error, in units of `scale` where it is given: the teacher's deviation per channel, [C]."""
    return per_picture(difference(student, teacher, scale).square())


def latent_l1(student: Tensor, teacher: Tensor, scale: Tensor | None = None) -> Tensor:
    return per_picture(difference(student, teacher, scale).abs())


def latent_huber(student: Tensor, teacher: Tensor, scale: Tensor | None = None, delta: float = 0.15) -> Tensor:
    """e^2 / 2 up to delta, delta (|e| - delta / 2) beyond."""
    e = difference(student, teacher, scale)
    return per_picture(F.huber_loss(e, torch.zeros_like(e), reduction="none", delta=delta))


def posterior_kl(mean: Tensor, logvar: Tensor, mean_t: Tensor, logvar_t: Tensor, floor: float = 0.01) -> Tensor:
    """KL(S || T) of diagonal Gaussians once both carry white noise of variance `floor`, per latent.

    KL codecs answer variances down to e^-30, by which any error of the mean would be divided. Noise on both sides
    bounds that and leaves equals at 0; a floor under the teacher's variance alone would teach a wrong variance.
    """
    log_floor = bounded(logvar).new_tensor(math.log(floor) if floor > 0 else -math.inf)
    log_s, log_t = (torch.logaddexp(bounded(v), log_floor) for v in (logvar, logvar_t))
    ratio = log_s - log_t
    return per_picture(0.5 * (difference(mean, mean_t).square() * (-log_t).exp() + ratio.expm1() - ratio))


def unit_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q || N(0, 1)), summed over a picture's latents."""
    mean, logvar = at_least_float32(mean), bounded(logvar)
    return 0.5 * (mean.square() + logvar.expm1() - logvar).flatten(1).sum(1)


def wasserstein2(mean: Tensor, logvar: Tensor, mean_t: Tensor, logvar_t: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of diagonal Gaussians, per latent: (mu_S - mu_T)^2 + (s_S - s_T)^2."""
    deviation, deviation_t = ((bounded(v) / 2).exp() for v in (logvar, logvar_t))
    return per_picture(difference(mean, mean_t).square() + difference(deviation, deviation_t).square())


def statistics_distance(student: Tensor, teacher: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared differences of every channel's mean and deviation over the picture: what drifts with resolution."""
    moments = []
    for z in (student, teacher):
        z = at_least_float32(z) if scale is None else at_least_float32(z) / scale.reshape(-1, 1, 1)
        var, mean = torch.var_mean(z.flatten(2), dim=2, correction=0)       # [B, C, h, w] -> [B, C]
        moments.append((mean, (var + FLAT).sqrt()))
    (mean, deviation), (mean_t, deviation_t) = moments
    return per_picture(difference(mean, mean_t).square() + difference(deviation, deviation_t).square())


def feature_distance(maps: Sequence[Tensor], targets: Sequence[Tensor], border: float = 0.0) -> Tensor:
    """Mean over the maps of their L1 distances. `border` leaves that share of every side out: near corners, zero
    padding shapes a decoder's features, and a student that copies them there draws blobs."""
    if not 0 <= border < 0.5:
        raise ValueError(f"border {border}: a share of the side, below one half")
    distances = []
    for a, b in zip(maps, targets, strict=True):
        top, left = (int(border * n) for n in a.shape[-2:])
        inner = (..., slice(top, a.shape[-2] - top), slice(left, a.shape[-1] - left))
        distances.append(per_picture(difference(a[inner], b[inner]).abs()))
    return torch.stack(distances).mean(0)


def pixel_error(x: Tensor, reference: Tensor, l1: float = 1.0, mse: float = 1.0) -> Tensor:
    """l1 |x - reference| + mse (x - reference)^2."""
    e = difference(x, reference)
    return per_picture(l1 * e.abs() + mse * e.square())


def high_frequency_energy(x: Tensor) -> Tensor:
    """Mean square of x less its binomial blur (1, 2, 1)/4 x (1, 2, 1)/4, whose gain is 1 - cos^2(u/2) cos^2(v/2).

    By slices: a convolution would run in bfloat16 under autocast, and this is a small difference of large numbers.
    """
    x = at_least_float32(x)
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    p = (p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]) / 4
    p = (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 4
    return per_picture((x - p).square())


def blur(x: Tensor, reference: Tensor) -> Tensor:
    """max(0, 1 - E(x) / E(reference)), E the high-frequency energy: 0 for what is as sharp or sharper, 1 for flat."""
    energy, wanted = high_frequency_energy(x), high_frequency_energy(reference)
    return difference(wanted, energy).relu() / (wanted + ROUNDING)


def difference(a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)}: they must be equal")     # it would broadcast
    e = at_least_float32(a) - at_least_float32(b)
    return e if scale is None else e / scale.reshape(-1, 1, 1)


def bounded(logvar: Tensor) -> Tensor:
    return at_least_float32(logvar).clamp(-LOGVAR, LOGVAR)


def per_picture(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)

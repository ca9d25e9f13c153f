"""Latents that are like features: the two terms of VA-VAE (Yao & Wang 2025, arXiv 2501.01423), each with a margin up to
which a difference is free.

Maps are [B, C, h, w], of one grid; every function answers [B], in float32 (float64 of float64). What balances them
against a reconstruction is `match.adversarial.adaptive_weight`, of gradients at the encoder's last layer.
"""

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.paths import at_least_float32

TINY = 1e-6     # of a length, below which a vector has no direction: cosines with it tend to 0, and so do gradients


def marginal_cosine(projected: Tensor, features: Tensor, margin: float = 0.5) -> Tensor:
    """Mean over places of max(0, 1 - margin - cos(W z_ij, f_ij)), with W z [B, C, h, w] in the features' space."""
    require_alike(projected, features, 1)
    cosine = (directions(projected) * directions(features)).sum(1)                  # [B, N]
    return (1 - margin - cosine).relu().mean(1)


def marginal_distance(z: Tensor, features: Tensor, margin: float = 0.25) -> Tensor:
    """Mean over pairs of a picture's places of max(0, |cos(z_i, z_j) - cos(f_i, f_j)| - margin): the two maps may have
    any numbers of channels. It costs two matrices of (h w)^2 numbers a picture."""
    require_alike(z, features, 2)
    return ((cosines(z) - cosines(features)).abs() - margin).relu().flatten(1).mean(1)


def cosines(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, N, N], between all places."""
    u = directions(x)
    with torch.autocast(u.device.type, enabled=False):      # where a product of matrices would be bfloat16
        return u.transpose(1, 2) @ u


def directions(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, N], of length 1 at every place."""
    x = at_least_float32(x).flatten(2)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=TINY)


def on_grid(features: Tensor, height: int, width: int) -> Tensor:
    """Feature maps at another number of places, as pictures are resized; as they are where the grid is that one."""
    if tuple(features.shape[-2:]) == (height, width):
        return features
    return functional.interpolate(features.float(), (height, width), mode="bilinear", antialias=True,
                                  align_corners=False)


def require_alike(a: Tensor, b: Tensor, first: int) -> None:
    """One number of pictures and one grid; from axis `first` = 1 on, one number of channels too."""
    if a.ndim != 4 or a.shape[0] != b.shape[0] or a.shape[first:] != b.shape[first:]:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)}: maps of one grid, for the same pictures")

"""Denoisers in closed form: exact targets for experiments, and the oracles of the tests."""

import functools
import math

import torch
from torch import Tensor

from stillroom.flows.denoiser import Denoises
from stillroom.nets.build import buildable
from stillroom.paths import Linear, Path


def exact(forward):
    """Autocast is for networks: a matrix product in bfloat16 would make a closed form wrong in the third digit."""

    @functools.wraps(forward)
    def without_autocast(self, x_t, t, y=None):
        with torch.autocast(x_t.device.type, enabled=False):
            return forward(self, x_t, t, y)

    return without_autocast


@buildable
class Gaussian(Denoises):
    """Data N(mean, covariance), flattened to [B, D]. E[x0 | x_t] = mean + a S (a^2 S + s^2)^-1 (x_t - a mean)."""

    prediction = "x0"
    classes = None
    mean: Tensor
    values: Tensor
    vectors: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor, path: Path | None = None):
        super().__init__()
        self.path = path or Linear()
        values, vectors = torch.linalg.eigh(covariance)
        for name, buffer in {"mean": mean, "values": values.clamp(min=0), "vectors": vectors}.items():
            self.register_buffer(name, buffer)

    @exact
    def forward(self, x_t, t, y=None):
        c = self.path.over(t, x_t.flatten(1))
        deviation = (x_t.flatten(1) - c.alpha * self.mean) @ self.vectors  # [B, D], in the eigenbasis
        variance = c.alpha**2 * self.values + c.sigma**2
        gain = torch.where(variance > 0, c.alpha * self.values / variance, 0.0)
        return (self.mean + (gain * deviation) @ self.vectors.T).reshape(x_t.shape)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        c = self.path.over(t, x_t)
        variance = c.alpha**2 * self.values + c.sigma**2
        z2 = ((x_t - c.alpha * self.mean) @ self.vectors) ** 2 / variance
        return -0.5 * (z2 + variance.log() + math.log(2 * math.pi)).sum(1)

    def draw(self, noise: Tensor) -> Tensor:
        """Data from standard normal noise [N, D]."""
        return self.mean + (noise * self.values.sqrt()) @ self.vectors.T


@buildable
class Mixture(Denoises):
    """K isotropic Gaussians. With labels, the class y keeps its own components; the null label keeps all."""

    prediction = "x0"
    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None, labels: Tensor | None = None,
                 path: Path | None = None):
        super().__init__()
        k = len(means)
        weights = torch.full((k,), 1 / k, dtype=means.dtype) if weights is None else weights / weights.sum()
        self.path = path or Linear()
        self.classes = None if labels is None else int(labels.max()) + 1
        labels = torch.zeros(k, dtype=torch.long) if labels is None else labels
        for name, buffer in {"means": means, "stds": stds, "weights": weights, "labels": labels}.items():
            self.register_buffer(name, buffer)

    @staticmethod
    def ring(modes: int, radius: float = 1.0, std: float = 0.1, path: Path | None = None) -> "Mixture":
        angle = torch.arange(modes) * (2 * math.pi / modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return Mixture(means, torch.full((modes,), std), labels=torch.arange(modes), path=path)

    def log_joint(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, K]: log of weight times density of every component, minus infinity for those of other classes."""
        c = self.path.at(t)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        variance = (alpha * self.stds) ** 2 + sigma**2  # [B, K]
        # Not through cdist: its gradient, which the score's test takes, is undefined at zero distance.
        distance2 = (x_t[:, None] - alpha[..., None] * self.means).square().sum(-1)
        log = self.weights.log() - distance2 / (2 * variance) - x_t.shape[1] / 2 * (2 * math.pi * variance).log()
        if y is None or self.classes is None:
            return log
        kept = (y[:, None] == self.labels) | (y[:, None] == self.classes)
        return log.masked_fill(~kept, -math.inf)

    def log_density(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Up to log p(y), a constant in x."""
        return self.log_joint(x_t, t, y).logsumexp(1)

    @exact
    def forward(self, x_t, t, y=None):
        responsibility = self.log_joint(x_t, t, y).softmax(1)  # [B, K]
        c = self.path.at(t)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        gain = alpha * self.stds**2 / ((alpha * self.stds) ** 2 + sigma**2)  # [B, K]
        # sum_k r_k (mu_k + g_k (x - a mu_k))
        keep = responsibility * (1 - alpha * gain)
        return keep @ self.means + (responsibility * gain).sum(1, keepdim=True) * x_t

    def place(self, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Points and their classes, from normal noise [N, D] and uniform numbers [N] that choose the components."""
        below = u.to(self.weights) * (1 - 1e-6)  # the weights sum to 1 but for rounding
        k = torch.searchsorted(self.weights.cumsum(0), below)
        return self.means[k] + self.stds[k, None] * noise, self.labels[k]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points and their classes."""
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.place(noise, torch.rand(n, generator=generator))

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


def framed(ask):
    """Times [B, frames] of x_t [B, frames, ...]: every frame is asked as a sample, with the label of its own sample."""

    @functools.wraps(ask)
    def asked(self, x_t, t, y=None):
        if t.ndim < 2:
            return ask(self, x_t, t, y)
        if t.shape != x_t.shape[: t.ndim]:
            raise ValueError(f"t has shape {tuple(t.shape)}: expected the leading shape of x_t {tuple(x_t.shape)}")
        labels = None if y is None else y.repeat_interleave(t[0].numel())
        return ask(self, x_t.flatten(0, t.ndim - 1), t.flatten(), labels).unflatten(0, t.shape)

    return asked


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
    @framed
    def forward(self, x_t, t, y=None):
        c = self.path.over(t, x_t.flatten(1))
        deviation = (x_t.flatten(1) - c.alpha * self.mean) @ self.vectors  # [B, D], in the eigenbasis
        variance = c.alpha**2 * self.values + c.sigma**2
        gain = torch.where(variance > 0, c.alpha * self.values / variance, 0.0)
        return (self.mean + (gain * deviation) @ self.vectors.T).reshape(x_t.shape)

    @framed
    def log_density(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.path.over(t, x_t)
        variance = c.alpha**2 * self.values + c.sigma**2
        z2 = ((x_t - c.alpha * self.mean) @ self.vectors) ** 2 / variance
        return -0.5 * (z2 + variance.log() + math.log(2 * math.pi)).sum(1)

    def draw(self, noise: Tensor) -> Tensor:
        """Data from standard normal noise [N, D]."""
        return self.mean + (noise * self.values.sqrt()) @ self.vectors.T


@buildable
class Mixture(Denoises):
    """K isotropic Gaussians. With labels, the class y keeps its own components; the null label keeps all.

    Two matrix products an answer, [B, D] by [D, K] and back, the first in float64; no tensor of B K D numbers. With
    5000 components of 4096 numbers, 64 answers take a quarter of a second of one core (0.2 GB: means in float64).
    """

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

    @staticmethod
    def grid(side: int, half: float = 1.0, std: float = 0.1, path: Path | None = None) -> "Mixture":
        """side^2 modes, evenly spaced over a square of half the side `half`; each is a class."""
        line = torch.linspace(-half, half, side) if side > 1 else torch.zeros(1)
        means = torch.cartesian_prod(line, line)
        return Mixture(means, torch.full((side**2,), std), labels=torch.arange(side**2), path=path)

    def log_joint(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, K] in float64: log of weight times density of every component, minus infinity for those of other classes.

        |x - a mu|^2 is expanded, which costs digits that float32 has not: at t near 0 it is divided by little, and
        between components that differ by 1 in a log of thousands a softmax shall still choose.
        """
        if x_t.ndim != 2:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}: a mixture is of points, [B, D]; of frames, "
                             "[B, frames, D], give a time for each")
        c = self.path.at(t)
        alpha, sigma = c.alpha.double()[:, None], c.sigma.double()[:, None]
        means, x = self.means.double(), x_t.double()
        variance = (alpha * self.stds) ** 2 + sigma**2  # [B, K]
        square = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha**2 * means.square().sum(1)
        constant = self.weights.log() - x_t.shape[1] / 2 * (2 * math.pi * variance).log()
        log = constant - square / (2 * variance)
        if y is None or self.classes is None:
            return log
        return log.masked_fill(~self.kept(y), -math.inf)

    def kept(self, y: Tensor) -> Tensor:
        """[B, K]: which components are of the class."""
        return (y[:, None] == self.labels) | (y[:, None] == self.classes)

    @framed
    def log_density(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Up to log p(y), a constant in x."""
        return self.log_joint(x_t, t, y).logsumexp(1).to(x_t.dtype)

    @exact
    @framed
    def forward(self, x_t, t, y=None):
        responsibility = self.log_joint(x_t, t, y).softmax(1).to(x_t.dtype)
        c = self.path.at(t)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        gain = alpha * self.stds**2 / ((alpha * self.stds) ** 2 + sigma**2)  # [B, K]
        # sum_k r_k (mu_k + g_k (x - a mu_k))
        keep = responsibility * (1 - alpha * gain)
        return keep @ self.means.to(keep) + (responsibility * gain).sum(1, keepdim=True) * x_t

    def place(self, noise: Tensor, u: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points and their classes, from normal noise [N, D] and uniform numbers [N] that choose the components: of the
        classes y [N], if they are given."""
        below = u.to(self.weights) * (1 - 1e-6)  # the weights sum to 1 but for rounding
        if y is None or self.classes is None:
            k = torch.searchsorted(self.weights.cumsum(0), below)
        else:
            upto = (self.weights * self.kept(y)).cumsum(1)  # [N, K]
            k = torch.searchsorted(upto, (below * upto[:, -1])[:, None], right=True)[:, 0]
        return self.means[k] + self.stds[k, None] * noise, self.labels[k]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points and their classes."""
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.place(noise, torch.rand(n, generator=generator))


@buildable
class Shaped(Denoises):
    """A denoiser of points [B, D], asked for [B, C, h, w] of as many numbers; or by frames, [B, frames, ...]."""

    def __init__(self, denoiser: Denoises):
        super().__init__()
        self.denoiser = denoiser
        self.path, self.prediction, self.classes = denoiser.path, denoiser.prediction, denoiser.classes

    def forward(self, x_t, t, y=None):
        return self.denoiser(x_t.flatten(t.ndim), t, y).reshape(x_t.shape)

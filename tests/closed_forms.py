"""Exact denoisers, nets of a known answer and nets that nothing leaves untouched, for the tests of flows and
samplers."""

import pytest
import torch
from torch import nn

from stillroom.flows import Denoiser, Denoises, Gaussian, Mixture
from stillroom.paths import VE, Cosine, Linear, Tabulated, uniform_grid

F64 = torch.float64
PATHS = [Linear(), Cosine(), Tabulated.ddpm(), VE(10.0)]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def plan(steps: int, s: float = 1.0) -> tuple[float, ...]:
    """Times of so many equal steps from noise to data, shifted."""
    return tuple(uniform_grid(steps, s=s).tolist())


def gaussian(path=None, dim=3):
    a = draws(dim, dim, seed=1)
    return Gaussian(draws(dim, seed=2), a @ a.T / dim + 0.05 * torch.eye(dim, dtype=F64), path)


def mixture(path=None, dim=2):
    labels = torch.tensor([0, 1, 0, 2, 1])
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.5], dtype=F64)
    return Mixture(2 * draws(5, dim, seed=3), 0.2 + draws(5, seed=4).abs(), weights, labels, path)


class Answer(nn.Module):
    """A net that answers by a function, for denoisers of a known answer."""

    two_times = False

    def __init__(self, function, classes=None):
        super().__init__()
        self.function, self.classes = function, classes

    def forward(self, x_t, t, y=None):
        return self.function(x_t, t, y)


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that are nowhere zero, so that every input tells."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return net


def natively(exact: Denoises, kind) -> Denoiser:
    """The exact denoiser as a net of prediction `kind` would give it."""
    return Denoiser(Answer(lambda x, t, y: exact.predict(kind, x, t, y), exact.classes), exact.path, kind)

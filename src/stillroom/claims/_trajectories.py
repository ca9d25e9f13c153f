"""Where a flow's trajectories end, and how far from there others come that begin at the same noise."""

from functools import cache

import torch
from torch import Tensor

from stillroom import train
from stillroom.flows import Flow, ddim, noise_of
from stillroom.paths import uniform_grid
from stillroom.settings import seed_of

N, EXACT = 1000, 400


def drawn_from(seed: int) -> int:
    """The seed of the noise by which all arms are compared; no run was trained with it."""
    return seed_of(seed, "compared")


@cache
def ends(place: str, seed: int, steps: int = EXACT) -> Tensor:
    """[N, *shape]: of the flow of this run, in so many DDIM steps."""
    flow = train.load(place)
    assert isinstance(flow, Flow)
    start = noise_of(flow.shape, 0, N, drawn_from(seed))
    return ddim(flow.denoiser, start, uniform_grid(steps), flow.labels(0, N))


def apart(x: Tensor, y: Tensor) -> float:
    """The mean distance of samples from those of the same noise."""
    return float(torch.linalg.vector_norm((x - y).flatten(1), dim=1).mean())

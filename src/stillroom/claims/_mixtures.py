"""Mixtures whose modes are classes, and small flows that learned to draw them: ground of the claims on students.

A closed form is the better teacher, and has no network for a student to start from: the flow then is its origin only.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from stillroom.claims.run import run_in, shared_place
from stillroom.flows import Mixture
from stillroom.measure import energy_distance
from stillroom.recipes.flow import FlowMatching
from stillroom.settings import Optimizer, seed_of
from stillroom.train.teacher import open_teacher


def mixture(spec: str) -> Mixture:
    """Of a teacher's name, as `ring:8:0.15`."""
    closed = open_teacher(spec).denoiser
    assert isinstance(closed, Mixture)
    return closed


def draw(spec: str, n: int, *seed: int | str) -> tuple[Tensor, Tensor]:
    """n points and their classes."""
    return mixture(spec).draw(n, torch.Generator().manual_seed(seed_of(*seed)))


@cache
def flow_on(spec: str, seed: int, steps: int = 3000, width: int = 128, depth: int = 3, labelled: bool = True) -> str:
    """The run of a flow, class-conditional if labelled, that learned from 20,000 draws. Made once in a process."""
    x, y = draw(spec, 20_000, "flow", seed)
    name = f"{spec}-{seed}-{steps}-{width}-{depth}-{labelled}".replace(":", "-")
    return flow_of(name, (x, y) if labelled else x, seed, steps, width, depth)


def flow_of(name: str, data: Any, seed: int, steps: int, width: int = 128, depth: int = 3) -> str:
    """The run of that name, which learned from these points, or points and classes."""
    rate = Optimizer(lr=2e-3, clip=1.0, warmup=100, decay="cosine")
    return str(run_in(shared_place() / name, FlowMatching, {"data": data}, data="given", size=1, width=width,
                      depth=depth, batch=256, steps=steps, model=rate, average=0.995, seed=seed, log_every=500))


def far(x: Tensor, spec: str) -> float:
    """Energy distance of samples to 4000 draws, whatever their classes."""
    return float(energy_distance(x, draw(spec, 4000, "reference")[0]))


def far_by_class(x: Tensor, y: Tensor, spec: str) -> float:
    """The mean over classes of the energy distance to 2000 draws or so of each."""
    real, labels = draw(spec, 2000 * len(y.unique()), "reference by class")
    found = [energy_distance(x[y == c], real[labels == c]) for c in y.unique()]
    return float(torch.stack(found).mean())


def spread(x: Tensor, y: Tensor) -> float:
    """Standard deviation within classes, over classes and coordinates."""
    own = [x[y == c] - x[y == c].mean(0) for c in y.unique()]
    return float(torch.cat(own).square().mean().sqrt())

"""Plans of a few steps: the times at which a student is asked, and the segments between them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stillroom.paths.times import uniform_grid


def plan(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """steps + 1 times from noise to data, evenly spaced before the shift."""
    return tuple(uniform_grid(steps, s=shift).tolist())


def lower_edge(t: Tensor, times: Sequence[float]) -> Tensor:
    """[B]: the end of the segment of the plan that each t lies in, t itself excluded: the largest time below it."""
    edges = torch.tensor(sorted(times), device=t.device, dtype=t.dtype)
    return edges[(torch.searchsorted(edges, t) - 1).clamp(min=0)]

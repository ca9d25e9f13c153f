"""The segments between the times at which a student of few steps is asked."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lower_edge(t: Tensor, edges: Sequence[float]) -> Tensor:
    """[B]: the end of the segment that each t lies in, t itself excluded: the largest edge below it."""
    rising = torch.tensor(sorted(edges), device=t.device, dtype=t.dtype)
    return rising[(torch.searchsorted(rising, t) - 1).clamp(min=0)]

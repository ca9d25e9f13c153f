"""How much of the samples lies among the real ones, and how much of the real ones they reach, by balls that hold each
point's k nearest neighbours."""

from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.measure.pairs import rows_of_distances
from stillroom.settings import Refusal


class Overlap(NamedTuple):
    precision: float    # share of samples inside some real point's ball
    recall: float       # share of real points inside some sample's ball
    density: float      # real points' balls that a sample lies in, over k: 1 for equal laws, and more is possible
    coverage: float     # share of real balls that hold a sample


def overlap(real: Tensor, x: Tensor, k: int = 5) -> Overlap:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), of [n, D] and [m, D].

    A point on the edge of a ball counts as inside: so sets that hold equal points overlap.
    """
    if not 1 <= k < min(len(real), len(x)):
        raise Refusal(f"balls of {k} neighbours need more than {k} points: there are {len(real)} real ones and "
                      f"{len(x)} samples")
    real_radii, radii = radii_of(real, k), radii_of(x, k)
    held = torch.zeros(len(real), dtype=torch.long, device=real.device)         # real balls: samples in each
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    precise = 0
    for rows, d in rows_of_distances(x, real):
        inside = d <= real_radii
        held += inside.sum(0)
        precise += int(inside.any(1).sum())
        recalled |= (d <= radii[rows, None]).any(0)
    return Overlap(precise / len(x), _share(recalled), float(held.sum()) / (k * len(x)), _share(held > 0))


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def radii_of(x: Tensor, k: int) -> Tensor:
    """[n]: the distance to the k-th nearest other point."""
    return torch.cat([d.kthvalue(k + 1, 1).values for _, d in rows_of_distances(x, x)])     # the nearest is itself

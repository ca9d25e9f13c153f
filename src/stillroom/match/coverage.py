"""A bound on how far generated samples may leave real ones uncovered."""

import torch
from torch import Tensor


def uncovered(x: Tensor, anchors: Tensor, alpha: float = 0.5) -> Tensor:
    """[G]: mean over anchors of relu(alpha s(a | anchors) - s(a | x)), with s(a | S) the mean over S of
    exp(-|a - s|^2 / 2 h^2), leaving a itself out, and h the median distance of the anchors. x [G, N, C], anchors
    [G, P, C], P >= 2.

    The anchor-margin term of teacher-feature drifting (arXiv 2605.07327), against collapse within a class.
    """
    with torch.no_grad():
        among = torch.cdist(anchors, anchors)                                           # [G, P, P]
        one = torch.eye(anchors.shape[1], dtype=torch.bool, device=x.device)
        h = among[:, ~one].median(1).values.clamp(min=1e-6).view(-1, 1, 1)
        own = kernel(among, h).masked_fill(one, 0).sum(2) / (anchors.shape[1] - 1)      # [G, P]
    return (alpha * own - kernel(torch.cdist(anchors, x), h).mean(2)).relu().mean(1)


def kernel(distance: Tensor, h: Tensor) -> Tensor:
    return (-(distance / h).square() / 2).exp()

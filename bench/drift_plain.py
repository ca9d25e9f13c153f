"""The drifting loss as one writes it by hand in torch: one cdist, for each temperature two softmaxes and one product,
nothing broadcast to [N, M, C]. What `match.drift` is measured against.
"""

import torch
from torch import Tensor


def drift_loss(x: Tensor, positives: Tensor, temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)) -> Tensor:
    """[problems] of x [problems, N, C] and positives [problems, P, C]: the released algorithm."""
    n, c = x.shape[1:]
    with torch.no_grad():
        targets = torch.cat([x, positives], 1)                                  # [B, M, C]
        distance = torch.cdist(x, targets)                                      # [B, N, M]
        mean = distance.mean()
        scale = (mean / c**0.5).clamp(min=1e-3)
        here, targets = x / scale, targets / scale
        distance = distance / mean.clamp(min=1e-3)
        distance.diagonal(dim1=1, dim2=2).add_(100)
        force = torch.zeros_like(here)
        for r in temperatures:
            logits = distance / -r
            affinity = (logits.softmax(2) * logits.softmax(1)).clamp_(min=1e-6).sqrt_()
            push, pull = affinity[..., :n], affinity[..., n:]
            coefficients = torch.cat([-push * pull.sum(2, keepdim=True), pull * push.sum(2, keepdim=True)], 2)
            v = coefficients @ targets - coefficients.sum(2, keepdim=True) * here
            force += v / v.square().mean().clamp(min=1e-8).sqrt()
        goal = here + force
    return (x / scale - goal).square().mean((1, 2))

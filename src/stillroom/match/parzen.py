"""Denoisers of a set of samples: what an ideal network that had learned that set by heart would answer."""

import torch
from torch import Tensor

from stillroom.match.drift.problems import without_autocast


def parzen_x0(x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor, own: bool = False) -> Tensor:
    """E[x0 | x_t] when x0 is one of y, each as likely: softmax_j(-|x_t - alpha y_j|^2 / 2 sigma^2) y. [G, N, C].

    x_t [G, N, C]; alpha, sigma [G, 1, 1]; y [G, P, C]. own: y_i made x_t_i, and is left out of its own answer.
    """
    with without_autocast(x_t):
        logits = -torch.cdist(x_t, alpha * y).square() / (2 * sigma**2)                 # [G, N, P]
        if own:
            logits = logits.masked_fill(torch.eye(y.shape[1], dtype=torch.bool, device=y.device), -torch.inf)
        return logits.softmax(-1) @ y

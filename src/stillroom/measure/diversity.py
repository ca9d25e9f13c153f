"""What guidance trades: how various the samples of a class are, and how much of a picture lies at the ends of its
range."""

import torch
from torch import Tensor

from stillroom.settings import Refusal

END = 1 - 1e-4


def spread_within(x: Tensor, y: Tensor | None = None) -> float:
    """Root mean square distance of two samples of one class, of vectors [n, D]: over all of them where there are no
    labels, else the mean of its square over classes of two samples or more."""
    labels = torch.zeros(len(x), dtype=torch.long) if y is None else y.cpu().long()
    squares = [2 * x[labels == label].double().var(0).sum() for label in labels.unique()
               if int((labels == label).sum()) > 1]
    if not squares:
        raise Refusal("spread within classes: no class has two samples")
    return float(torch.stack(squares).mean().sqrt())


def saturated(x: Tensor) -> Tensor:
    """[B]: share of a picture's values in [-1, 1] that lie at an end of the range."""
    return (x.abs() >= END).float().flatten(1).mean(1)


def contrast(x: Tensor) -> Tensor:
    """[B]: standard deviation of a picture's values."""
    return x.float().flatten(1).std(1, unbiased=False)

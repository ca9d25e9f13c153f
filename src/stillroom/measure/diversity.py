"""What guidance trades: how various the samples of a class are, and how much of a picture lies at the ends of its
range."""

import torch
from torch import Tensor

from stillroom.measure.distances import has_pairs
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


def within_classes(y: Tensor | None, law: Tensor | None) -> bool:
    """Whether both sides have labels, and two of a class."""
    return y is not None and law is not None and has_pairs(y) and has_pairs(law)


def relative_spread(x: Tensor, y: Tensor | None, reference: Tensor, law: Tensor | None) -> float | None:
    """Spread within classes over a reference's, labelled `law`; of all samples together on both sides where one has no
    labels, or no two of a class. None where the reference has none."""
    if not within_classes(y, law):
        y = law = None
    true = spread_within(reference, law)
    return spread_within(x, y) / true if true > 0 else None


def saturated(x: Tensor) -> Tensor:
    """[B]: share of a picture's values in [-1, 1] that lie at an end of the range."""
    return (x.abs() >= END).float().flatten(1).mean(1)


def contrast(x: Tensor) -> Tensor:
    """[B]: standard deviation of a picture's values."""
    return x.float().flatten(1).std(1, unbiased=False)

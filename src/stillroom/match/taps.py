"""What of a sample is compared: sets of vectors [B, L, C], one problem for each of its L places.

Generative Modeling via Drifting (arXiv 2602.04770), A.5: of every map all places, the mean and the deviation over the
picture, and over patches of it.
"""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from stillroom.paths import at_least_float32

Vectors = Mapping[str, Tensor]
"""{name: [B, L, C]}; each is normalised by itself, because means and deviations are of different sizes."""


def identity(x: Tensor) -> Vectors:
    """The sample as one vector."""
    return {"identity": x.flatten(1)[:, None]}


def tokens(x: Tensor) -> Vectors:
    """Every place of a map [B, C, H, W], or of tokens [B, N, C], is a problem of its own."""
    return {"tokens": placed(x)}


def pooled(x: Tensor) -> Vectors:
    """Mean and deviation over all places."""
    places = placed(x)
    return {"mean": places.mean(1, keepdim=True), "deviation": deviation(places)[:, None]}


def patches(k: int) -> Callable[[Tensor], Vectors]:
    """Mean and deviation over squares of k x k places."""
    def of(x: Tensor) -> Vectors:
        if x.ndim != 4 or x.shape[-1] % k or x.shape[-2] % k:
            raise ValueError(f"patches of {k} places: a map of shape {list(x.shape)} has no whole number of them")
        x = at_least_float32(x)
        mean = functional.avg_pool2d(x, k)
        rest = x - functional.interpolate(mean, scale_factor=k)     # squares less the squared mean would round it away
        variance = functional.avg_pool2d(rest.square(), k)
        return {f"mean {k}x{k}": placed(mean), f"deviation {k}x{k}": placed(root(variance))}

    return of


def of_map(x: Tensor) -> Vectors:
    """All of a feature map: its places, their mean and deviation, and those over patches that fit."""
    x = at_least_float32(x)
    found = {**tokens(x), **pooled(x)}
    for k in (2, 4):
        if x.ndim == 4 and x.shape[-1] > k and x.shape[-1] % k == x.shape[-2] % k == 0:
            found |= patches(k)(x)
    return found


def placed(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]; tokens stay, and a vector is one place."""
    if x.ndim == 2:
        return x[:, None]
    return x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


def deviation(places: Tensor) -> Tensor:
    """[B, L, C] -> [B, C]."""
    return root(places.var(1, correction=0))


def root(variance: Tensor) -> Tensor:
    """Kept off zero, where the root's slope has no bound."""
    return (variance.clamp(min=0) + 1e-6).sqrt()


TAPS: Mapping[str, Callable[[Tensor], Vectors]] = {
    "identity": identity, "tokens": tokens, "pooled": pooled, "patches2": patches(2), "patches4": patches(4),
}


def problems(vectors: Tensor, groups: int) -> Tensor:
    """[G N, L, C] -> [G L, N, C]: within a group, each place is a problem of N samples."""
    return vectors.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

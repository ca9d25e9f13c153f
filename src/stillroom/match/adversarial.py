"""Adversarial terms: the hinge of a critic's logits (Lim & Ye 2017), the weight that balances them against a
reconstruction (Esser et al. 2021), and the augmentations that a critic of little data needs (Zhao et al. 2020)."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

DRAWS = 7
"""Uniform numbers that `augmented` takes for each picture."""


def critic_hinge(real: Tensor, made: Tensor) -> Tensor:
    """[B]: 1/2 (max(0, 1 - D(x)) + max(0, 1 + D(G))), mean over places."""
    return ((1 - real).relu() + (1 + made).relu()).flatten(1).mean(1) / 2


def maker_hinge(made: Tensor) -> Tensor:
    """[B]: -D(G)."""
    return -made.flatten(1).mean(1)


def critic_softplus(real: Tensor, made: Tensor) -> Tensor:
    """[B]: softplus(-D(x)) + softplus(D(G)), mean over a sample's logits: the non-saturating game (Goodfellow et al.
    2014)."""
    return (softplus(-real) + softplus(made)).reshape(len(real), -1).mean(1)


def maker_softplus(made: Tensor) -> Tensor:
    """[B]: softplus(-D(G))."""
    return softplus(-made).reshape(len(made), -1).mean(1)


def r1(logits: Tensor, x: Tensor) -> Tensor:
    """[B]: |dD/dx|^2 / 2 of the mean D of a sample's logits, at real samples x, which must require a gradient
    (Mescheder et al. 2018)."""
    (slope,) = torch.autograd.grad(logits.reshape(len(x), -1).mean(1).sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1) / 2


def r1_approximate(logits: Tensor, nearby: Tensor, std: float) -> Tensor:
    """[B]: the same without a second derivative, from the logits of x + std eps: E (D(x + std eps) - D(x))^2 is
    std^2 |dD/dx|^2 to the first order (Lin et al. 2025). D is the mean of a sample's logits here too: a mean of their
    squares would be as many times larger as there are logits that look at different things."""
    return (nearby - logits).reshape(len(logits), -1).mean(1).square() / (2 * std**2)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, most: float = 1e4) -> Tensor:
    """|g_rec| / |g_gan|, of both terms' gradients at the last layer: so weighted, they move it equally. 0 / 0 is 0."""
    return (reconstruction.norm() / (adversarial.norm() + 1e-6)).clamp(max=most)


def augmented(x: Tensor, u: Tensor, shift: float = 1 / 8, cut: float = 1 / 2) -> Tensor:
    """DiffAugment, differentiable in x: brightness, saturation, contrast, a shift by up to `shift` of a side and a grey
    square of `cut` of it. A pure function of the draws u [B, 7] in [0, 1)."""
    u = u.to(x).view(-1, DRAWS, 1, 1, 1)
    x = x + u[:, 0] - 0.5
    x = _spread(x, 1, 2 * u[:, 1])
    x = _spread(x, (1, 2, 3), u[:, 2] + 0.5)
    return _without_square(_shifted(x, u[:, 3:5, 0, 0, 0], shift), u[:, 5:7, 0, 0, 0], cut)


def _spread(x: Tensor, over: int | tuple[int, ...], times: Tensor) -> Tensor:
    mean = x.mean(over, keepdim=True)
    return (x - mean) * times + mean


def _shifted(x: Tensor, u: Tensor, shift: float) -> Tensor:
    """By whole pixels; what comes in from outside is grey."""
    for axis, draw in ((2, u[:, 0]), (3, u[:, 1])):
        size = x.shape[axis]
        most = int(size * shift + 0.5)
        by = (draw * (2 * most + 1)).long() - most                                              # [B]
        place = torch.arange(size, device=x.device) - by[:, None]                               # [B, size]
        shape = [len(x), 1, 1, 1]
        shape[axis] = size
        inside = ((place >= 0) & (place < size)).view(shape)
        x = x.gather(axis, place.clamp(0, size - 1).view(shape).expand_as(x)) * inside
    return x


def _without_square(x: Tensor, u: Tensor, cut: float) -> Tensor:
    inside = None
    for axis, draw in ((2, u[:, 0]), (3, u[:, 1])):
        size = x.shape[axis]
        side = int(size * cut + 0.5)
        first = (draw * (size + 1 - side % 2)).long()[:, None] - side // 2                      # [B, 1], edges included
        place = torch.arange(size, device=x.device)
        line = (place >= first) & (place < first + side)                                        # [B, size]
        line = line[:, None, :, None] if axis == 2 else line[:, None, None]
        inside = line if inside is None else inside & line
    assert inside is not None
    return x * ~inside

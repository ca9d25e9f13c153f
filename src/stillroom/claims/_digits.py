"""Four latent spaces of the digits, each with a decoder, and a judge of pictures: the ground of the claims on drifting.

All have 32 numbers a digit, of mean 0 and deviation 1 over the set:

- `semantic`: a classifier's features, normalised per digit, decoded by a network that learned on noisy ones: what a
  representation autoencoder is, small;
- `vae`: a variational autoencoder's means;
- `pca`: principal components, of equal variance each;
- `pca-raw`: the same with the variances they have.

A claim's apparatus, not a method: its networks learn in a plain loop.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.data import digits
from stillroom.match.latents import unit_kl

NAMES = ("semantic", "vae", "pca", "pca-raw")
DIM, CLASSES = 32, 10


class Space(NamedTuple):
    z: Tensor                               # [N, 32] of the training digits
    y: Tensor                               # [N]
    decode: Callable[[Tensor], Tensor]      # [n, 32] -> [n, 64] in [-1, 1]


@cache
def pixels(split: str) -> tuple[Tensor, Tensor]:
    data = digits(8, split)
    assert data.y is not None
    return data.x.flatten(1), data.y


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@torch.enable_grad()
def taught(net: nn.Module, loss: Callable[[Tensor], Tensor], count: int, steps: int, seed: int) -> nn.Module:
    """`loss` takes the numbers of a batch's items."""
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(count, (256,), generator=draws)).backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def classifier(x: Tensor, y: Tensor, seed: int, steps: int = 600) -> nn.Sequential:
    """[n, D] -> 32 features -> 10 classes, from slightly noisy x."""
    torch.manual_seed(seed)
    net = nn.Sequential(mlp(x.shape[1], 256, 128, DIM), nn.SiLU(), nn.Linear(DIM, CLASSES))

    def loss(i: Tensor) -> Tensor:
        return functional.cross_entropy(net(x[i] + 0.2 * torch.randn(len(i), x.shape[1])), y[i])

    taught(net, loss, len(x), steps, seed)
    return net


@cache
def judge() -> nn.Sequential:
    """One for all seeds and spaces, and none that a space was made of."""
    with torch.random.fork_rng():
        return classifier(*pixels("train"), seed=9999)


def features(x: Tensor) -> Tensor:
    """[n, 64] -> [n, 32]."""
    return judge()[0](x)


@cache
def feature_net(name: str, seed: int) -> Callable[[Tensor], list[Tensor]]:
    """[n, 32] of a space -> [n, 256], [n, 128] and [n, 32]: what a classifier of its latents has inside."""
    here = space(name, seed)
    with torch.random.fork_rng():
        net = classifier(here.z, here.y, seed)

    def maps(z: Tensor) -> list[Tensor]:
        found = []
        for layer in net.modules():
            if isinstance(layer, nn.Linear | nn.SiLU):
                z = layer(z)
            if isinstance(layer, nn.SiLU):
                found.append(z)
        return found

    return maps


@cache
def space(name: str, seed: int) -> Space:
    with torch.random.fork_rng():
        return {"semantic": semantic, "vae": vae, "pca": pca, "pca-raw": raw_pca}[name](seed)


def semantic(seed: int) -> Space:
    x, y = pixels("train")
    z = functional.layer_norm(classifier(x, y, seed)[0](x), (DIM,))
    z, back = normalised(z)
    decoder = mlp(DIM, 256, 256, 64)

    def loss(i: Tensor) -> Tensor:
        noisy = z[i] + 0.3 * torch.rand(len(i), 1) * torch.randn(len(i), DIM)
        return functional.mse_loss(decoder(back(noisy)), x[i])

    taught(decoder, loss, len(x), 3000, seed)
    return Space(z, y, lambda z: decoder(back(z)).clamp(-1, 1))


def vae(seed: int) -> Space:
    x, y = pixels("train")
    torch.manual_seed(seed)
    both = nn.ModuleList([mlp(64, 256, 256, 2 * DIM), mlp(DIM, 256, 256, 64)])
    encoder, decoder = both

    def loss(i: Tensor) -> Tensor:
        mean, logvar = encoder(x[i]).chunk(2, 1)
        drawn = decoder(mean + (logvar / 2).exp() * torch.randn(len(i), DIM))
        return functional.mse_loss(drawn, x[i]) + 1e-4 * unit_kl(mean, logvar).mean()

    taught(both, loss, len(x), 3000, seed)
    z, back = normalised(encoder(x)[:, :DIM])
    return Space(z, y, lambda z: decoder(back(z)).clamp(-1, 1))


def pca(_seed: int) -> Space:
    z, y, decode = raw_pca(0)
    std = z.std(0)
    return Space(z / std, y, lambda z: decode(z * std))


def raw_pca(_seed: int) -> Space:
    x, y = pixels("train")
    mean = x.mean(0)
    basis = torch.linalg.svd(x - mean, full_matrices=False)[2][:DIM]        # [32, 64]
    z = (x - mean) @ basis.T
    scale = z.square().mean().sqrt()
    return Space(z / scale, y, lambda z: (scale * z @ basis + mean).clamp(-1, 1))


def normalised(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Per coordinate, and the way back."""
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    return (z - mean) / std, lambda z: z * std + mean


def spaces(seed: int) -> Iterator[tuple[str, Space]]:
    yield from ((name, space(name, seed)) for name in NAMES)

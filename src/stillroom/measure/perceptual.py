"""Distances between pictures in the features of a network: [B, 3, H, W] in [-1, 1] -> [B].

LPIPS (Zhang et al. 2018, v0.1) from the public weight files; the same distance in any other features. What is measured
in random features is called `random_lpips`, never LPIPS.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.nets.weights import fill_all, read_weights
from stillroom.settings import Refusal, nearest


class Features(Protocol):
    def __call__(self, x: Tensor, /) -> Sequence[Tensor]: ...       # maps [B, C_l, H_l, W_l]


def feature_distance_of(features: Features) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS without learned heads, in these features: every channel of every layer weighs 1."""
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return _sum_over_layers(d.sum(1) for d in _differences(features, x, y))

    return distance


def pooled(features: Features) -> Callable[[Tensor], Tensor]:
    """One vector per picture, the means of its maps: what a Fréchet distance needs."""
    def vectors(x: Tensor) -> Tensor:
        return torch.cat([m.mean((2, 3)) for m in features(x)], 1)

    return vectors


def _differences(features: Features, x: Tensor, y: Tensor):
    """(unit(a) - unit(b))^2 of each layer's maps, in float32 under autocast too."""
    return [(_unit(a.float()) - _unit(b.float())).square() for a, b in zip(features(x), features(y), strict=True)]


def _unit(a: Tensor) -> Tensor:
    # vector_norm, not the root of a sum: where no channel is active its gradient is 0 instead of nan.
    return a / (torch.linalg.vector_norm(a, dim=1, keepdim=True) + 1e-10)


def _sum_over_layers(maps) -> Tensor:
    return torch.stack([m.mean((1, 2)) for m in maps]).sum(0)       # [L, B] -> [B]


SMALL = (16, 32, 64, 64)
"""Widths of the random features of a Fréchet distance: few, for the covariance of a small set."""


class RandomFeatures(nn.Module):
    """Features of an untrained network, the same for the same seed: a stand-in where no weights are at hand.

    With biases: they keep maps away from 0 in flat regions, where unit length would make rounding look like content.
    """

    def __init__(self, seed: int = 0, widths: tuple[int, ...] = (32, 64, 128, 128)):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        pairs = zip((3, *widths[:-1]), widths, strict=True)
        self.layers = nn.ModuleList([nn.utils.skip_init(nn.Conv2d, before, width, 3) for before, width in pairs])
        for p in self.parameters():     # He: energy is kept
            nn.init.normal_(p, std=0.3 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5, generator=draws)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list[Tensor]()
        for layer in self.layers:
            x = functional.avg_pool2d(x, 2, ceil_mode=True) if maps else x
            x = layer(functional.pad(x, (1, 1, 1, 1), mode="replicate")).relu()
            maps.append(x)
        return maps


class Fire(nn.Module):
    """SqueezeNet's block."""

    def __init__(self, channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def _alex() -> list[nn.Module]:
    relu, pool = nn.ReLU(), nn.MaxPool2d(3, 2)
    return [nn.Conv2d(3, 64, 11, 4, 2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool,
            nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu,
            nn.Conv2d(256, 256, 3, padding=1), relu]


def _vgg() -> list[nn.Module]:
    layers, before = list[nn.Module](), 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return layers


def _squeeze() -> list[nn.Module]:
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64), pool, Fire(128, 32, 128),
            Fire(256, 32, 128), pool, Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]


class Backbone(NamedTuple):
    layers: Callable[[], list[nn.Module]]   # numbered as in the public file: features.N
    taps: Mapping[int, int]                 # number of a layer that is looked at -> its channels
    beside: tuple[int, ...]                 # classifier.N of the public file, not needed here
    smallest: int                           # pixels


BACKBONES = {
    "alex": Backbone(_alex, {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}, (1, 4, 6), 31),
    "vgg": Backbone(_vgg, {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}, (0, 3, 6), 16),
    "squeeze": Backbone(_squeeze, {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}, (1,), 17),
}


class BackboneFeatures(nn.Module):
    """The convolutions of a public classifier, answering the maps that LPIPS looks at."""

    def __init__(self, net: str):
        super().__init__()
        if net not in BACKBONES:
            raise Refusal(f"LPIPS has no backbone {net!r}{nearest(net, BACKBONES)}")
        self.net, self.features = net, nn.Sequential(*BACKBONES[net].layers())
        # What the public classifiers saw: ImageNet's normalisation, restated for pixels in [-1, 1].
        self.shift = nn.Buffer(torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.scale = nn.Buffer(torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        _, taps, _, smallest = BACKBONES[self.net]
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < smallest:
            raise Refusal(f"{self.net} takes pictures [B, 3, H, W] of {smallest} pixels or more, not {list(x.shape)}")
        x, maps = (x.float() - self.shift) / self.scale, list[Tensor]()
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in taps:
                maps.append(x)
        return maps


class Head(nn.Module):
    """One weight per channel, under the public name lin*.model.1.weight (0 was the dropout of its training)."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, difference: Tensor) -> Tensor:
        return self.model(difference).squeeze(1)


class Lpips(nn.Module):
    """sum over layers of mean over pixels of w_l . (unit(a_l) - unit(b_l))^2, w_l >= 0 learned."""

    def __init__(self, net: str):
        super().__init__()
        self.backbone = BackboneFeatures(net)
        self.heads = nn.ModuleDict({f"lin{k}": Head(c) for k, c in enumerate(BACKBONES[net].taps.values())})

    @classmethod
    def from_files(cls, net: str, backbone_file: str | Path, heads_file: str | Path) -> "Lpips":
        """torchvision's alexnet-owt-*.pth, vgg16-*.pth or squeezenet1_1-*.pth, and v0.1 heads of the lpips package."""
        lpips = cls(net)
        beside = [f"classifier.{n}.{kind}" for n in BACKBONES[net].beside for kind in ("weight", "bias")]
        fill_all(lpips.backbone, read_weights(backbone_file), backbone_file, beside)
        fill_all(lpips.heads, read_weights(heads_file), heads_file)
        return lpips.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        differences = _differences(self.backbone, x, y)
        return _sum_over_layers(head(d) for d, head in zip(differences, self.heads.values(), strict=True))


def lpips_in(folder: Path) -> dict[str, Lpips]:
    """Every net of which the folder has both files, under their public names. The lpips package has heads of v0.0 too,
    which are another distance."""
    found = {}
    for net, stem in (("alex", "alexnet-"), ("vgg", "vgg16-"), ("squeeze", "squeezenet1_1-")):
        backbone, heads = weights_at(folder, f"{stem}*"), weights_at(folder, f"**/{net}.*")
        if backbone and heads:
            found[net] = Lpips.from_files(net, backbone, heads)
    if not found:
        raise Refusal(f"lpips {folder}: holds no pair of public files, such as alexnet-owt-7be5be79.pth and alex.pth")
    return found


def weights_at(folder: Path, pattern: str) -> Path | None:
    """The one weight file of that name."""
    files = sorted(p for p in folder.glob(pattern) if p.suffix in (".pth", ".safetensors")
                   and "v0.0" not in p.absolute().parts)
    if len(files) > 1:
        names = " and ".join(str(p.relative_to(folder)) for p in files[:2])
        raise Refusal(f"lpips {folder}: holds {names}, which may differ; leave one of them there")
    return files[0] if files else None

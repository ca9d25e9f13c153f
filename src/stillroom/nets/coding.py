"""Students of image codecs: encoders and decoders of plain convolutions, in TAESD's layout.

`blocks` counts the residual blocks of every level: an encoder's level i works at 1/2^i of the side, so that a latent
spans 2^(len(blocks) - 1) pixels; a decoder's are the same, read from the coarsest level on. All layers stand in one
Sequential, numbered as in https://github.com/madebyollin/taesd, so that the names of its files fit by a prefix.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.nets.build import buildable

FOLD = 4    # pixels a side that an unshuffling or strided stem takes at once
Module = TypeVar("Module", bound=nn.Module)


def conv(enter: int, leave: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(enter, leave, 3, padding=1, bias=bias)


class LateConv(nn.Conv2d):
    """Stride 2 on AutoencoderKL's grid: zeros on the right and below only, so output i is centred on input 2i + 1."""

    def __init__(self, enter: int, leave: int, bias: bool):
        super().__init__(enter, leave, 3, stride=2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def halve(enter: int, leave: int, padding: str, bias: bool = False) -> nn.Conv2d:
    """[C, 2h, 2w] -> [C', h, w]; output i is centred on input 2i, or on 2i + 1 with asymmetric padding."""
    if padding == "asymmetric":
        return LateConv(enter, leave, bias)
    return nn.Conv2d(enter, leave, 3, stride=2, padding=1, bias=bias)


class Block(nn.Module):
    """relu(x + conv relu conv relu conv x). `pool` first adds a branch whose norm sees the whole picture, as TAEF2 has
    it: plain convolutions cannot copy a teacher that has global statistics."""

    def __init__(self, width: int, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        inner = 4 * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.GroupNorm(4, inner), nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
        ) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(x + self.conv(x))


class Clamp(nn.Module):
    """Latents far outside the bulk, as samplers make them, come back within +-3."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


@buildable
class Encoder(nn.Module):
    """[B, colours, H, W] -> means [B, channels, h, w], or with `moments` means and log variances [B, 2 channels, h, w].

    Stems: `conv` is TAESD's; `unshuffle` folds 4x4 pixels into channels first, the fastest; `strided` takes two strided
    convolutions, as TAESD's encoder for Sana does. The last two do levels 0 and 1 themselves: of `blocks`, only the
    counts from level 2 on are used, and Sana's is blocks=(0, 0, 1, 3, 3, 3), which spans 32 pixels.
    `scale` and `shift` of every output channel are constants, so that a student begins at its teacher's statistics.
    `unit_range` takes pictures in [-1, 1] and shows them to the layers in [0, 1], where TAESD's work: there the zeros
    that pad a picture are black and not grey, so this cannot be folded into weights afterwards.
    """

    shift: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        channels: int,
        width: int | Sequence[int] = 64,
        blocks: Sequence[int] = (1, 3, 3, 3),
        stem: str = "conv",
        padding: str = "symmetric",
        pool: bool = False,
        moments: bool = False,
        shift: Sequence[float] = (),
        scale: Sequence[float] = (),
        colours: int = 3,
        unit_range: bool = False,
    ):
        super().__init__()
        check_levels(blocks, stem, ("conv", "unshuffle", "strided"), pool and not blocks[-1])
        if padding not in ("symmetric", "asymmetric"):
            raise ValueError(f"padding {padding!r}: symmetric or asymmetric")
        answers = 2 * channels if moments else channels
        check_constants(answers, shift, scale)
        self.channels, self.width, self.blocks, self.colours = channels, width, tuple(blocks), colours
        self.stem, self.padding, self.pool, self.moments, self.unit_range = stem, padding, pool, moments, unit_range

        widths, first = widths_of(width, blocks), 0 if stem == "conv" else 2
        w = widths[first]
        if stem == "conv":
            layers: list[nn.Module] = [conv(colours, w)]
        elif stem == "unshuffle":
            layers = [nn.PixelUnshuffle(FOLD), conv(colours * FOLD**2, w)]
        else:
            layers = [halve(colours, w // 2, padding, True), nn.ReLU(), halve(w // 2, w, padding, True), nn.ReLU()]
        lowest = len(blocks) - 1
        for level in range(first, len(blocks)):
            if level > first:
                layers.append(halve(widths[level - 1], widths[level], padding))
            layers += [Block(widths[level], pool and level == lowest) for _ in range(blocks[level])]
        self.layers = nn.Sequential(*layers, conv(widths[-1], answers))
        self.register_buffer("shift", constant(shift))
        self.register_buffer("scale", constant(scale))

    @property
    def factor(self) -> int:
        return 2 ** (len(self.blocks) - 1)

    @property
    def offset(self) -> float:
        """The pixel on which latent 0 is centred. A stem that unshuffles sees cells of 4 pixels, centred on 1.5."""
        cell, centre = (FOLD, (FOLD - 1) / 2) if self.stem == "unshuffle" else (1, 0.0)
        return centre + (self.factor - cell if self.padding == "asymmetric" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers((x + 1) / 2 if self.unit_range else x)
        z = z if self.scale is None else z * self.scale
        return z if self.shift is None else z + self.shift

    def folded(self) -> "Encoder":
        """The same function without `shift` and `scale`: both are in the weights of the last convolution."""
        weights = self.state_dict()
        scale, shift = (weights.pop(name, None) for name in ("scale", "shift"))
        last = f"layers.{len(self.layers) - 1}"
        weight, bias = weights[f"{last}.weight"], weights[f"{last}.bias"]
        if scale is not None:
            weight, bias = weight * scale.unsqueeze(-1), bias * scale.flatten()
        bias = bias if shift is None else bias + shift.flatten()
        plain = Encoder(self.channels, self.width, self.blocks, self.stem, self.padding, self.pool, self.moments,
                        colours=self.colours, unit_range=self.unit_range).to(weight)
        plain.load_state_dict({**weights, f"{last}.weight": weight, f"{last}.bias": bias})
        return plain.train(self.training)


@buildable
class Decoder(nn.Module):
    """[B, channels, h, w] -> [B, colours, H, W]. `blocks` and `width` are read from the coarsest level on.

    `shift` and `scale` of every channel are constants: the net sees (z - shift) / scale, the diffusion side of a space.
    Stem `unshuffle` unfolds 4x4 pixels out of channels last: of `blocks`, the last two counts are not used.
    `unit_range` gives pictures in [-1, 1], though the layers make them in [0, 1], as TAESD's do.
    """

    shift: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        channels: int,
        width: int | Sequence[int] = 64,
        blocks: Sequence[int] = (3, 3, 3, 1),
        soft_clamp: bool = True,
        stem: str = "conv",
        pool: bool = False,
        shift: Sequence[float] = (),
        scale: Sequence[float] = (),
        colours: int = 3,
        unit_range: bool = False,
    ):
        super().__init__()
        check_levels(blocks, stem, ("conv", "unshuffle"), pool and not blocks[0])
        check_constants(channels, shift, scale)
        self.channels, self.width, self.blocks, self.colours = channels, width, tuple(blocks), colours
        self.soft_clamp, self.stem, self.pool, self.unit_range = soft_clamp, stem, pool, unit_range

        widths, levels = widths_of(width, blocks), len(blocks) if stem == "conv" else len(blocks) - 2
        layers: list[nn.Module] = [Clamp() if soft_clamp else nn.Identity(), conv(channels, widths[0]), nn.ReLU()]
        for level in range(levels):
            if level:
                layers += [nn.Upsample(scale_factor=2), conv(widths[level - 1], widths[level], bias=False)]
            layers += [Block(widths[level], pool and level == 0) for _ in range(blocks[level])]
        w = widths[levels - 1]
        layers += [conv(w, colours)] if stem == "conv" else [conv(w, colours * FOLD**2), nn.PixelShuffle(FOLD)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("shift", constant(shift))
        self.register_buffer("scale", constant(scale))

    @property
    def factor(self) -> int:
        return 2 ** (len(self.blocks) - 1)

    def normalised(self, z: Tensor) -> Tensor:
        z = z if self.shift is None else z - self.shift
        return z if self.scale is None else z / self.scale

    def forward(self, z: Tensor) -> Tensor:
        x = self.layers(self.normalised(z))
        return 2 * x - 1 if self.unit_range else x

    def features(self, z: Tensor) -> list[Tensor]:
        """The maps of the coarsest level, block by block: the cheapest part of the net by far."""
        layers = list(self.layers)
        maps = [nn.Sequential(*layers[:3])(self.normalised(z))]     # clamp, convolution, ReLU
        for block in layers[3 : 3 + self.blocks[0]]:
            maps.append(block(maps[-1]))
        return maps


def check_levels(blocks: Sequence[int], stem: str, stems: Sequence[str], pool_without_blocks: bool) -> None:
    if stem not in stems:
        raise ValueError(f"stem {stem!r}: one of {', '.join(stems)}")
    if len(blocks) < (1 if stem == "conv" else 3) or min(blocks) < 0:
        raise ValueError(f"blocks {tuple(blocks)}: one count per level, and three levels at least for stem {stem!r}")
    if pool_without_blocks:
        raise ValueError(f"blocks {tuple(blocks)}: pool is a branch of the coarsest level's blocks, and it has none")


def widths_of(width: int | Sequence[int], blocks: Sequence[int]) -> Sequence[int]:
    """One width per level."""
    widths = (width,) * len(blocks) if isinstance(width, int) else width
    if len(widths) != len(blocks):
        raise ValueError(f"{len(widths)} widths for {len(blocks)} levels")
    return widths


def check_constants(channels: int, *constants: Sequence[float]) -> None:
    if any(len(values) not in (0, channels) for values in constants):
        raise ValueError(f"{' and '.join(str(len(v)) for v in constants)} constants for {channels} channels")


def constant(values: Sequence[float]) -> Tensor | None:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) if len(values) else None


def parameters_of(make: Callable[[int], nn.Module], width: int) -> int:
    """Counted on the meta device: neither memory nor random numbers are spent."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(width).parameters())


def sized(params: int, make: Callable[[int], Module], widths: Sequence[int] = range(8, 8193, 8)) -> Module:
    """make(width) of the width whose number of parameters is nearest to `params`, the smaller of two."""
    at = min(bisect_left(widths, params, key=lambda w: parameters_of(make, w)), len(widths) - 1)
    near = widths[max(at - 1, 0) : at + 1]
    return make(min(near, key=lambda w: abs(parameters_of(make, w) - params)))

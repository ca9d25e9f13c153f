"""The feature net of drifting (arXiv 2602.04770, A.5): a ResNet of basic blocks with group norms, whose maps at every
scale are compared; and a U-Net around it, that paints what was hidden, for it to learn from."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.nets.build import buildable

LEAST = 4
"""The side below which maps are not halved any more."""


class Basic(nn.Module):
    """relu(skip(x) + norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, enter: int, leave: int, stride: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(enter, leave, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(leave, leave, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(groups, leave), nn.GroupNorm(groups, leave)
        plain = enter == leave and stride == 1
        self.skip = nn.Identity() if plain else nn.Conv2d(enter, leave, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Stage(nn.Module):
    """Blocks at one scale, and the norm through which others see their last map."""

    def __init__(self, enter: int, leave: int, blocks: int, stride: int, groups: int):
        super().__init__()
        self.blocks = nn.ModuleList(Basic(leave if i else enter, leave, 1 if i else stride, groups)
                                    for i in range(blocks))
        self.norm = nn.GroupNorm(groups, leave)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last block's map; and every second block's, with the last one normed behind them."""
        seen = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 2:
                seen.append(x)
        return x, [*seen, self.norm(x)]


@buildable
class ResNet(nn.Module):
    """Pictures or latents [B, channels, H, W] to maps of every scale. The first convolution halves nothing. Every stage
    is twice as wide as the one before it, and halves the side, while `LEAST` is left of `side`, the shorter one."""

    def __init__(self, channels: int, side: int, width: int = 32, blocks: tuple[int, ...] = (1, 1, 1, 1),
                 classes: int | None = None, groups: int = 8):
        super().__init__()
        if not blocks or min(blocks) < 1:
            raise ValueError(f"blocks {tuple(blocks)}: every stage needs at least one")
        if width % groups:
            raise ValueError(f"width {width} must be divisible by {groups}, the groups of its norms")
        self.channels, self.classes, self.groups = channels, classes, groups
        self.widths = tuple(width * 2**i for i in range(len(blocks)))
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        stages, before = [], width
        for i, (wide, count) in enumerate(zip(self.widths, blocks, strict=True)):
            halves = i > 0 and side >= 2 * LEAST
            side = (side + 1) // 2 if halves else side
            stages.append(Stage(before, wide, count, 2 if halves else 1, groups))
            before = wide
        self.stages = nn.ModuleList(stages)
        self.head = None if classes is None else nn.Linear(before, classes)

    def scales(self, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """The last block's map; and what is seen of the first convolution, then of every stage."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"features of {list(x.shape)}: this net was built for [B, {self.channels}, H, W]")
        h = F.relu(self.enter(x))       # no norm here: it would hide the contrast of a picture from all that follows
        seen = [[h]]
        for stage in self.stages:
            h, maps = stage(h)
            seen.append(maps)
        return h, seen

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, h, w] each, finest first: the first convolution's, every second block's, every stage's normed one."""
        return [each for maps in self.scales(x)[1] for each in maps]

    def pooled(self, x: Tensor) -> Tensor:
        """[B, F]: the mean of the last map over its places; before the norm, which fixes the means of its groups."""
        return self.scales(x)[0].mean((2, 3))

    def logits(self, pooled: Tensor) -> Tensor:
        """Of the classes, from pooled features."""
        if self.head is None:
            raise ValueError("this net knows no classes; build it with classes=")
        return self.head(pooled)


class Painter(nn.Module):
    """The normed maps of a ResNet's stages, finest first, to a picture: what lies below is enlarged and added."""

    def __init__(self, widths: tuple[int, ...], channels: int, groups: int):
        super().__init__()
        levels = list(pairwise(reversed(widths)))
        # 1x1 before enlarging: joined wide maps would take most of the time.
        self.lift = nn.ModuleList(nn.Conv2d(below, wide, 1) for below, wide in levels)
        self.mix = nn.ModuleList(Basic(wide, wide, 1, groups) for _, wide in levels)
        self.final = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        *finer, h = stages
        for lift, mix, skip in zip(self.lift, self.mix, reversed(finer), strict=True):
            h = mix(skip + F.interpolate(lift(h), size=skip.shape[-2:], mode="nearest"))
        return self.final(h)


class MaskedResNet(nn.Module):
    """A feature net that is shown pictures with some squares at zero, and a painter of what was there."""

    def __init__(self, net: ResNet):
        super().__init__()
        self.net, self.painter = net, Painter(net.widths, net.channels, net.groups)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The picture as it is painted. hidden [B, 1, H, W] is 1 where x is not shown."""
        _, (_, *stages) = self.net.scales(x * (1 - hidden))
        return self.painter([maps[-1] for maps in stages]).float()


def squares(u: Tensor, share: float, patch: int) -> Tensor:
    """[B, 1, h, w] uniforms to [B, 1, h patch, w patch]: 1 on `share` of the squares of every picture, at least one."""
    order = u.flatten(1).argsort(1).argsort(1)                          # [B, h w]: the rank of every square
    hidden = (order < max(1, round(share * order.shape[1]))).to(u.dtype)
    return F.interpolate(hidden.view_as(u), scale_factor=float(patch), mode="nearest")


def masked_error(painted: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
    """[B]: the mean squared error over what was hidden."""
    error = (painted - x).square().mean(1, keepdim=True) * hidden
    return torch.sum(error, (1, 2, 3)) / hidden.sum((1, 2, 3))

"""A lean convolutional U-Net for small images and latents, in the manner of ADM: one skip per level instead of one
per block, attention at the lowest level only, no separate middle. Half the convolutions at full resolution, where
nearly all of its time goes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.nets.build import buildable
from stillroom.nets.embed import Condition, final, one_time_per_sample, zeroed


class ResBlock(nn.Module):
    """skip(x) + conv2(silu((1 + scale) norm2(conv1(silu(norm1(x)))) + shift)); conv2 starts at zero."""

    def __init__(self, enter: int, leave: int, condition: int, groups: int):
        super().__init__()
        # On a CPU GroupNorm is six times slower in channels_last, in either precision, and eats what convolutions gain.
        self.norm1, self.norm2 = nn.GroupNorm(groups, enter), nn.GroupNorm(groups, leave)
        self.conv1 = nn.Conv2d(enter, leave, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(leave, leave, 3, padding=1))
        self.film = nn.Linear(condition, 2 * leave)
        self.skip = nn.Conv2d(enter, leave, 1) if enter != leave else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.film(c)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(F.silu((1 + scale) * h + shift))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, N, C]
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, C/heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # -> [B, N, C]
        return x + self.out(h).transpose(1, 2).unflatten(-1, x.shape[-2:])


class Down(nn.Module):
    """`shrink` to the size of this level, then its residual blocks."""

    def __init__(self, shrink: nn.Module, width: int, blocks: int, condition: int, groups: int):
        super().__init__()
        self.shrink = shrink
        self.blocks = nn.ModuleList(ResBlock(width, width, condition, groups) for _ in range(blocks))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = self.shrink(h)
        for block in self.blocks:
            h = block(h, c)
        return h


class Up(nn.Module):
    """Doubles the side by nearest neighbours and a convolution, then blocks on [h, the skip of this level]."""

    def __init__(self, enter: int, leave: int, blocks: int, condition: int, groups: int):
        super().__init__()
        self.grow = nn.Conv2d(enter, leave, 3, padding=1)
        widths = [2 * leave] + [leave] * (blocks - 1)
        self.blocks = nn.ModuleList(ResBlock(w, leave, condition, groups) for w in widths)

    def forward(self, h: Tensor, skip: Tensor, c: Tensor) -> Tensor:
        h = torch.cat([self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest")), skip], dim=1)
        for block in self.blocks:
            h = block(h, c)
        return h


@buildable
class UNet(nn.Module):
    """Images [B, channels, H, W] of any size divisible by 2 ** (levels - 1); one level per multiplier of `width`."""

    def __init__(
        self,
        channels: int,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 1,
        classes: int | None = None,
        two_times: bool = False,
        groups: int = 16,
        heads: int = 4,
        guided: bool = False,
    ):
        super().__init__()
        widths = [width * m for m in multipliers]
        if not widths or blocks < 1:
            raise ValueError("a UNet needs at least one multiplier and one block per level")
        if any(w % groups for w in widths) or widths[-1] % heads:
            raise ValueError(f"widths {widths}: each must be divisible by groups={groups}, the last by heads={heads}")
        self.channels, self.classes, self.two_times, self.guided = channels, classes, two_times, guided
        self.divisor = 2 ** (len(widths) - 1)
        inner = 2 * width
        self.condition = Condition(inner, classes, two_times, guided)
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        halve = [nn.Conv2d(a, w, 3, stride=2, padding=1) for a, w in pairwise(widths)]
        self.down = nn.ModuleList(
            Down(shrink, w, blocks, inner, groups) for shrink, w in zip([nn.Identity(), *halve], widths, strict=True)
        )
        self.attention = Attention(widths[-1], heads, groups)
        self.low = ResBlock(widths[-1], widths[-1], inner, groups)
        upwards = pairwise(reversed(widths))
        self.up = nn.ModuleList(Up(below, w, blocks, inner, groups) for below, w in upwards)
        self.norm = nn.GroupNorm(groups, widths[0])
        self.final = zeroed(nn.Conv2d(widths[0], channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        one_time_per_sample(x_t, t)
        height, side = x_t.shape[-2:]
        if height % self.divisor or side % self.divisor:
            raise ValueError(f"a picture of {height} x {side}: this UNet needs sides divisible by {self.divisor}")
        c = F.silu(self.condition(t, y, r, w))
        h, skips = self.enter(x_t), []
        for down in self.down:
            h = down(h, c)
            skips.append(h)
        h = self.low(self.attention(skips.pop()), c)
        for up in self.up:
            h = up(h, skips.pop(), c)
        return final(self.final, F.silu(self.norm(h)))

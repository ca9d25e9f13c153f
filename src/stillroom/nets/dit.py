"""A diffusion transformer (Peebles & Xie 2023) with adaLN-zero blocks and RMS-normed queries and keys, which keep
attention logits bounded, so that bfloat16 and high learning rates do not diverge."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.nets.build import buildable
from stillroom.nets.embed import Condition, final, require_fit, zeroed


def patchify(x: Tensor, p: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/p)(W/p), C p p], row by row."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # [B, H/p, W/p, C, p, p]
    return x.reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(x: Tensor, p: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify` for a picture of height x width."""
    b, _, d = x.shape
    x = x.reshape(b, height // p, width // p, d // p**2, p, p).permute(0, 3, 1, 4, 2, 5)  # [B, C, H/p, p, W/p, p]
    return x.reshape(b, d // p**2, height, width)


def positions(side: int, width: int) -> Tensor:
    """[side * side, width]: half of the channels tell the row, half the column, each as sines and cosines."""
    frequency = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # [side, width/4]
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [side, width/2]
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, W/heads]
        # The norms give float32 under autocast; attention wants all three in one type.
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + gate_a attention(adaLN(x)), then x + gate_m mlp(adaLN(x)); the gates start at zero, the block as identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.attention(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


@buildable
class DiT(nn.Module):
    """Square images or latents [B, channels, size, size]; the output of `blocks.i` is [B, tokens, width]."""

    position: Tensor

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int = 2,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        classes: int | None = None,
        two_times: bool = False,
        guided: bool = False,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"size {size} is not divisible by patch {patch}")
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be divisible by heads={heads} and, for the positions, by 4")
        self.channels, self.size, self.patch = channels, size, patch
        self.classes, self.two_times, self.guided = classes, two_times, guided
        self.enter = nn.Linear(channels * patch**2, width)
        self.register_buffer("position", positions(size // patch, width), persistent=False)
        self.condition = Condition(width, classes, two_times, guided)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.final = zeroed(nn.Linear(width, channels * patch**2))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        require_fit(self, x_t, t, (self.channels, self.size, self.size))
        c = F.silu(self.condition(t, y, r, w))
        h = self.enter(patchify(x_t, self.patch)) + self.position
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        h = final(self.final, modulate(self.norm(h), shift, scale))
        return unpatchify(h, self.patch, self.size, self.size)

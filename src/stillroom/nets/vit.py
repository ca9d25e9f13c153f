"""Vision transformers that answer maps of tokens: an encoder of pictures, the decoder of masked autoencoders (He et al.
2022) in the very form of released representation autoencoders, and both as they are pretrained on hidden patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.nets.build import buildable
from stillroom.nets.dit import Attention, patchify
from stillroom.nets.embed import final


def positions(height: int, width: int, channels: int, spacing: float = 1.0) -> Tensor:
    """[height width, channels]: half of the channels tell the column, half the row, each as sines and cosines. Columns
    come first, as in the masked autoencoders' code, whose decoders were trained with it."""
    frequency = 1e4 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    rows, columns = (_waves(n, frequency * spacing) for n in (height, width))
    grid = [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)]
    return torch.cat(grid, -1).flatten(0, 1).float()


def _waves(count: int, frequency: Tensor) -> Tensor:
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))         # [B, N, C] -> [B, C, h, w]


def as_tokens(z: Tensor) -> Tensor:
    return z.flatten(2).transpose(1, 2)                                 # [B, C, h, w] -> [B, N, C]


class PreNorm(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def require_heads(what: str, width: int, heads: int) -> None:
    if width % heads or width % 4:
        raise ValueError(f"{what} of width {width}: it must divide by its {heads} heads and, for the positions, by 4")


@buildable
class ViT(nn.Module):
    """Pictures [B, 3, H, W] to tokens [B, width, H / patch, W / patch]. Its last norm has no affine part: a token has
    mean 0 and variance 1 over the channels. Positions are fixed: pictures of any size go in."""

    def __init__(self, patch: int, width: int = 128, depth: int = 6, heads: int = 4):
        super().__init__()
        require_heads("an encoder", width, heads)
        self.patch, self.channels = patch, width
        self.enter = nn.Linear(3 * patch**2, width)
        self.blocks = nn.ModuleList(PreNorm(width, heads, 4 * width, 1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (n // self.patch for n in x.shape[-2:])
        return as_map(self.mix(self.embed(x)), height, width)

    def embed(self, x: Tensor) -> Tensor:
        height, width = (n // self.patch for n in x.shape[-2:])
        return self.enter(patchify(x, self.patch)) + positions(height, width, self.channels).to(x.device)

    def mix(self, tokens: Tensor) -> Tensor:
        """[B, any number of them, width]: what the encoder makes of the tokens that it is shown."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens.float())


@buildable
class ViTDecoder(nn.Module):
    """Tokens [B, channels, h, w] to pictures [B, 3, h patch, w patch], times `std` plus `mean`. `side` is the grid that
    it is made for: another one is decoded too, with positions as far apart as in that one."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, patch: int, side: int, width: int = 192, depth: int = 4, heads: int = 3,
                 hidden: int | None = None, mean: tuple[float, ...] = (0.0,) * 3, std: tuple[float, ...] = (1.0,) * 3):
        super().__init__()
        require_heads("a decoder", width, heads)
        self.channels, self.patch, self.side = channels, patch, side
        self.heads, self.hidden = heads, hidden or 4 * width
        self.enter = nn.Linear(channels, width)
        self.extra = nn.Parameter(torch.zeros(width))                   # a token of no place, as released ones have it
        self.blocks = nn.ModuleList(PreNorm(width, heads, self.hidden, 1e-12) for _ in range(depth))
        for block in self.blocks:                                       # released decoders do not norm these
            block.attention.norm_q = block.attention.norm_k = nn.Identity()     # pyright: ignore
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.predict = nn.Linear(width, 3 * patch**2)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        (height, width), p = z.shape[-2:], self.patch
        # The grid is 16 wide whatever its number of tokens: so released decoders measure places.
        h = self.enter(as_tokens(z)) + positions(height, width, len(self.extra), 16 / self.side).to(z.device)
        h = torch.cat([self.extra.to(h).expand(h.shape[0], 1, -1), h], 1)    # len() pins an exported graph's batch
        for block in self.blocks:
            h = block(h)
        h = final(self.predict, self.norm(h)[:, 1:])
        h = h.view(-1, height, width, p, p, 3).permute(0, 5, 1, 3, 2, 4)        # [B, 3, h, p, w, p]
        return h.reshape(-1, 3, height * p, width * p) * self.std + self.mean


class MaskedViT(nn.Module):
    """An encoder that is shown some patches, and a small decoder that paints the others; with `classes`, a linear layer
    that names the picture by the mean of its tokens."""

    def __init__(self, encoder: ViT, painter: ViTDecoder, classes: int | None = None):
        super().__init__()
        self.encoder, self.painter = encoder, painter
        self.hidden = nn.Parameter(0.02 * torch.randn(encoder.channels))
        self.head = None if classes is None else nn.Linear(encoder.channels, classes)

    def forward(self, x: Tensor, order: Tensor, shown: int) -> tuple[Tensor, Tensor, Tensor]:
        """`shown` patches, the lowest of `order` [B, N], are seen. The picture as it is painted; where it was hidden
        [B, 1, H, W]; the mean of the tokens [B, C]."""
        p, (height, width) = self.encoder.patch, x.shape[-2:]
        tokens = self.encoder.embed(x)
        seen = order.argsort(1)[:, :shown, None]                                # [B, shown, 1]
        tokens = self.encoder.mix(tokens.gather(1, seen.expand(-1, -1, tokens.shape[2])))
        whole = self.hidden.to(tokens).expand(len(x), order.shape[1], -1)
        whole = whole.scatter(1, seen.expand_as(tokens), tokens)
        hidden = torch.ones_like(order).scatter(1, seen[..., 0], 0.0).view(-1, 1, height // p, width // p)
        return (self.painter(as_map(whole, height // p, width // p)), F.interpolate(hidden, scale_factor=float(p)),
                tokens.mean(1))

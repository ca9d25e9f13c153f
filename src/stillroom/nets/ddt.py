"""A diffusion transformer with a wide, shallow head (DDT, arXiv 2504.05741, as RAE has it in DiT^DH): a deep narrow
encoder reads the noisy tokens, and a wide head reads them again, told at every token what the encoder makes of it.

A transformer narrower than its tokens cannot fit noise (RAE, arXiv 2510.11690): here the head alone need be as wide.
Blocks are those of `DiT`, with sines for positions; RAE's have rotary positions and SwiGLU.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.nets.build import buildable
from stillroom.nets.dit import Block, patchify, positions, unpatchify
from stillroom.nets.embed import Condition, final, require_fit, zeroed


class TokenBlock(Block):
    """A block that is told something else at every token: c [B, N, W]."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        x = x + gate_a * self.attention(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


@buildable
class DDT(nn.Module):
    """Square images or latents [B, channels, size, size]; `blocks.i` answer [B, tokens, width], `head.i` head_width."""

    position: Tensor
    head_position: Tensor

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int = 1,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        head_width: int = 384,
        head_depth: int = 2,
        head_heads: int = 6,
        classes: int | None = None,
        two_times: bool = False,
        guided: bool = False,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"size {size} is not divisible by patch {patch}")
        for name, wide, many in (("width", width, heads), ("head_width", head_width, head_heads)):
            if wide % many or wide % 4:
                raise ValueError(f"{name} {wide} must be divisible by heads={many} and, for the positions, by 4")
        self.channels, self.size, self.patch = channels, size, patch
        self.classes, self.two_times, self.guided = classes, two_times, guided
        token = channels * patch**2
        self.register_buffer("position", positions(size // patch, width), persistent=False)
        self.register_buffer("head_position", positions(size // patch, head_width), persistent=False)
        self.condition = Condition(width, classes, two_times, guided)
        self.enter, self.enter_head = nn.Linear(token, width), nn.Linear(token, head_width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.told = nn.Linear(width, head_width)
        self.head = nn.ModuleList(TokenBlock(head_width, head_heads) for _ in range(head_depth))
        self.norm = nn.LayerNorm(head_width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(head_width, 2 * head_width))
        self.final = zeroed(nn.Linear(head_width, token))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        require_fit(self, x_t, t, (self.channels, self.size, self.size))
        tokens = patchify(x_t, self.patch)
        s = self.told(self.encode(tokens, t, y, r, w))                  # [B, N, head_width]
        h = self.enter_head(tokens) + self.head_position
        for block in self.head:
            h = block(h, s)
        shift, scale = self.modulation(s).chunk(2, dim=-1)
        h = final(self.final, self.norm(h) * (1 + scale) + shift)
        return unpatchify(h, self.patch, self.size, self.size)

    def encode(self, tokens: Tensor, t: Tensor, y: Tensor | None, r: Tensor | None, w: Tensor | None) -> Tensor:
        """s = silu(time(t) + encoder(tokens | t, y, r, w)): what the head is told at every token, [B, N, width]."""
        c = F.silu(self.condition(t, y, r, w))
        h = self.enter(tokens) + self.position
        for block in self.blocks:
            h = block(h, c)
        return F.silu(self.condition.time(t)[:, None] + h)

"""A representation encoder's wide tokens as a few channels of latents, place by place."""

from torch import Tensor, nn
from torch.nn import functional

from stillroom.nets.build import buildable
from stillroom.nets.embed import final


@buildable
class Bottleneck(nn.Module):
    """Tokens [B, channels, h, w] to means [B, latent, h, w], or with `moments` means and log variances [B, 2 latent, h,
    w]: two layers of one token each, the hidden one twice as wide as the token. Latents are float32 under autocast too,
    because differences of scores are taken at them."""

    def __init__(self, channels: int, latent: int, moments: bool = False):
        super().__init__()
        self.channels, self.latent, self.moments = channels, latent, moments
        self.enter = nn.Conv2d(channels, 2 * channels, 1)
        self.leave = nn.Conv2d(2 * channels, 2 * latent if moments else latent, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return final(self.leave, functional.silu(self.enter(tokens)))


@buildable
class Projected(nn.Module):
    """bottleneck(trunk(x)): pictures in [-1, 1] to latents. `unit_range` shows them to the trunk in [0, 1]. Which of
    the two learns is for the recipe to say: gradients reach the trunk where its parameters ask for them."""

    def __init__(self, trunk: nn.Module, bottleneck: Bottleneck, unit_range: bool = False):
        super().__init__()
        self.trunk, self.bottleneck, self.unit_range = trunk, bottleneck, unit_range

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.trunk((x + 1) / 2 if self.unit_range else x))

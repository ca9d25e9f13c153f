"""A small discriminator of patches (Isola et al. 2017): real or painted, place by place."""

from torch import Tensor, nn

from stillroom.settings import Refusal

LEVELS = 3              # that halve the picture's sides


class PatchCritic(nn.Module):
    """Pictures [B, 3, H, W] to logits [B, 1, h, w], high where it takes the picture for real. Norms are taken within a
    picture: BatchNorm would tie the samples of a batch together."""

    def __init__(self, width: int):
        if width % 2:
            raise Refusal(f"a critic of width {width}: an even one is needed, for groups of channels in its norms")
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, LEVELS):
            before, after = (width * 2**k for k in (level - 1, level))
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.GroupNorm(4, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 2**(LEVELS - 1), 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float()

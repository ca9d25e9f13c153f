"""Small discriminators on what another network computes inside."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillroom.nets.lora import Lora
from stillroom.settings import Refusal


class Heads(nn.Module):
    """Features [B, C], tokens [B, N, C] or maps [B, C, h, w], one of each kind named in `channels`, to one logit per
    sample: the mean over features and places."""

    def __init__(self, channels: Sequence[int], width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
            for c in channels
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B]"""
        logits = [layer(channels_last(f).float()).flatten(1).mean(1)
                  for layer, f in zip(self.layers, features, strict=True)]
        return torch.stack(logits).mean(0)


def channels_last(feature: Tensor) -> Tensor:
    return feature.movedim(1, -1) if feature.ndim == 4 else feature


def inner_layers(net: nn.Module) -> tuple[str, ...]:
    """Where a network knows most of its input: the lowest level of a U-Net, the middle block of a transformer, the
    layers of an MLP."""
    if isinstance(net, Lora):
        return tuple(f"net.{name}" for name in inner_layers(net.net))
    known = dict(net.named_children())
    if "model" in known:
        return tuple(f"model.{name}" for name in inner_layers(known["model"]))
    for name in ("low", "mid_block"):
        if name in known:
            return (name,)
    for name in ("blocks", "transformer_blocks"):
        if name in known:
            return (f"{name}.{len(list(known[name].children())) // 2}",)
    if "layers" in known:
        return tuple(f"layers.{k}" for k, _ in enumerate(known["layers"].children()))
    raise Refusal(f"{type(net).__name__}: where its features lie is not known; name its modules with --layers")

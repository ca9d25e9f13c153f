"""Small discriminators: on what another network computes inside, and on samples themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillroom.nets.lora import Lora
from stillroom.settings import Refusal


class Heads(nn.Module):
    """Features [B, C], tokens [B, N, C] or maps [B, C, h, w], one of each kind named in `channels`, to one logit each,
    the mean over places. With `classes`, plus how well the feature goes with the sample's label (projection, Miyato &
    Koyama 2018)."""

    def __init__(self, channels: Sequence[int], width: int = 64, classes: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
            for c in channels
        )
        self.labels = None if classes is None else nn.Embedding(classes, len(channels) * width)
        if self.labels is not None:
            nn.init.zeros_(self.labels.weight)

    def forward(self, features: Sequence[Tensor], y: Tensor | None = None) -> Tensor:
        """[B, features], in float32 even under autocast: the penalty is of small differences between them."""
        if self.labels is None or y is None:
            labels = [None] * len(self.layers)
        else:
            labels = self.labels(y).chunk(len(self.layers), 1)              # each [B, width]
        with torch.autocast(features[0].device.type, enabled=False):
            logits = [self.logit(layer, channels_last(f).to(torch.promote_types(f.dtype, torch.float32)), each)
                      for layer, f, each in zip(self.layers, features, labels, strict=True)]
        return torch.stack(logits, 1)

    @staticmethod
    def logit(layer: nn.Module, h: Tensor, label: Tensor | None) -> Tensor:
        *inner, last = layer.children()
        for each in inner:
            h = each(h)
        found = last(h).flatten(1).mean(1)
        return found if label is None else found + (h.reshape(len(h), -1, h.shape[-1]).mean(1) * label).sum(1)


class Critic(nn.Module):
    """Samples to logits, through heads on all that `body` sees of them: a list of features for `Heads`."""

    def __init__(self, body: nn.Module, shape: tuple[int, ...], classes: int | None = None):
        super().__init__()
        with torch.no_grad():
            seen = body(torch.zeros(1, *shape))
        self.body, self.heads = body, Heads([channels_last(f).shape[-1] for f in seen], classes=classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, features]"""
        return self.heads(self.body(x), y)


class Layers(nn.Module):
    """Points [B, dim] to what each layer of a perceptron sees of them, [B, width] each."""

    def __init__(self, dim: int, width: int = 128, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width if k else dim, width), nn.LeakyReLU(0.2)) for k in range(depth))

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return seen


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

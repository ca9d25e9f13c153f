"""An encoder of one's own, trained by masking (He et al. 2022, arXiv 2111.06377): patches are hidden and painted from
those that are seen; with labels, the mean of the seen tokens names the picture's class too. Shared by recipes whose
latents are tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.nets.vit import MaskedViT, ViT, ViTDecoder
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Share


@dataclass(frozen=True, kw_only=True)
class Own:
    """The encoder that is trained here, and how."""

    width: Count = 128
    """Channels of a token."""
    depth: Count = 6
    heads: Count = 4
    hidden: Share = 0.5
    """Share of the patches that are hidden and painted."""
    painter_width: Count = 96
    painter_depth: Count = 2


@dataclass(frozen=True, kw_only=True)
class OfTokens:
    """Settings of recipes that train such an encoder first, and measure latents last."""

    encoder_steps: Count = 4000
    """Of an encoder of our own, before those."""
    own: Own = field(default_factory=Own)
    labels_weight: NotNegative = 0.0
    """Cross-entropy of the class in training an encoder of our own; above 0, data without labels are refused."""
    pretraining: Optimizer = field(
        default_factory=lambda: Optimizer(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, clip=1.0, warmup=100,
                                          decay="cosine"))
    statistics_pictures: Count = 2048
    """Training pictures on which the latents' mean and deviation are measured, at most."""


def new_vit(own: Own, patch: int) -> ViT:
    return ViT(patch, own.width, own.depth, own.heads)


def new_masked(own: Own, patch: int, side: int, classes: int | None) -> MaskedViT:
    """`classes` where labels are looked at."""
    painter = ViTDecoder(own.width, patch, side, own.painter_width, own.painter_depth, max(1, own.painter_width // 32))
    return MaskedViT(new_vit(own, patch), painter, classes)


def refuse_own(encoder: str, size: int, patch: int, labels_weight: float, data) -> None:
    """What cannot be of an encoder of our own; and labels, which train no other."""
    if encoder == "own" and size == patch:
        raise Refusal(f"patch {patch}: a picture would be one patch, and none is left to paint; choose a smaller one")
    if labels_weight and encoder != "own":
        raise Refusal(f"labels_weight: labels train an encoder of our own only, and {encoder} stays as it is")
    if labels_weight and not data.classes:
        raise Refusal(f"labels_weight: {data.name} has no labels; leave it out")


def masked_terms(masked: MaskedViT, x: Tensor, y: Tensor | None, turn, own: Own, labels_weight: float,
                 role: str) -> dict[str, Tensor]:
    count = patches(masked, x)
    seen = shown(own, count)
    painted, hidden, mean = masked(x, turn.rand((len(x), count)), seen)
    terms = {"painted": ((painted - x).square() * hidden).flatten(1).mean(1) * count / (count - seen)}
    if masked.head is not None:
        logits = masked.head(mean).float()
        turn.tell(f"{role}/accuracy", (logits.argmax(1) == y).float().mean())
        terms["labels"] = labels_weight * functional.cross_entropy(logits, y, reduction="none")  # pyright: ignore
    return terms


def patches(masked: MaskedViT, x: Tensor) -> int:
    return (x.shape[-2] // masked.encoder.patch) * (x.shape[-1] // masked.encoder.patch)


def shown(own: Own, count: int) -> int:
    """Patches that the encoder sees: one at least, and one is left to paint."""
    return min(max(1, round((1 - own.hidden) * count)), count - 1)


def masked_preview(masked: MaskedViT, x: Tensor, own: Own) -> dict[str, Tensor]:
    count = patches(masked, x)
    order = torch.rand(len(x), count, generator=torch.Generator().manual_seed(0)).to(x.device)
    painted, hidden, _ = masked(x, order, shown(own, count))
    return {"shown": x * (1 - hidden), "painted": torch.where(hidden > 0, painted, x).clamp(-1, 1)}

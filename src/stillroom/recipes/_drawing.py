"""What recipes that learn to draw pictures share: a critic's terms balanced against a reconstruction, and when each
begins; statistics of latents, and how well pictures come back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.codecs import Codec, require_signed_as_given
from stillroom.data import Loader, Parted, Source, at_most, sample
from stillroom.match import adversarial as match
from stillroom.measure.images import psnr
from stillroom.nets.coding import Decoder, Encoder
from stillroom.settings import NotNegative, Optimizer, Refusal, Share
from stillroom.train import Recipe, Stage

HELD = 256
"""Pictures that are kept from training and measured on at the end, or a tenth of a small set."""
PART = 64
"""Pictures that are encoded at once outside of training."""
SMALLEST = 8
"""Pixels a side, which the critic's three halvings leave one of."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Settings of a decoder that a critic looks at."""

    perceptual: NotNegative = 0.1
    """Distance of feature maps, with `lpips` or random features, which are louder: 1 as released, with LPIPS."""
    adversarial: NotNegative = 0.0
    """Weight of the critic's hinge beside w; 0.5 as released, of rae 0.75. It wants more steps than a small run has."""
    critic_from: Share = 6 / 16
    """Share of the steps after which the critic learns."""
    adversarial_from: Share = 8 / 16
    """Share of the steps after which what is looked at learns from it."""
    critic: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, betas=(0.5, 0.9), name="adam"))


class OfPictures(Recipe):
    """Learns from pictures, of which some are kept and measured on at the end."""

    data: Any

    @classmethod
    def prepare(cls, settings, sources, note):
        data = sources["data"]
        return {"data": set_aside(data)} if isinstance(data, Source) else sources

    def check(self, batch):
        require_signed_as_given(self.data, batch["data"].x)


def set_aside(source: Source) -> Parted:
    """A tenth of its pictures, evenly spread, at most so many."""
    count = len(source)
    out = torch.zeros(count, dtype=torch.bool)
    if held := min(HELD, count // 10):
        out[torch.arange(held) * count // held + count // (2 * held)] = True
    return Parted(source, (~out).nonzero().flatten(), out.nonzero().flatten())


def lively(net: Encoder | Decoder) -> Any:
    """Convolutions between residual blocks begin by keeping the variance of what goes in (He et al. 2015): torch's
    default takes a part of it at every level, and latents that hardly vary cost hundreds of steps at the mean
    picture."""
    *before, last = [m for m in net.layers if isinstance(m, nn.Conv2d)]
    for layer, follows in [(layer, "relu") for layer in before] + [(last, "linear")]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity=follows)         # pyright: ignore[reportArgumentType]
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return net


def refuse_critic(adversarial: float, critic_from: float, adversarial_from: float, size: int) -> None:
    if critic_from > adversarial_from:
        raise Refusal(f"critic_from {critic_from:g} comes after adversarial_from {adversarial_from:g}: the decoder "
                      "would learn from a critic that knows nothing")
    if adversarial and size < SMALLEST:
        raise Refusal(f"adversarial: the critic halves pictures three times, and these have {size} pixels; set it to 0")


def stages_of(name: str, steps: int, adversarial: float, critic_from: float, adversarial_from: float,
              roles: tuple[str, ...] = ()) -> list[Stage]:
    """What learns, the role `name` unless others are given, learns alone, then beside a critic that learns from it,
    then from that critic too."""
    roles = roles or (name,)
    if not adversarial:
        return [Stage(name, steps, roles=roles)]
    first, then = (round(share * steps) for share in (critic_from, adversarial_from))
    parts = ((name, first, roles), ("critic", then - first, (*roles, "critic")),
             ("adversarial", steps - then, (*roles, "critic")))
    return [Stage(stage, count, roles=roles) for stage, count, roles in parts if count]


def judged(critic: nn.Module, x: Tensor, drawn: Tensor, turn) -> tuple[Tensor, Tensor]:
    """The critic's hinge [B]; and what was drawn as the critic saw it, behind random augmentations."""
    real, made = (match.augmented(p, turn.rand((len(x), match.DRAWS))) for p in (x, drawn))
    return match.critic_hinge(critic(real), critic(made.detach())), made


def add_hinges(out: dict[str, dict[str, Tensor]], role: str, critic: nn.Module, x: Tensor, drawn: Tensor,
               terms: Mapping[str, Tensor], share: float, net: nn.Module, turn, learns: bool,
               judge: str = "critic") -> None:
    """The critic's, in the turn of its role `judge`; and the hinge of what has drawn, where that learns from the
    critic, balanced against `terms` at the last layer of `net`."""
    hinge, made = judged(critic, x, drawn, turn)
    if judge in turn:
        out[judge] = {"hinge": hinge}
    if learns:
        out[role]["hinge"] = balanced_hinge(critic, made, terms, share, last_weight(net), turn, role)


def balanced_hinge(critic: nn.Module, made: Tensor, terms: Mapping[str, Tensor], share: float, last: Tensor, turn,
                   role: str) -> Tensor:
    """[B]: the maker's hinge, times `share` |g_rec| / |g_adv| at its last layer, g_rec of the sum of `terms`."""
    hinge = match.maker_hinge(critic(made))
    weight = balance(total(terms), hinge.mean(), last, turn)
    turn.tell(f"{role}/balance", weight)
    return share * weight * hinge


def total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([t.mean() for t in terms.values()]).sum()


def balance(reconstruction: Tensor, other: Tensor, last: Tensor, turn) -> Tensor:
    """|g_rec| / |g_other|, of the gradients over all processes; micro-batches take theirs apart."""
    both = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, other))
    return match.adaptive_weight(*(turn.mean(g) for g in both))


def moments(encode: Callable[[Tensor], Tensor], data: Any, seed: int, pictures: int, device: torch.device,
            over: tuple[int, ...] = (0, 2, 3)) -> tuple[Tensor, Tensor]:
    """Mean and variance of latents over `over`, [C, 1, 1] or [C, h, w], in float64."""
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    with Loader(data, seed=seed, batch=PART, workers=0) as loader, torch.no_grad():
        for i in range(-(-pictures // PART)):
            z = encode(loader.at(i)[0].x[: pictures - i * PART].to(device)).double()
            sums = [v.sum(over, keepdim=True)[0] for v in (z, z.square())]
            first, second = (sums[0], sums[1]) if i == 0 else (first + sums[0], second + sums[1])
            count += z.numel() // sums[0].numel()
    mean = first / count
    return mean, (second / count - mean.square()).clamp(min=0)


def reconstruction_of(codec: Codec, data: Any, seed: int) -> dict[str, Any]:
    """PSNR in dB for a product's card: of held-out pictures, where there are any."""
    held = isinstance(data, Parted) and len(data.held) > 0
    x = data.held.fetch(range(len(data.held)), 0).x if held else sample(data, at_most(data, 64), seed).x
    with torch.no_grad():
        values = torch.cat([psnr(codec.reconstruct(part), part.expand(-1, 3, -1, -1))
                            for part in x.to(codec.device).split(PART)])
    return {"PSNR, dB": round(float(values.mean()), 2), "pictures": len(values),
            "of": "held-out training pictures" if held else "training pictures"}


def errors(drawn: Tensor, x: Tensor, l1: float, l2: float, perceptual: float,
           likeness: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None) -> dict[str, Tensor]:
    """What a reconstruction costs, weighted; balances are struck against the sum of these."""
    error = drawn - x
    terms = {"l1": l1 * error.abs().flatten(1).mean(1)} if l1 else {}
    if l2:
        terms["l2"] = l2 * error.square().flatten(1).mean(1)
    if likeness is not None:
        name, distance = likeness
        terms[name] = perceptual * distance(drawn, x)
    return terms


def last_weight(net: nn.Module) -> Tensor:
    """Of the last layer of either half, at which gradients are compared: all of ours, and diffusers', name it last."""
    layers = [part for part in net.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    if not layers:
        raise Refusal(f"a {type(net).__name__} has no layers of weights, at whose last one gradients could be "
                      "balanced; set adversarial to 0")
    return layers[-1].weight


def normalised(codec: Codec, data: Any, seed: int, most: int = 2048) -> tuple[Codec, int]:
    """The codec with latents of mean 0 and deviation 1 in every channel, and on how many pictures that was seen."""
    raw = Codec(codec.encoder, codec.decoder, replace(codec.space, shift=(0.0,) * codec.space.channels,
                                                      scale=(1.0,) * codec.space.channels))
    count = at_most(data, most)
    mean, variance = moments(raw.encode, data, seed, count, raw.device)
    scale = variance.sqrt()
    scale = scale.clamp(min=1e-3 * float(variance.mean().sqrt()))      # a dead channel is not blown up
    space = replace(codec.space, shift=tuple(mean.flatten().tolist()), scale=tuple(scale.flatten().tolist()))
    return Codec(codec.encoder, codec.decoder, space), count

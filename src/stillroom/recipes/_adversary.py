"""A discriminator on the hidden features of a denoiser, at noised samples: the adversarial part of several recipes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillroom.flows import Bare, Denoiser
from stillroom.match.adversarial import critic_softplus, maker_softplus, r1_approximate
from stillroom.nets.heads import Heads, channels_last, inner_layers
from stillroom.settings import NotNegative, Optimizer, Refusal, given


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    weight: NotNegative = 0.0
    """Of the adversarial term; 0 leaves it out, and needs no data."""
    layers: tuple[str, ...] = ()
    """Modules whose output is judged; the lowest level of a U-Net or the middle block of a transformer unless given."""
    r1: NotNegative = 0.0
    """Weight of the approximate gradient penalty at real samples."""
    r1_std: NotNegative = 0.1
    """Of the noise that it compares with."""
    head: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, betas=(0.0, 0.99), clip=1.0))


def require_weight(s: Adversarial) -> None:
    if not s.weight and s != Adversarial():
        raise Refusal("adversarial: its weight is 0, and nothing of it has an effect; give --adversarial.weight above "
                      "0, or leave it out")
    if not s.r1 and given(s, "r1_std"):
        raise Refusal(f"adversarial.r1_std {s.r1_std:g}: of a penalty whose weight is 0; give --adversarial.r1 above "
                      "0, or leave it out")


class Adversary:
    """Heads on what `denoiser` computes inside, which they move only where it is `taught` by their loss. Both sides are
    judged at one noise level."""

    def __init__(self, denoiser: Denoiser | Bare, settings: Adversarial, shape: tuple[int, ...], law,
                 taught: bool = False):
        self.denoiser, self.settings, self.law, self.taught = denoiser, settings, law, taught
        self.layers = settings.layers or inner_layers(denoiser.net)
        device = next(denoiser.parameters()).device
        y = None if denoiser.classes is None else torch.zeros(1, dtype=torch.long, device=device)
        with torch.no_grad():
            found = self.features(torch.zeros(1, *shape, device=device), torch.ones(1, device=device), y)
        self.heads = Heads([channels_last(f).shape[-1] for f in found])

    def features(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Sequence[Tensor]:
        found = self.denoiser.hidden(x_t, t, y, self.layers)
        return [found[name] for name in self.layers]

    def critic(self, real: Tensor, made: Tensor, turn, y_real: Tensor | None, y: Tensor | None) -> dict[str, Tensor]:
        """Terms of the heads."""
        t = turn.draw(self.law)
        real_t, made_t = (self.denoiser.path.noise(x.detach(), t, turn.randn(x)) for x in (real, made))
        with torch.set_grad_enabled(self.taught):
            of_real, of_made = self.features(real_t, t, y_real), self.features(made_t, t, y)
        logits = self.heads(of_real)
        terms = {"critic": critic_softplus(logits, self.heads(of_made))}
        if self.settings.r1:
            std = self.settings.r1_std
            with torch.no_grad():
                nearby = self.features(real_t + std * turn.randn(real_t), t, y_real)
            terms["r1"] = self.settings.r1 * r1_approximate(logits, self.heads(nearby), std)
        return terms

    def maker(self, made: Tensor, turn, y: Tensor | None) -> Tensor:
        """[B]: the term of whatever made the samples."""
        t = turn.draw(self.law)
        made_t = self.denoiser.path.noise(made, t, turn.randn(made))
        return self.settings.weight * maker_softplus(self.heads(self.features(made_t, t, y)))

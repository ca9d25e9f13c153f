"""Ways to bring latents to a reference. All see latents z [B, *shape] and labels, and know nothing of what made z: an
encoder here, a generator elsewhere. Each has roles of its own, which learn what it `tracks`, and `pulls` at z."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from stillroom import match
from stillroom.flows import Denoiser, Denoises, Flow, denoising_loss, guided
from stillroom.match.adversarial import critic_hinge, maker_hinge
from stillroom.match.latents import unit_kl
from stillroom.nets import Lora
from stillroom.paths import Kind, Law
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Role

DROP = 0.1
"""Share of labels that a fake score learns without, so that it can be guided."""


class ByScores:
    """The gap: for z_t = alpha z + sigma eps, F that learns the law of z as it moves, T of the reference,

        z descends  (push (F - u) + pull (u - T)) / mean |u - T|        in the prediction of F, u what z and eps say

    Where nothing is to push there is no F.
    """

    def __init__(self, reference: Flow, fake: Denoiser | None, law: Law, push: float, pull: float,
                 guidance: tuple[float, float], optimizer: Optimizer):
        self.reference, self.fake, self.law, self.push, self.pull = reference, fake, law, push, pull
        self.optimizer = optimizer
        asked: Denoises = reference.denoiser if fake is None else fake
        self.kind: Kind = asked.prediction
        self.path = asked.path
        # With adapters there is one network: without them it answers for the reference.
        adapted = fake.net if fake is not None and isinstance(fake.net, Lora) else None
        self.bare = nullcontext if adapted is None else adapted.base
        self.real = guided(reference.denoiser if adapted is None else asked, guidance[0])
        self.guided_fake: Any = None if fake is None else guided(fake, guidance[1])
        self.drops = guidance[1] != 1

    def roles(self) -> Mapping[str, Role]:
        if self.fake is None:
            return {}
        adapters = isinstance(self.fake.net, Lora)
        return {"fake": Role(self.fake, self.optimizer, trains="lora_" if adapters else "")}

    def labels(self, denoiser: Denoises, y: Tensor | None, z: Tensor) -> Tensor | None:
        """Those of z; the null label, where a denoiser that knows classes is asked for all of them together."""
        if denoiser.classes is None:
            return None
        return torch.full((len(z),), denoiser.classes, device=z.device) if y is None else y

    def tracks(self, z: Tensor, y: Tensor | None, turn) -> dict[str, dict[str, Tensor]]:
        if self.fake is None or "fake" not in turn:
            return {}
        y = self.labels(self.fake, y, z)
        if y is not None and self.drops:
            y = y.masked_fill(turn.rand((len(y),)) < DROP, self.fake.classes or 0)
        return {"fake": {"dsm": denoising_loss(self.fake, z, turn.draw(self.law), turn.randn(z), y)}}

    def pulls(self, z: Tensor, y: Tensor | None, turn) -> Tensor:
        t, eps = turn.draw(self.law), turn.randn(z)
        c = self.path.over(t, z)
        with torch.no_grad():
            z_t = c.alpha * z + c.sigma * eps
            fake = None if self.fake is None else self.guided_fake(z_t, t, self.labels(self.fake, y, z))
            with self.bare():
                real = self.real.predict(self.kind, z_t, t, self.labels(self.real, y, z))
        if fake is not None:
            turn.tell("fake/apart", (fake.float() - real.float()).square().mean())
        return match.prediction_gap(self.kind, z, eps, c, real if fake is None else fake, real, push=self.push,
                                    pull=self.pull)


class ByDrift:
    """The drifting field among samples of the reference, of all classes together: nothing learns beside the encoder."""

    def __init__(self, samples: Tensor):
        self.samples = samples

    def roles(self) -> Mapping[str, Role]:
        return {}

    def tracks(self, z: Tensor, y: Tensor | None, turn) -> dict[str, dict[str, Tensor]]:
        return {}

    def pulls(self, z: Tensor, y: Tensor | None, turn) -> Tensor:
        x = turn.gather(z).flatten(1)[None]
        rows = (turn.rand((x.shape[1],), shared=True) * len(self.samples)).long()
        drift = match.drift_or_nan(x, self.samples[rows].flatten(1)[None].to(x), coupling="separate", x_softmax=False)
        return match.drift_loss(x, drift)


class ByCritic:
    """A critic of latents, which tells them from samples of the reference: those of every class, where it is told how
    many there are, from samples of that class. `arranged`: sample i is of class i modulo so many, where the reference
    knows classes."""

    def __init__(self, samples: Tensor, width: int, optimizer: Optimizer, classes: int | None = None,
                 arranged: int | None = None):
        self.samples, self.optimizer, self.classes, self.arranged = samples, optimizer, classes, arranged or 1
        self.critic = nn.Sequential(nn.Linear(samples[0].numel() + (classes or 0), width), nn.LeakyReLU(0.2),
                                    nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def roles(self) -> Mapping[str, Role]:
        return {"fake": Role(self.critic, self.optimizer)}

    def judged(self, z: Tensor, y: Tensor | None) -> Tensor:
        z = z.flatten(1)
        return self.critic(z if y is None else torch.cat([z, one_hot(y, self.classes or 0).to(z)], 1))

    def of_class(self, u: Tensor, y: Tensor | None) -> Tensor:
        """Of u uniform in [0, 1), the numbers of samples, of the class y where they have one."""
        rows = (u * (len(self.samples) // self.arranged)).long() * self.arranged
        return rows if y is None or self.arranged == 1 else rows + y

    def tracks(self, z: Tensor, y: Tensor | None, turn) -> dict[str, dict[str, Tensor]]:
        if "fake" not in turn:
            return {}
        real = self.samples[self.of_class(turn.rand((len(z),)), y)].to(z)
        return {"fake": {"hinge": critic_hinge(self.judged(real, y), self.judged(z, y))}}

    def pulls(self, z: Tensor, y: Tensor | None, turn) -> Tensor:
        return maker_hinge(self.judged(z, y))


def fake_of(reference: Flow, conditional: bool, make_net: Any, rank: int | None) -> Denoiser:
    """A copy of the reference's network; adapters on that network itself, of so much rank; or, of a closed form, a new
    network."""
    denoiser = reference.denoiser
    if isinstance(denoiser, Denoiser):
        if rank is None:
            return copy.deepcopy(denoiser).requires_grad_(True)
        denoiser.net = Lora(denoiser.net, rank)
        return denoiser
    if rank is not None:
        raise Refusal("fake lora: adapters stand on a reference's network, and this one is a closed form; leave it out")
    return Denoiser(make_net(reference.shape, reference.classes if conditional else None), denoiser.path, "v")


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """[B]: the ordinary VAE's, KL(q(z | x) || N(0, 1)), a number of z at a time as every other pull."""
    return unit_kl(mean, logvar) / mean[0].numel()

"""Variational score distillation: particles that keep the target's spread, because they know their own score.

Problem: score distillation (`sds`) loses the target's spread: all particles collapse. Treat the particles as samples
of a distribution instead, and follow the difference of two scores: the target's, and that distribution's own.

Equation: with x_t = alpha x + sigma eps, teacher e_T, fake score e_F,

    grad_x = E_{t, eps}[ w(t) (e_T(x_t, t, y) - e_F(x_t, t, y)) ],    w = sigma^2
    e_F    = argmin E |e_F(alpha x + sigma eps, t, y) - eps|^2        over the particles x of this moment

The fake score is a network of its own, or LoRA adapters on the teacher's network. A closed-form teacher has no
network: a small one is first trained on its samples (stage "base"), and the adapters stand on that.

Paper: ProlificDreamer (Wang et al. 2023), arXiv 2305.16213.

Expect: on mixtures, every mode keeps its share and its spread; see the claim `vsd`.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal, cast

import torch

from stillroom.flows import Denoiser, Mixture, denoising_loss
from stillroom.match import prediction_gap
from stillroom.nets import MLP, Lora, tie
from stillroom.recipes import sds
from stillroom.settings import Count, Optimizer, Refusal, refuse_given
from stillroom.train import Role, Stage


@dataclass(frozen=True, kw_only=True)
class Settings(sds.Settings):
    every: Count = 2
    """Updates of the fake score for one of the particles."""
    fake: Literal["full", "lora"] = "full"
    rank: Count = 8
    width: Count = 128
    """Of the small network that stands for a closed-form teacher."""
    base_steps: Count = 2000
    """Steps that train it on the teacher's samples, for fake = lora."""
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-3, name="adam"))


class VSD(sds.SDS):
    """The teacher, the particles and what becomes of them are those of `sds`; another score stands for the noise."""

    Settings = Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings = settings
        closed = isinstance(self.flow.denoiser, Mixture)
        self.needs_base = settings.fake == "lora" and closed
        if settings.fake == "full":
            refuse_given(settings, ("rank", "base_steps"), "the fake score learns whole; give --fake lora, or leave it "
                                                           "out")
        if not closed:
            refuse_given(settings, ("width", "base_steps"), "the fake score is the teacher's own network; leave it out")
        self.fake = self.make_fake()

    def make_fake(self) -> Denoiser:
        teacher = self.flow.denoiser
        if isinstance(teacher, Mixture):
            net = MLP(self.flow.shape[0], self.settings.width, classes=teacher.classes)
            fake = Denoiser(net, teacher.path, "eps")
        elif isinstance(teacher, Denoiser):
            fake = copy.deepcopy(teacher)
            if self.settings.fake == "lora":        # on the teacher's own weights, which are held once
                tie(fake.net, teacher.net)
        else:
            raise Refusal(f"teacher {self.settings.teacher}: the fake score of a {type(teacher).__name__} is not known")
        if self.settings.fake == "lora":
            fake.net = Lora(fake.net, self.settings.rank)
        return fake

    def roles(self):
        s = self.settings
        roles = {"particles": Role(self.particles, s.particles, every=s.every)}
        if self.needs_base:
            roles["base"] = Role(self.fake, s.score, trains=r"^(?!.*lora_)")
        return roles | {"fake": Role(self.fake, s.score, trains="lora_" if s.fake == "lora" else "")}

    def stages(self):
        distil = Stage("distil", self.settings.steps, roles=("particles", "fake"))
        return [Stage("base", self.settings.base_steps, roles=("base",)), distil] if self.needs_base else [distil]

    def losses(self, batch, turn):
        return self.base_losses(turn) if turn.stage == "base" else self.distil_losses(turn)

    def base_losses(self, turn):
        noise = turn.randn((turn.batch, *self.flow.shape))
        mixture = cast(Mixture, self.flow.denoiser)
        x, y = mixture.place(noise, turn.rand((turn.batch,)))
        y = y.masked_fill(turn.rand((turn.batch,)) < 0.1, mixture.classes or 0)
        return {"base": {"dsm": denoising_loss(self.fake, x, turn.draw(self.law), turn.randn(x), y)}}

    def distil_losses(self, turn):
        rows = turn.rows(self.settings.batch)
        x, y = self.particles(rows), None if self.y is None else self.y[rows]
        t, eps = turn.draw(self.law), turn.randn(x)
        yield {"fake": {"dsm": denoising_loss(self.fake, x.detach(), t, eps, y)}}
        if "particles" in turn:
            t, eps = turn.draw(self.law), turn.randn(x)
            c = self.teacher.path.over(t, x)
            with torch.no_grad():
                x_t = c.alpha * x + c.sigma * eps
                fake, real = self.fake.x0(x_t, t, y), self.teacher.x0(x_t, t, y)
            yield {"particles": {"gap": prediction_gap("x0", x, eps, c, fake, real, "sigma")}}

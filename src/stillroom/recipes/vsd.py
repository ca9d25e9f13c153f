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

from stillroom.flows import Denoiser, Mixture, denoising_loss, guided, require
from stillroom.match import gap
from stillroom.nets import MLP, Lora
from stillroom.nets.particles import Particles, labels_of
from stillroom.paths import Uniform
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Run, Share, Where
from stillroom.train import Product, Recipe, Role, Stage
from stillroom.train.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class Settings(Run):
    teacher: Where
    """ring:MODES[:STD], a flow run, or a diffusers folder."""
    batch: int = 512
    """The particles: all of them move on every turn."""
    steps: int = 3000
    conditional: bool = False
    """Give particle i the class i modulo the number of classes."""
    guidance: float = 1.0
    every: Count = 2
    """Updates of the fake score for one of the particles."""
    times: tuple[Share, Share] = (0.02, 0.98)
    spread: NotNegative = 1.0
    """Standard deviation of the particles at the start."""
    fake: Literal["full", "lora"] = "full"
    rank: Count = 8
    width: Count = 128
    """Of the small network that stands for a closed-form teacher."""
    base_steps: Count = 2000
    """Steps that train it on the teacher's samples, for fake = lora."""
    particles: Optimizer = field(default_factory=lambda: Optimizer(lr=0.02, name="adam", decay="cosine"))
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-3, name="adam"))


class VSD(Recipe):
    Settings = Settings

    def __init__(self, settings: Settings):
        self.settings = settings
        self.flow = open_teacher(settings.teacher)
        self.y = labels_of(settings.batch, self.flow.classes) if settings.conditional else None
        self.teacher = guided(self.flow.denoiser, settings.guidance)
        self.particles = Particles(settings.spread * torch.randn(settings.batch, *self.flow.shape))
        self.law = Uniform(*settings.times)
        self.needs_base = settings.fake == "lora" and isinstance(self.flow.denoiser, Mixture)
        self.fake = self.make_fake()

    def make_fake(self) -> Denoiser:
        teacher = self.flow.denoiser
        if isinstance(teacher, Mixture):
            net = MLP(self.flow.shape[0], self.settings.width, classes=teacher.classes)
            fake = Denoiser(net, teacher.path, "eps")
        elif isinstance(teacher, Denoiser):
            fake = copy.deepcopy(teacher)
        else:
            raise Refusal(f"teacher {self.settings.teacher}: the fake score of a {type(teacher).__name__} is not known")
        if self.settings.fake == "lora":
            fake.net = Lora(fake.net, self.settings.rank)
        return fake

    def check(self, batch):
        y = self.flow.labels(0, 512)
        require(self.flow.denoiser, self.flow.sample(512), y, f"teacher {self.settings.teacher}")

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
        losses = {"fake": {"dsm": denoising_loss(self.fake, x.detach(), t, eps, y)}}
        if "particles" in turn:
            t, eps = turn.draw(self.law), turn.randn(x)
            c = self.teacher.path.over(t, x)
            with torch.no_grad():
                x_t = c.alpha * x + c.sigma * eps
                fake, real = self.fake.x0(x_t, t, y), self.teacher.x0(x_t, t, y)
            # sigma^2 (e_T - e_F) = alpha sigma (F - T) in x0 space
            losses["particles"] = {"gap": gap(x, fake, real, weight=c.alpha * c.sigma)}
        return losses

    def preview(self):
        return {"particles": self.particles.x.detach()}

    def product(self):
        points = self.particles.x.detach()
        parts = {"points": points} if self.y is None else {"points": points, "labels": self.y}
        return Product("points", parts, {"teacher": self.settings.teacher, "guidance": self.settings.guidance})

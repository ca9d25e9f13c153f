"""Score distillation sampling: particles follow a frozen score down to its modes.

Problem: make samples of a diffusion model by moving the samples themselves, or whatever renders them.

Equation: with x_t = alpha x + sigma eps and the teacher's guided prediction e_T,

    grad_x = E_{t, eps}[ w(t) (e_T(x_t, t, y) - eps) ],    w = sigma^2

In x0 space the injected noise eps stands for x itself, so this is the gap with F = x.

Paper: DreamFusion (Poole et al. 2022), arXiv 2209.14988.

Expect: collapse. All particles go where the score leads when it is averaged over noise levels: a mode, or a place
between modes; the target's spread is lost. That is what `vsd` mends, and why this recipe is its control.
"""

from dataclasses import dataclass, field

import torch

from stillroom.flows import guided
from stillroom.match import prediction_gap
from stillroom.nets.particles import Particles, labels_of
from stillroom.paths import LawName
from stillroom.recipes._students import law_within, require_teacher
from stillroom.settings import NotNegative, Optimizer, Refusal, Run, Share, Where
from stillroom.train import Product, Recipe, Role, Stage
from stillroom.train.checkpoint import full
from stillroom.train.teacher import encoding_of, open_teacher, teacher_card


@dataclass(frozen=True, kw_only=True)
class Settings(Run):
    teacher: Where
    """ring:MODES[:STD], a flow run, or a diffusers folder."""
    prompts: Where = ""
    """Of a text-to-image teacher: what `stillroom cache --prompts` wrote."""
    batch: int = 512
    """The particles: all of them move on every turn."""
    steps: int = 3000
    conditional: bool = False
    """Give particle i the class i modulo the number of classes."""
    guidance: float = 1.0
    times: tuple[Share, Share] = (0.02, 0.98)
    """Noise levels at which particles are looked at, before the teacher's shift."""
    law: LawName = "uniform"
    """Of the times between them."""
    spread: NotNegative = 1.0
    """Standard deviation of the particles at the start."""
    particles: Optimizer = field(default_factory=lambda: Optimizer(lr=0.02, name="adam", decay="cosine"))


class SDS(Recipe):
    Settings = Settings

    def __init__(self, settings: Settings):
        self.settings = settings
        self.flow, self.taught_by = open_teacher(settings.teacher, settings.prompts), teacher_card(settings.teacher)
        if settings.conditional and self.flow.classes is None:
            raise Refusal(f"teacher {settings.teacher} has no classes; leave out --conditional")
        if settings.guidance != 1 and not settings.conditional:
            raise Refusal(f"guidance {settings.guidance} needs a class for each particle; add --conditional")
        self.y = labels_of(settings.batch, self.flow.classes) if settings.conditional else None
        self.teacher = guided(self.flow.denoiser, settings.guidance)
        self.particles = Particles(settings.spread * torch.randn(settings.batch, *self.flow.shape))
        self.law = law_within(self.teacher, *settings.times, settings.law, self.flow.shift)

    def check(self, batch):
        require_teacher(self.flow, self.settings.teacher, self.settings.batch)

    def roles(self):
        return {"particles": Role(self.particles, self.settings.particles)}

    def stages(self):
        return [Stage("distil", self.settings.steps)]

    def losses(self, batch, turn):
        rows = turn.rows(self.settings.batch)
        x, y = self.particles(rows), None if self.y is None else self.y[rows]
        t, eps = turn.draw(self.law), turn.randn(x)
        c = self.teacher.path.over(t, x)
        with torch.no_grad():
            real = self.teacher.x0(c.alpha * x + c.sigma * eps, t, y)
        return {"particles": {"gap": prediction_gap("x0", x, eps, c, x, real, "sigma")}}

    def preview(self):
        return {"particles": full(self.particles.x.detach())}

    def product(self):
        points = self.particles.x.detach()
        parts = {"points": points} if self.y is None else {"points": points, "labels": self.y}
        card = {**self.taught_by, **encoding_of(self.settings.teacher), "guidance": self.settings.guidance}
        return Product("points", parts, card)

"""Distribution matching distillation: a one-step generator that follows the difference of two scores.

Problem: draw in one evaluation what a flow draws in fifty, without data and without following its trajectories.

Equation (Yin et al. 2024): for x = G(z, y) and x_t = alpha x + sigma eps,

    grad_G = E[ w(t) (F(x_t, t, y) - T(x_t, t, y)) dG ],    w = 1 / mean |x - T(x_t, t, y)|

T is the teacher's x0, F that of a second network which learns the generator's own distribution as it moves. Both start
from the teacher's weights, and so does the student, asked at t = 1. So weighted, the gradient is the same in every
prediction (`match.direction`), and both answer in their own.

Paper: One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828; DMD2, arXiv 2405.14867.

Expect: the student moves on every `every`-th step, because its fake score must keep up with it.
"""

import copy
from dataclasses import dataclass, field
from typing import cast

import torch

from stillroom.flows import Denoiser, Flow, OneStep, denoising_loss, guided, require, student_of
from stillroom.match import direction, pseudo_target
from stillroom.paths import Uniform, sign_of, target
from stillroom.settings import Count, Decay, Optimizer, Refusal, Run, Share, Where
from stillroom.train import Average, Product, Recipe, Role, Stage
from stillroom.train.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class OneStepRun(Run):
    """What one-step students of a flow share that need no data."""

    teacher: Where
    """A flow run."""
    steps: int = 2000
    batch: int = 128
    guidance: float = 1.0
    """Of the teacher; the student has it built in."""
    average: Decay = 0.999
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0, warmup=100))


@dataclass(frozen=True, kw_only=True)
class Settings(OneStepRun):
    every: Count = 2
    """Updates of the fake score for one of the student."""
    times: tuple[Share, Share] = (0.02, 0.98)
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0))


def networked(flow: Flow, name: str) -> Denoiser:
    """The flow's denoiser, which must have a network for a student to start from."""
    if not isinstance(flow.denoiser, Denoiser):
        raise Refusal(f"teacher {name}: it has no network for a student to start from; give a flow run")
    return flow.denoiser


def require_teacher(flow: Flow, name: str) -> None:
    """On its own samples, where there are no data."""
    require(flow.denoiser, flow.sample(512), flow.labels(0, 512), f"teacher {name}")


def one_step_product(generator: OneStep, settings: OneStepRun) -> Product:
    card = {"shape": list(generator.shape), "classes": generator.classes, "teacher": settings.teacher,
            "guidance": settings.guidance}
    return Product("generator", {"generator": generator}, card)


class DMD(Recipe):
    Settings = Settings

    def __init__(self, settings: Settings):
        self.settings, self.flow = settings, open_teacher(settings.teacher)
        teacher = networked(self.flow, settings.teacher)
        self.teacher = guided(teacher, settings.guidance)
        self.student = student_of(teacher, self.flow.shape, takes_strength=False)
        self.fake = copy.deepcopy(teacher).requires_grad_(True)
        self.mean = Average(self.student, settings.average)
        self.law = Uniform(*settings.times)

    def check(self, batch):
        require_teacher(self.flow, self.settings.teacher)

    def roles(self):
        s = self.settings
        return {"student": Role(self.student, s.student, every=s.every, average=self.mean),
                "fake": Role(self.fake, s.score)}

    def stages(self):
        return [Stage("distil", self.settings.steps)]

    def labels(self, turn):
        """[B], class-balanced over the global batch."""
        y = self.flow.labels(0, self.settings.batch)
        return None if y is None else y[turn.rows(self.settings.batch)].to(next(self.student.parameters()).device)

    def losses(self, batch, turn):
        y, z = self.labels(turn), turn.randn((turn.batch, *self.flow.shape))
        with torch.set_grad_enabled("student" in turn):
            x = self.student(z, y)
        t, eps = turn.draw(self.law), turn.randn(x)
        losses = {"fake": {"dsm": denoising_loss(self.fake, x.detach(), t, eps, y)}}
        if "student" in turn:
            t, eps = turn.draw(self.law), turn.randn(x)
            c, kind = self.teacher.path.over(t, x), self.teacher.prediction
            with torch.no_grad():
                x_t, true = c.alpha * x + c.sigma * eps, target(kind, x, eps, c)
                fake, real = self.fake(x_t, t, y), self.teacher(x_t, t, y)
            losses["student"] = {"gap": pseudo_target(x, direction(true, fake, real, sign_of(kind)))}
        return losses

    def preview(self):
        return {"samples": cast(OneStep, self.mean.module).sample(64), "teacher": self.flow.sample(64)}

    def product(self):
        return one_step_product(cast(OneStep, self.mean.module), self.settings)

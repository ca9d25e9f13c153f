"""Consistency distillation: a network that answers the same end from every point of a trajectory.

Problem: draw in one evaluation, or few, what a flow draws in fifty.

Equation (Song et al. 2023): with f(x, t) = x0 as the student sees it, which at t = 0 is x itself, and one step of the
teacher's flow from t to s < t,

    min E d( f(x_t, t, y), sg f(x_s, s, y) ),    x_s = x_t + (s - t) v_T(x_t, t, y),    d = sqrt(|a-b|^2 + c^2) - c

Times lie on a grid of `segments`; the student starts from the teacher.

Paper: Consistency Models, arXiv 2303.01469; pseudo-Huber distance: Improved Techniques, arXiv 2310.14189.

Expect: errors of all steps add up at t = 1: one evaluation is blurrier than two.
"""

import copy
from dataclasses import dataclass, field
from typing import cast

import torch

from stillroom.data import encoding_card
from stillroom.flows import Denoiser, OneStep, guided, require
from stillroom.match import pseudo_huber
from stillroom.paths import shift
from stillroom.recipes.dmd import networked
from stillroom.settings import Count, Decay, Images, Optimizer, Run, Where
from stillroom.train import Average, Product, Recipe, Role, Stage
from stillroom.train.teacher import open_teacher_of


@dataclass(frozen=True, kw_only=True)
class Settings(Images, Run):
    teacher: Where
    """A flow run."""
    steps: int = 2000
    batch: int = 128
    guidance: float = 1.0
    segments: Count = 32
    average: Decay = 0.999
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0, warmup=100))


class Consistency(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        self.settings, self.data = settings, data
        self.flow = open_teacher_of(settings.teacher, data)
        teacher = networked(self.flow, settings.teacher)
        self.teacher = guided(teacher, settings.guidance)
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.mean = Average(self.student, settings.average)

    def check(self, batch):
        x, y = batch["data"]
        require(self.flow.denoiser, x, y, f"teacher {self.settings.teacher}")

    def roles(self):
        return {"student": Role(self.student, self.settings.student, average=self.mean)}

    def stages(self):
        return [Stage("distil", self.settings.steps)]

    def losses(self, batch, turn):
        (x, y), n = batch["data"], self.settings.segments
        i = (turn.rand((len(x),)) * n).floor().clamp(max=n - 1)                 # from (i + 1) / n to i / n
        t, s = (shift(k / n, self.flow.shift) for k in (i + 1, i))
        x_t = self.teacher.path.noise(x, t, turn.randn(x))
        with torch.no_grad():
            x_s = x_t + (s - t).view(-1, *[1] * (x.ndim - 1)) * self.teacher.v(x_t, t, y)
            target = torch.where((s > 0).view(-1, *[1] * (x.ndim - 1)), self.student.x0(x_s, s, y), x_s)
        return {"student": {"jump": pseudo_huber(self.student.x0(x_t, t, y), target)}}

    def generator(self) -> OneStep:
        student = cast(Denoiser, self.mean.module)
        return OneStep(student.net, student.path, student.prediction, self.flow.shape)

    def preview(self):
        return {"samples": self.generator().sample(64), "teacher": self.flow.sample(64)}

    def product(self):
        s = self.settings
        card = {"shape": list(self.flow.shape), "classes": self.flow.classes, "data": s.data, "teacher": s.teacher,
                "guidance": s.guidance, **encoding_card(self.data)}
        return Product("generator", {"generator": self.generator()}, card)

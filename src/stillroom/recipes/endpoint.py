"""Endpoint regression: a one-step generator that repeats where its teacher's trajectories ended.

Problem: draw in one evaluation what a flow draws in fifty. The plainest way: learn the pairs (noise, sample) by heart.

Equation (Luhman & Luhman 2021): with x(z, y) where the teacher's flow carries the noise z,

    min E_z | G(z, y) - x(z, y) |^2

The pairs are drawn once. The student starts from the teacher's network, asked at t = 1.

Paper: Knowledge Distillation in Iterative Generative Models, arXiv 2101.02388.

Expect: blur, where neighbouring noises end far apart: the mean of what they end in. It is the control of `drifting`.
"""

from dataclasses import dataclass
from typing import cast

import torch

from stillroom.flows import OneStep, noise_of, student_of
from stillroom.match import squared_error
from stillroom.recipes.dmd import OneStepRun, networked, one_step_product, require_teacher
from stillroom.settings import Count, seed_of
from stillroom.train import Average, Recipe, Role, Stage
from stillroom.train.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class Settings(OneStepRun):
    pairs: Count = 5000
    """Trajectories of the teacher, followed once."""
    teacher_steps: Count = 50


class Endpoint(Recipe):
    Settings = Settings

    def __init__(self, settings: Settings):
        self.settings, self.flow = settings, open_teacher(settings.teacher)
        self.student = student_of(networked(self.flow, settings.teacher), self.flow.shape, takes_strength=False)
        self.mean = Average(self.student, settings.average)
        self.noises, self.ends = torch.zeros(2, settings.pairs, *self.flow.shape)

    def check(self, batch):
        require_teacher(self.flow, self.settings.teacher)

    def roles(self):
        return {"student": Role(self.student, self.settings.student, average=self.mean)}

    def stages(self):
        return [Stage("distil", self.settings.steps, enter=self.follow)]

    def follow(self) -> None:
        s = self.settings
        seed = seed_of(s.seed, "pairs")         # not the noises that a user draws with, which would be known by heart
        self.noises.copy_(noise_of(self.flow.shape, 0, s.pairs, seed))
        self.ends.copy_(self.flow.sample(s.pairs, seed, guidance=s.guidance, steps=s.teacher_steps))

    def memory(self):
        return {"noises": self.noises, "ends": self.ends}

    def losses(self, batch, turn):
        pairs, y = self.settings.pairs, None
        i = (turn.rand((turn.batch,)) * pairs).long().clamp(max=pairs - 1)
        if self.flow.classes is not None:
            y = i % self.flow.classes                   # as the flow labels its samples
        return {"student": {"endpoint": squared_error(self.student(self.noises[i], y), self.ends[i])}}

    def preview(self):
        return {"samples": cast(OneStep, self.mean.module).sample(64), "teacher": self.flow.sample(64)}

    def product(self):
        return one_step_product(cast(OneStep, self.mean.module), self.settings)

"""Endpoint regression: a one-step generator that repeats where its teacher's trajectories ended.

Problem: draw in one evaluation what a flow draws in fifty. The plainest way: learn the pairs (noise, sample) by heart.

Equation (Luhman & Luhman 2021): with x(z, y) where the teacher's flow carries the noise z,

    min E_z | G(z, y) - x(z, y) |^2

The pairs are drawn once. The student starts from the teacher's network, asked at t = 1.

Paper: Knowledge Distillation in Iterative Generative Models, arXiv 2101.02388.

Expect: blur, where neighbouring noises end far apart: the mean of what they end in. It is the control of `drifting`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stillroom.match import squared_error
from stillroom.recipes._students import Distillation, Ends, Student, at_noise, averaged, one_step_of
from stillroom.settings import Count


@dataclass(frozen=True, kw_only=True)
class Settings(Student):
    ABSENT: ClassVar[Mapping[str, str]] = {"student_steps": "endpoint makes one step; leave it out"}

    pairs: Count = 5000
    """Trajectories of the teacher, followed once."""
    teacher_steps: Count = 50


class Endpoint(Distillation):
    Settings = Settings
    ends: Ends

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings = settings
        self.student = self.begun()
        self.mean = self.follower(self.student)
        self.ends = Ends(self.flow, settings.pairs, settings, settings.guidance, settings.teacher_steps)
        self.noises = self.ends.noises().to(self.device)        # a function of the seed, which no checkpoint need hold

    def losses(self, batch, turn):
        i = self.ends.chosen(turn)
        x, y = self.ends.at(i)
        return {"student": {"endpoint": squared_error(at_noise(self.student, self.noises[i], y), x)}}

    def generator(self):
        return one_step_of(averaged(self.mean), self.flow)

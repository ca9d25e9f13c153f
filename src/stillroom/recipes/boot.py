"""BOOT: one step, learned without data by following the teacher's trajectory backwards from pure noise.

Problem: draw in one evaluation what a flow draws in fifty, with no data, and no trajectories stored beforehand.

Equation (Gu et al. 2023): the student y(eps, t) is told the noise eps and a time t, and answers the signal of the
teacher's trajectory there: x_t = alpha_t y + sigma_t eps. With f(x_t, t) the teacher's x0, s < t neighbours on a grid
and r = sigma_s alpha_t / (sigma_t alpha_s), one DDIM step of the teacher reads

    y(eps, s) = y(eps, t) + (1 - r) (f(x_t, t) - y(eps, t))

    min E[ |y(eps, s) - sg right-hand side|^2 / (1 - r)^2 + |y(eps, 1) - f(sigma_1 eps, 1)|^2 ]

The second term is the boundary: nothing has been followed yet. The student starts from the teacher's network, asked for
every t at pure noise; the product is y(eps, 0).

Paper: BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping, arXiv 2306.05544.

Expect: errors travel from t = 1 to t = 0, one step of the grid an update: too few updates leave the end behind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from stillroom.flows import OneStep, require_sight
from stillroom.match import squared_error
from stillroom.paths import Coefficients
from stillroom.recipes._students import Distillation, Student
from stillroom.settings import Count, NotNegative, Refusal

NARROWEST = 0.01
"""1 - r of a pair of times, from below: the weight 1 / (1 - r)^2 of a fine grid ends at 10 000."""


@dataclass(frozen=True, kw_only=True)
class Settings(Student):
    ABSENT: ClassVar[Mapping[str, str]] = {"data": "BOOT needs none; leave it out",
                                           "student_steps": "BOOT makes one step; for a student of several, stillroom "
                                                            "distill consistency or hyper-sd"}
    grid: Count = 64
    """Steps of the teacher from noise to data."""
    boundary: NotNegative = 1.0
    """Weight of the term at t = 1."""


class BOOT(Distillation):
    Settings = Settings
    student: OneStep

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings = settings
        require_sight(self.flow.denoiser, f"teacher {settings.teacher}")
        begun = self.begun()
        if begun.scale_input:
            raise Refusal(f"teacher {settings.teacher}: it scales its input by the noise of the time that it is told; "
                          "BOOT tells it other times; train the teacher on another path")
        self.student = OneStep(begun.net, begun.path, begun.prediction, self.flow.shape, asked=0.0,
                               takes_strength=False)
        self.mean = self.follower(self.student)

    def losses(self, batch, turn):
        y, z, n = self.labels(turn), self.noise(turn), self.settings.grid
        i = (turn.rand((len(z),)) * n).floor().clamp(max=n - 1)                 # from (i + 1) / n to i / n
        t, s, one = self.flow.time((i + 1) / n), self.flow.time(i / n), torch.ones_like(i)
        now, then, start = (self.teacher.path.over(u, z) for u in (t, s, one))
        with torch.no_grad():
            signal = self.student.signal(z, t, y)
            answer = self.teacher.x0(now.alpha * signal + now.sigma * z, t, y)
            target, moved = bootstrapped(signal, answer, now, then)
            begin = self.teacher.x0(start.sigma * z, one, y)
        weight = moved.flatten().clamp(min=NARROWEST) ** -2
        return {"student": {
            "bootstrap": weight * squared_error(self.student.signal(z, s, y), target),
            "boundary": self.settings.boundary * squared_error(self.student.signal(z, one, y), begin),
        }}

    def generator(self) -> OneStep:
        return cast(OneStep, self.mean.module)


def bootstrapped(y: Tensor, f: Tensor, t: Coefficients, s: Coefficients) -> tuple[Tensor, Tensor]:
    """The signal at time s by one DDIM step from that at t, where the teacher answers f; and the share 1 - r."""
    moved = 1 - s.sigma * t.alpha / (t.sigma * s.alpha)
    return y + moved * (f - y), moved

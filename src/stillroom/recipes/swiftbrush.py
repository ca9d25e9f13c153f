"""SwiftBrush: variational score distillation of a one-step generator, with one set of teacher weights and no image.

Problem: draw in one evaluation what a flow draws in fifty, from labels alone: no images, no trajectories, and no second
copy of the teacher for the student's own score.

Equation (Nguyen & Tran 2024): for x = G(z, y) and x_t = alpha x + sigma eps, teacher e_T, and e_F the same network with
low-rank adapters, both guided alike,

    grad_G = E[ sigma^2 (e_T(x_t, t, y) - e_F(x_t, t, y)) dG ],    L_F = E alpha^2 | e_F(x_t, t, y) - eps |^2

That is the gradient of `vsd`, for a network instead of particles. Each step moves the student and the adapters. Labels
are dropped in L_F with probability `drop`, so that the guided e_F has an answer without a label.

Paper: SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation, arXiv 2312.05239.

Expect: spread within a class, which score distillation (the injected eps in the place of e_F) loses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stillroom.flows import denoising_loss, guided
from stillroom.match import prediction_gap
from stillroom.paths import LawName
from stillroom.recipes._students import Distillation, Student, at_noise, averaged, one_step_of
from stillroom.settings import Count, Optimizer, Share
from stillroom.train import Role


@dataclass(frozen=True, kw_only=True)
class Settings(Student):
    ABSENT: ClassVar[Mapping[str, str]] = {"data": "SwiftBrush needs none; leave it out",
                                           "student_steps": "SwiftBrush makes one step; leave it out"}

    fake_lora: Count = 8
    """Rank of the adapters on the teacher's own weights, which are the fake score."""
    drop: Share = 0.1
    """Share of labels dropped in the fake score's loss."""
    times: tuple[Share, Share] = (0.02, 0.98)
    """Noise levels of the gap, before the teacher's shift; the fake score learns at all there are."""
    law: LawName = "uniform"
    """Of the times of both."""
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0))


class SwiftBrush(Distillation):
    Settings = Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings = settings
        if settings.guidance != 1:
            self.require_two_answers()
        self.student = self.begun()
        self.mean = self.follower(self.student)
        self.fake = self.begun_on_teacher(settings.fake_lora)
        self.guided_fake = guided(self.fake, settings.guidance)
        self.gap_law, self.fake_law = self.law(*settings.times, settings.law), self.law(name=settings.law)

    def roles(self):
        s = self.settings
        return {"student": self.role(self.student, s.student, average=self.mean),
                "fake": Role(self.fake, s.score, trains="lora_")}

    def losses(self, batch, turn):
        y, z = self.labels(turn), self.noise(turn)
        x = at_noise(self.student, z, y)
        yield {"student": {"gap": self.gap(x, y, turn)}}
        yield {"fake": {"dsm": self.tracked(x.detach(), y, turn)}}

    def tracked(self, x: Tensor, y: Tensor | None, turn) -> Tensor:
        """In the fake score's own prediction; the paper's weight of eps."""
        t, eps, y = turn.draw(self.fake_law), turn.randn(x), self.dropped(y, self.settings.drop, turn)
        return self.fake.path.at(t).alpha ** 2 * denoising_loss(self.fake, x, t, eps, y)

    def gap(self, x: Tensor, y: Tensor | None, turn) -> Tensor:
        t, eps = turn.draw(self.gap_law), turn.randn(x)
        c = self.teacher.path.over(t, x)
        with torch.no_grad():
            x_t = c.alpha * x + c.sigma * eps
            fake, real = self.own(x, x_t, t, y), self.teacher.x0(x_t, t, y)
        return prediction_gap("x0", x, eps, c, fake, real, "sigma")

    def own(self, x: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x0 of the student's own distribution at x_t, which was made from x."""
        return self.guided_fake.x0(x_t, t, y)

    def generator(self):
        return one_step_of(averaged(self.mean), self.flow)

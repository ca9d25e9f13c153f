"""Consistency distillation: a network that answers the same end from every point of a trajectory.

Problem: draw in one evaluation, or few, what a flow draws in fifty.

Equation (Song et al. 2023): with J(x_t, t -> r) the student's DDIM step, and one step of the teacher's flow from t to
s < t,

    min E d( J(x_t, t -> 0, y), sg J(x_s, s -> 0, y) ),    x_s = J_T(x_t, t -> s, y),    d = sqrt(|a-b|^2 + c^2) - c

J to 0 is x0 as the student sees it, and at t = 0 x itself. Times lie on a grid; the student starts from the teacher.

Paper: Consistency Models, arXiv 2303.01469; pseudo-Huber distance: Improved Techniques, arXiv 2310.14189.

Expect: errors of all steps add up at t = 1. On mixtures two evaluations, noised anew between, come farther than one:
see the claim `hyper-sd`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.flows import Denoiser, Move, require_sight, step
from stillroom.match import pseudo_huber
from stillroom.paths import expand
from stillroom.recipes._students import Distillation, WithData, averaged, generator_of, plans_of
from stillroom.settings import Count, Refusal

SERVED = (1, 2, 4, 8)


ROUNDING = 1e-5
"""Of a share of the way on an edge, which is not to fall into the segment above."""


@dataclass(frozen=True, kw_only=True)
class Settings(WithData):
    student_steps: Count = 1
    """Evaluations of the student for a sample; `sample --steps` may ask for 1, 2, 4 or 8 as well."""
    grid: Count = 32
    """Steps of the teacher from noise to data."""


class Consistency(Distillation):
    Settings = Settings
    inputs = ("data",)
    jump: Move = "ode"

    def __init__(self, settings: Settings, data=None):
        super().__init__(settings, data)
        self.settings = settings
        require_sight(self.flow.denoiser, f"teacher {settings.teacher}")
        if self.origin.prediction == "x0" and not self.begins_near():
            raise Refusal(f"teacher {settings.origin or settings.teacher}: it answers x0, which nothing holds to x at "
                          "t = 0, and the student would fall to a point; give one that answers v or eps")
        self.student = self.begun()
        self.mean = self.follower(self.student)
        self.ends = self.in_place_of_data()

    def losses(self, batch, turn):
        here, there, _ = self.jumped(*self.given(batch, turn), turn)
        return {"student": {"jump": pseudo_huber(here, there)}}

    def jumped(self, x: Tensor, y: Tensor | None, turn) -> tuple[Tensor, Tensor, Tensor]:
        """Where the student jumps from a time of the grid, where it should, and to which time [B]."""
        n = self.settings.grid
        i = (turn.rand((len(x),)) * n).floor().clamp(max=n - 1)                 # from (i + 1) / n to i / n of the way
        goal = self.goal((i + 1) / n, turn)
        s = torch.where(goal - i / n > ROUNDING, goal, i / n)                   # no step of the teacher beyond the goal
        t, s, r = (self.flow.time(share) for share in ((i + 1) / n, s, goal))
        x_t = self.teacher.path.noise(x, t, turn.randn(x))
        with torch.no_grad():
            x_s = step(self.teacher, x_t, t, s, y, "ode")
            arrived = expand(s <= r, x)                                         # by the teacher's step alone
            there = torch.where(arrived, x_s, step(self.target, x_s, s, r, y, self.jump))
        return step(self.student, x_t, t, r, y, self.jump), there, r

    def begins_near(self) -> bool:
        """Whether jumps are short at first, so that the teacher's own steps reach their ends."""
        return False

    @property
    def target(self) -> Denoiser:
        """Who says where the jump should end."""
        return self.student

    def goal(self, share: Tensor, turn) -> Tensor:
        """[B]: the share of the way to which the student jumps from another."""
        return torch.zeros_like(share)

    def generator(self):
        own = self.settings.student_steps
        plans = plans_of(self.flow, own, *(k for k in SERVED if k != own))
        return generator_of(averaged(self.mean), self.flow, plans, "renoise")

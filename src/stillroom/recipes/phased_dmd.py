"""Phased DMD: an expert for each of a few steps, one trained after another, by distribution matching on the way.

Problem: of a student of several steps DMD lets one step carry the gradient, and judges the x0 that it answers: each
step is taught to be the last one, and several are hardly more diverse than one.

Equation (Fan et al. 2025): at times 1 = t_0 > ... > t_N = 0, expert k makes an Euler step from t_{k-1} to s = t_k (or,
of a phase of several steps, these; in training it leaves after any of them, and goes straight to s). The law of its x_s
is matched, at noise levels above s: with x_t = alpha_{t|s} x_s + sigma_{t|s} eps, t in (s, 1],

    grad = E[ w (T(x_t, t, y) - F(x_t, t, y)) dx_s ],    F = argmin E omega |sigma_{t|s} (F(x_t, t, y) - u)|^2
    u = (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_{t|s}) eps - x_s / alpha_s
    omega = min(1 / sigma_{t|s}^2, 10),    w = 1 / mean |u - T(x_t, t, y)|

u, here the velocity of the linear path, is unbiased although no x0 is seen (`paths.subinterval_target`, for whatever F
predicts; in x0 the gradient is along F - T). w is DMD's weight with x_s in the place of x0 (ours: the paper's is a
function of s and t). At s = 0 this is DMD, but for omega. Experts that were trained stand still, and in each phase the
fake score begins anew at the teacher.

Paper: Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals, arXiv 2510.27684.

Expect: a network for each phase to keep, of which each step asks one; see the claim `phased-dmd`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from stillroom.flows import FewStep, rollout
from stillroom.match import direction, pseudo_target, squared_error
from stillroom.paths import Coefficients, Law, LawName, between, sign_of, subinterval_target
from stillroom.recipes._students import Distillation, Student, averaged, plans_of
from stillroom.settings import Count, Optimizer, Refusal, Share, refuse_given
from stillroom.train import Role, Stage
from stillroom.train.checkpoint import fill

MOST = 10.0
"""Of the weight of the fake score's loss, which t near s would otherwise rule."""


@dataclass(frozen=True, kw_only=True)
class Settings(Student):
    ABSENT: ClassVar[Mapping[str, str]] = {"data": "phased DMD needs none; leave it out"}
    student_steps: Count = 4
    """Evaluations for a sample."""
    phases: Count | None = None
    """Experts, each with an equal share of `steps` and of the student's steps; one for each of these unless given."""
    intervals: Literal["nested", "disjoint"] = "nested"
    """Noise levels of a phase that ends at s: all above s, or those up to where the phase begins."""
    every: Count = 2
    """Updates of the fake score for one of the expert."""
    times: tuple[Share, Share] = (0.02, 0.98)
    """Noise levels of all phases together, before the teacher's shift."""
    law: LawName = "uniform"
    """Of the times between them, of which a phase has its part."""
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0))


def steps_each(settings: Settings) -> int:
    """Of the student, in a phase."""
    phases = settings.phases or settings.student_steps
    if settings.student_steps % phases:
        raise Refusal(f"phases {phases}: {settings.student_steps} student steps have no equal shares for as many; give "
                      "a number that divides them")
    if (least := settings.steps // phases) < settings.every:
        raise Refusal(f"steps {settings.steps}: a phase has {least} of them, and its expert moves once in "
                      f"{settings.every}; take more steps, or fewer phases")
    return settings.student_steps // phases


class Phase(NamedTuple):
    k: int
    first: int
    """Of its steps."""
    last: int
    end: float
    law: Law

    @property
    def name(self) -> str:
        return f"phase-{self.k + 1}"

    @property
    def role(self) -> str:
        return f"expert-{self.k + 1}"


class PhasedDMD(Distillation):
    Settings = Settings
    learned = staticmethod(subinterval_target)
    """What the fake score learns."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings = settings
        (self.plan,) = plans_of(self.flow, settings.student_steps)
        self.each = steps_each(settings)
        self.phases = [self.phase(k) for k in range(settings.student_steps // self.each)]
        if len(self.phases) == 1:
            refuse_given(settings, ("intervals",), "one phase is judged at all noise levels; leave it out")
        self.experts = [self.begun() for _ in self.phases]
        self.means = [self.follower(expert) for expert in self.experts]
        self.fake = self.begun_whole()

    def phase(self, k: int) -> Phase:
        first, stop = k * self.each, (k + 1) * self.each
        end, high = self.plan[stop], self.plan[first] if self.settings.intervals == "disjoint" else 1.0
        return Phase(k, first, stop - 1, end, self.law_between(end, high, self.settings.times, self.settings.law))

    def roles(self):
        s = self.settings
        experts = {phase.role: self.role(expert, s.student, every=s.every, average=mean)
                   for phase, expert, mean in zip(self.phases, self.experts, self.means, strict=True)}
        return experts | {"fake": Role(self.fake, s.score)}

    def stages(self):
        n = len(self.phases)
        upto = [self.settings.steps * k // n for k in range(n + 1)]
        return [Stage(p.name, upto[p.k + 1] - upto[p.k], (p.role, "fake"), self.begin_anew, fresh=("fake",))
                for p in self.phases]

    def begin_anew(self) -> None:
        """The fake score knows nothing of the phase before."""
        for mine, first in zip(self.fake.parameters(), self.origin.parameters(), strict=True):
            fill(mine, first)

    def losses(self, batch, turn):
        phase = next(p for p in self.phases if p.name == turn.stage)
        with torch.set_grad_enabled(phase.role in turn):
            x_s, y = self.generated(phase, turn)
        if phase.role in turn:
            yield {phase.role: {"gap": self.moved(phase, x_s, y, turn)}}
        yield {"fake": {"dsm": self.tracked(phase, x_s.detach(), y, turn)}}

    def generated(self, phase: Phase, turn) -> tuple[Tensor, Tensor | None]:
        """x_s, the end of the phase, from noise: the steps before are those of the product's experts."""
        y, z, leave = self.labels(turn), self.noise(turn), phase.last
        if self.each > 1:
            leave = phase.first + int(turn.rand((1,), shared=True) * self.each)
        before = [averaged(self.means[i // self.each]) for i in range(phase.first)]
        mine = [self.experts[phase.k]] * (leave + 1 - phase.first)
        return rollout([*before, *mine], z, (*self.plan[: leave + 1], phase.end), y, "ode", lambda _: z, "last"), y

    # ---- at noise levels above s ----

    def levels(self, phase: Phase, x_s: Tensor, turn) -> tuple[Tensor, Coefficients, Coefficients]:
        """t [B], and the coefficients at s and at t."""
        t, path = turn.draw(phase.law), self.fake.path
        return t, path.over(torch.full_like(t, phase.end), x_s), path.over(t, x_s)

    def tracked(self, phase: Phase, x_s: Tensor, y: Tensor | None, turn) -> Tensor:
        (t, at_s, at_t), eps = self.levels(phase, x_s, turn), turn.randn(x_s)
        a, b = between(at_s, at_t)
        u = self.learned(self.fake.prediction, x_s, eps, at_s, at_t)
        weight = (1 / b.flatten(1)[:, 0].square()).clamp(max=MOST)
        return weight * squared_error(b * self.fake(a * x_s + b * eps, t, y), u)

    def moved(self, phase: Phase, x_s: Tensor, y: Tensor | None, turn) -> Tensor:
        (t, at_s, at_t), eps = self.levels(phase, x_s, turn), turn.randn(x_s)
        (a, b), kind = between(at_s, at_t), self.fake.prediction
        with torch.no_grad():
            x_t, u = a * x_s + b * eps, subinterval_target(kind, x_s, eps, at_s, at_t)
            fake, real = b * self.fake(x_t, t, y), b * self.teacher.predict(kind, x_t, t, y)
        return pseudo_target(x_s, direction(u, fake, real, sign_of(kind)))

    # ---- what is left ----

    def generator(self):
        return FewStep([averaged(mean) for mean in self.means], self.flow.shape, [self.plan], "ode")

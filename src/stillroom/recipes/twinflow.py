"""TwinFlow: few steps from one network that is its own fake score, at negative times.

Problem: draw in one evaluation, or few, without holding a teacher, a fake score and a discriminator beside the student.

Equation (Cheng et al. 2025): F(x_t, t, r) is the mean velocity from time t to time r, so that one jump is
J(x_t, t -> r) = x_t - (t - r) F(x_t, t, r); F(x_t, t, t) is the velocity itself. With data x, x_t = (1 - t) x + t eps
and v = eps - x, each of four parts of a batch does one thing:

    end to end, near, any   F(x_t, t, r) -> F - clip(e),   e = (J^(x_t - d v, t - d -> r) - J(x_t, t -> r)) / d
    twin                    F(x_t, -t, -t) -> eps - x,     x = J(z, 1 -> 0) of the student itself, which is not moved
    end to end, besides     F -> F - clip(F(x_t, -t, -t) - F(x_t, t, t)),     x = J(z, 1 -> 0), which is moved

with d = 0.01, or t - r where that is less (then e = F - v), J^ two jumps of the moving average to r, and e clipped at
1. The first line is the base, a recursive consistency (RCGM), and alone (`twin = 0`) the control of the claim
`twinflow`. The second makes the network at -t the velocity of its own samples, and the third is then the gap of
`dmd`, in velocities. r is 0 at t = 1 (end to end), within 5 % of t (near) or uniform below t (any).

The student starts from the teacher's weights, with an input for the second time that begins without effect, and draws
data from the teacher once where there are none. After the first step no teacher is held: one network and its average.

The formulas are those of the released code, its guided targets those of `guidance`; but for the third line. There its
gradient is brought to one length however small the gap is (weight 0.5), and the student of the claim's first runs ran
away from its twin; here it is the gap itself. The wait is ours too.

Paper: TwinFlow, arXiv 2512.05150.

Expect: one step that is nearer to the data than the base's. A student whose twin cannot follow it, because the weight
is too large, runs away: the term `twin` then grows without end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stillroom.flows import Denoiser, FewStep, drawn_at_once
from stillroom.match import pseudo_huber, pseudo_target
from stillroom.paths import Linear, expand
from stillroom.recipes._students import Distillation, WithData, averaged, plans_of, widened
from stillroom.settings import Decay, Natural, NotNegative, Refusal, Share, refuse_given

SERVED = (1, 2, 4)
"""Steps of the product."""
WAIT = 150
LEAST = 0.5
"""Of guidance w: each look at the average multiplies what it said before by 1 - 1/w, which is -1 here."""
STEP, NEAREST = 0.01, 0.05
"""d of the base; how far "near" reaches, as a share of t. Both as released."""


@dataclass(frozen=True, kw_only=True)
class Settings(WithData):
    ABSENT: ClassVar[Mapping[str, str]] = {
        "student_steps": "TwinFlow serves 1, 2 and 4 steps; leave it out, and ask when drawing: stillroom sample RUN "
                         "--steps 4"}

    average: Decay = 0.99
    twin: NotNegative = 1.0
    """Weight of the gap between both signs of time; 0 leaves negative times out, and is the base alone."""
    wait: Natural | None = None
    """Steps in which negative times learn, and push nothing yet (ours). Unless given, 150, or half of fewer than 300
    steps."""
    drop: Share = 0.1
    """Share of labels dropped, where guidance needs answers without them."""


class TwinFlow(Distillation):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data=None):
        super().__init__(settings, data)
        self.settings = settings
        self.wait = min(WAIT, settings.steps // 2) if settings.wait is None else settings.wait
        if not settings.twin:
            refuse_given(settings, ("wait",), "without a twin nothing waits; leave it out, or give --twin above 0")
        if settings.guidance == 1:
            refuse_given(settings, ("drop",), "guidance 1 asks for no answers without labels; leave it out")
        if settings.guidance <= LEAST:
            raise Refusal(f"guidance {settings.guidance:g}: velocities are guided by what the network has learned so "
                          f"far, which comes to rest above {LEAST:g} alone; give 1 or more")
        if settings.twin and self.wait >= settings.steps:
            raise Refusal(f"wait {self.wait}: leaves none of {settings.steps} steps in which the twin pushes; give "
                          "fewer, or --twin 0")
        if settings.twin and settings.batch % (4 * settings.accumulate):
            raise Refusal(f"batch {settings.batch}: every fourth sample is the network's own, in each micro-batch; "
                          f"give a multiple of {4 * settings.accumulate}")
        self.student = self.begun()
        self.mean = self.follower(self.student)
        self.ends = self.in_place_of_data()
        self.times, self.plans = self.law(), plans_of(self.flow, *SERVED)
        self.shape = self.flow.shape

    def begun_whole(self) -> Denoiser:
        origin, place = self.origin, self.settings.origin or self.settings.teacher
        if not isinstance(origin.path, Linear) or origin.prediction != "v":
            raise Refusal(f"teacher {place}: it answers {origin.prediction} on a {type(origin.path).__name__} "
                          "path, and twinflow needs velocities of the linear one")
        try:
            return self.saving(widened(origin, "two_times"))
        except Refusal as refusal:
            raise Refusal(f"teacher {place}: {refusal}, which twinflow needs; give a flow run") from None

    def after(self, batch, turn):
        """The teacher goes: of it there are left the weights that the student began with, and samples."""
        for name in ("flow", "teacher", "origin"):
            vars(self).pop(name, None)
        if self.ends:
            self.ends.flow = None

    def losses(self, batch, turn):
        x, y = self.given(batch, turn)
        s = self.settings
        if s.twin and len(x) % 4:
            raise Refusal(f"batch {s.batch}: it is {len(x)} samples for each process and micro-batch, of which every "
                          "fourth is the network's own; give a multiple of 4 for each")
        own = (torch.arange(len(x), device=x.device) % 4 == 0) & (s.twin > 0)
        n = int(own.sum())                                                  # of its own samples, the rest of data
        drop = s.drop if s.guidance != 1 else 0.0
        share, x = n / len(x), x[~own]
        y_own, y = (None, None) if y is None else (y[own], self.dropped(y[~own], drop, turn))
        t, r = self.pairs(len(x), turn)
        eps = turn.randn(x)
        x_t = self.student.path.noise(x, t, eps)
        f = self.student(x_t, t, y, r)
        with torch.no_grad():
            v = self.guided(eps - x, x_t, t, y)
            e = residual(f, v, x_t, t, r, lambda x, t, r: self.averaged_jump(x, t, r, y)).clamp(-1, 1)
        weight = 1 + torch.tan((1 - (t - r)) * torch.pi / 2.5)
        terms = {"base": (1 - share) * weight * pseudo_huber(f, (f - e).detach())}
        if n:
            terms["twin"] = share * self.tracked(n, y_own, turn)
        if n and turn.step >= self.wait:
            terms["gap"] = s.twin * self.moved(x_t[::3], f[::3], None if y is None else y[::3], turn)
        return {"student": terms}

    def pairs(self, count: int, turn) -> tuple[Tensor, Tensor]:
        """[B] times t and r: a third each end to end, near, and any, in turn."""
        t, u = turn.draw(self.times, count), turn.rand((count,))
        u[1::3] *= NEAREST
        t[::3], u[::3] = 1, 1
        return t, t * (1 - u)

    def guided(self, v: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The velocity of data, and on from what the average answers without the label. With the label it answers as it
        was guided before: what it comes to, F = v + (1 - 1/w) (F - F_null), is F_null + w (v - F_null)."""
        w = self.settings.guidance
        if w == 1 or y is None:
            return v
        mean = averaged(self.mean)
        return v + (1 - 1 / w) * (mean(x_t, t, y, t) - mean(x_t, t, torch.full_like(y, self.null), t))

    def averaged_jump(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
        mean, half = averaged(self.mean), (t + r) / 2
        return mean.jump(mean.jump(x, t, half, y), half, r, y)

    # ---- the twin ----

    def tracked(self, count: int, y: Tensor | None, turn) -> Tensor:
        """[B]: the velocity of its own samples, at negative times."""
        z = turn.randn((count, *self.shape))
        one = torch.ones(count, device=z.device)
        with torch.no_grad():
            x = self.student.jump(z, one, torch.zeros_like(one), y)
        t, eps = turn.draw(self.times, count), turn.randn(x)
        x_t = self.student.path.noise(x, t, eps)
        return pseudo_huber(self.student(x_t, -t, y, -t), eps - x)

    def moved(self, z: Tensor, f: Tensor, y: Tensor | None, turn) -> Tensor:
        """[B]: f, the jump from noise z to data, down the difference of the velocities of both signs of time."""
        x = (z - f).detach()
        t = turn.draw(self.times, len(x))
        x_t = self.student.path.noise(x, t, turn.randn(x))
        with torch.no_grad():
            gap = self.student(x_t, -t, y, -t) - self.student(x_t, t, y, t)
        return pseudo_target(f, gap.clamp(-1, 1))

    # ---- what is left ----

    def generator(self) -> FewStep:
        return FewStep([averaged(self.mean)], self.shape, self.plans, "jump")

    def preview(self):
        return {"samples": self.generator().sample(64, batch=drawn_at_once(self.settings))}


def residual(f: Tensor, v: Tensor, x_t: Tensor, t: Tensor, r: Tensor, jump: Callable[..., Tensor]) -> Tensor:
    """e of the equation: how far F at (t, r) is from what a short step along v and jump(x, s, r) from there imply."""
    d = (t - r).clamp(max=STEP)
    x_r = jump(x_t - expand(d, x_t) * v, t - d, r)
    far = (x_r - x_t + expand(t - r, x_t) * f) / expand(d, x_t)
    return torch.where(expand(t - r > STEP, x_t), far, f - v)

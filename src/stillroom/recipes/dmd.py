"""Distribution matching distillation: a generator of few steps that follows the difference of two scores.

Problem: draw in one evaluation, or few, what a flow draws in fifty, without data and without its trajectories.

Equation (Yin et al. 2024): for x = G(x_s, s, y) and x_t = alpha x + sigma eps,

    grad_G = E[ w(t) (F(x_t, t, y) - T(x_t, t, y)) dG ],    w = 1 / mean |x - T(x_t, t, y)|

T is the teacher's x0, F that of a second network which learns the generator's own distribution as it moves. Both start
from the teacher's weights, and so does the student. So weighted, the gradient is the same in every prediction
(`match.direction`), and both answer in their own; other weights have names. Of `student_steps` times one is drawn in
each step, and the student answers there: what it is asked comes from its own steps so far (DMD2's backward simulation),
or from noised data.

Paper: One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828; DMD2, arXiv 2405.14867.

Expect: the student moves on every `every`-th step, because its fake score must keep up with it.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.flows import Denoiser, Denoises, denoising_loss, rollout
from stillroom.match import Weight
from stillroom.paths import LawName
from stillroom.recipes._adversary import Adversarial, Adversary, require_weight
from stillroom.recipes._students import Distillation, WithData, averaged, generator_of, plans_of, score_gap
from stillroom.settings import Count, Natural, NotNegative, Optimizer, Refusal, Share, refuse_given
from stillroom.train import Role
from stillroom.train.recipe import Terms


@dataclass(frozen=True, kw_only=True)
class Settings(WithData):
    student_steps: Count = 1
    """Evaluations of the student for a sample."""
    asked: Literal["simulated", "noised"] = "simulated"
    """Where the student of several steps is asked: at states of its own steps, or at noised data."""
    move: Literal["renoise", "ode"] = "renoise"
    """How it goes on from an answer: noised anew, or with the noise that the answer implies."""
    gradient: Literal["exit", "last", "all"] = "exit"
    """Which of its own steps carry it: one drawn, which answers x0 (DMD2), the last of them, or all."""
    weight: Weight = "residual"
    """Of the gap: one over the teacher's residual, sigma^2 between predictions of noise (VSD), or none between x0."""
    every: Count = 2
    """Updates of the fake score for one of the student."""
    times: tuple[Share, Share] = (0.02, 0.98)
    """Noise levels of the gap, before the teacher's shift."""
    law: LawName = "uniform"
    """Of the times between them, at which the scores are compared, the fake score learns and heads judge."""
    fake_lora: Natural = 0
    """Rank of the fake score as adapters on the teacher's own weights, which are then held once; 0 is a copy."""
    adversarial: Adversarial = field(default_factory=Adversarial)
    """Heads on a score's features, which tell noised samples from noised data."""
    judge: Literal["teacher", "fake"] = "teacher"
    """Whose features: the teacher's, which stand still (FastGen), or the fake score's (DMD2)."""
    judge_weight: NotNegative = 0.01
    """Of the heads' loss in what the fake score learns, where they stand on it; that of DMD2's release."""
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0))


class DMD(Distillation):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data=None):
        require_judge(settings)
        require_steps(settings)
        super().__init__(settings, data)
        self.settings = settings
        self.student = self.begun()
        self.mean = self.follower(self.student)
        self.fake = self.begun_fake()
        (self.plan,) = plans_of(self.flow, settings.student_steps)
        self.gap_law = self.law(*settings.times, settings.law)
        self.adversary = self.opposed()
        self.ends = self.in_place_of_data() if self.needs_data else None
        if not self.needs_data:
            refuse_given(settings, ("teacher_samples",), "nothing here asks for data, and none are drawn; leave it out")

    def begun_fake(self) -> Denoiser:
        """A copy of the origin, or adapters on the teacher."""
        rank = self.settings.fake_lora
        return self.begun_on_teacher(rank) if rank else self.begun_whole()

    @property
    def judge(self):
        return self.fake if self.settings.judge == "fake" else super().judge

    def opposed(self) -> Adversary | None:
        s = self.settings
        if not s.adversarial.weight:
            return None
        return Adversary(self.judge, s.adversarial, self.flow.shape, self.gap_law, taught=learns_to_judge(s))

    @property
    def needs_data(self) -> bool:
        """Or samples of the teacher in their place."""
        return self.adversary is not None or self.settings.asked == "noised"

    def roles(self):
        s = self.settings
        roles = {"student": self.role(self.student, s.student, every=s.every, average=self.mean),
                 "fake": Role(self.fake, s.score, trains="lora_" if s.fake_lora else "")}
        return roles | ({"head": Role(self.adversary.heads, s.adversarial.head)} if self.adversary else {})

    def losses(self, batch, turn):
        with torch.set_grad_enabled("student" in turn):
            x, y = self.generated(batch, turn)
        if "student" in turn:
            yield {"student": self.moved(x, y, turn)}
        x = x.detach()
        if "fake" in turn:
            yield {"fake": {"dsm": self.tracked(x, y, turn)}}
        if self.adversary:
            real, y_real = self.given(batch, turn)
            yield self.judged(self.adversary.critic(real, x, turn, y_real, y))

    # ---- the student's samples ----

    def chosen(self, turn) -> int:
        """Which time of its plan the student is asked at for x0."""
        steps = len(self.plan) - 1
        return int(turn.rand((1,), shared=True) * steps) if self.settings.gradient == "exit" else steps - 1

    def generated(self, batch, turn) -> tuple[Tensor, Tensor | None]:
        """x0 as the student answers at one time of its plan, from what it is asked there; and its labels."""
        k = self.chosen(turn)
        if k and self.settings.asked == "noised":
            x, y = self.given(batch, turn)
            t = torch.full((turn.batch,), self.plan[k], device=self.device)
            return self.student.x0(self.student.path.noise(x, t, turn.randn(x)), t, y), y
        y, z, s = self.labels(turn), self.noise(turn), self.settings
        return rollout([self.student], z, self.plan, y, s.move, lambda _: turn.randn(z), s.gradient, k), y

    # ---- what moves it, and what follows it ----

    def tracked(self, x: Tensor, y: Tensor | None, turn) -> Tensor:
        return denoising_loss(self.fake, x, turn.draw(self.gap_law), turn.randn(x), y)

    def judged(self, terms: Terms) -> dict[str, Terms]:
        """The heads' loss, of which the fake score learns as well if they stand on it."""
        if not learns_to_judge(self.settings):
            return {"head": terms}
        return {"head": terms, "fake": {"critic": self.settings.judge_weight * terms["critic"]}}

    def moved(self, x: Tensor, y: Tensor | None, turn) -> dict[str, Tensor]:
        terms = self.followed(x, y, turn)
        return terms | ({"adversarial": self.adversary.maker(x, turn, y)} if self.adversary else {})

    def followed(self, x: Tensor, y: Tensor | None, turn) -> dict[str, Tensor]:
        """Terms of the scores."""
        return {"gap": self.gap(x, y, turn, self.teacher)}

    def gap(self, x: Tensor, y: Tensor | None, turn, teacher: Denoises) -> Tensor:
        t, eps = turn.draw(self.gap_law), turn.randn(x)
        return score_gap(self.fake, teacher, x, t, eps, y, self.settings.weight)

    # ---- what is left ----

    def generator(self):
        return generator_of(averaged(self.mean), self.flow, [self.plan], self.settings.move)


def require_steps(s: Settings) -> None:
    if s.student_steps == 1:
        refuse_given(s, ("asked", "move", "gradient"), "of a student of several steps; give --student-steps above 1, "
                                                       "or leave it out")
    if s.asked == "noised" and s.gradient != "exit":
        raise Refusal(f"gradient {s.gradient}: of a student's own steps, and at noised data it makes none; leave it "
                      "out, or give --asked simulated")


def learns_to_judge(s: Settings) -> bool:
    """Whether the heads' loss moves the fake score."""
    return s.adversarial.weight > 0 and s.judge == "fake" and s.judge_weight > 0


def require_judge(s: Settings) -> None:
    require_weight(s.adversarial)
    if not s.adversarial.weight:
        refuse_given(s, ("judge", "judge_weight"), "there are no heads; give --adversarial.weight above 0, or leave it "
                                                   "out")
    if s.judge == "teacher":
        refuse_given(s, ("judge_weight",), "the teacher's features stand still; give --judge fake, or leave it out")

"""Decoupled DMD: what guidance adds to distribution matching moves the student, and matching keeps it in bounds.

Problem: DMD follows a guided teacher, while its fake score is not guided. That is two things in one: matching the
teacher's distribution, and a push along the guidance. Apart, each can have the noise levels that suit it.

Equation (Liu et al. 2025, eq. 6 and 8): with the teacher T, the fake score F and guidance g, exactly,

    F(y) - T_g = (F(y) - T(y)) + (g - 1) (T() - T(y))        distribution matching + augmentation

Here x is what the student answers at time t. Matching looks at it at all noise levels; augmentation at levels up to t
(what a later step has yet to resolve), with a draw and a noise of its own. Each is divided by mean |x - T(y)|, DMD's
weight, at its own level. In the place of matching, three other shields: the mean and the variance within each sample,
held to those of real ones by a KL divergence; DMD2's adversarial term; or none.

Paper: Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield, arXiv 2511.22677.

Expect: without a shield the samples' variance (`samples/variance`) grows for ever; see the claim `decoupled-dmd`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.flows import Guided
from stillroom.match import augmentation, mean_and_variance, pseudo_target, statistics_kl
from stillroom.paths import sign_of, target
from stillroom.recipes import dmd
from stillroom.recipes._adversary import Adversarial
from stillroom.settings import NotNegative, Refusal, refuse_given

OF_SHIELDS = ((("adversarial",), ("adversarial",), "heads"), (("statistics",), ("statistics",), "term of them"),
              (("fake_lora", "score"), ("dm",), "fake score"),
              (("every",), ("dm", "adversarial"), "role that must keep up with the student"))
"""Settings, the shields that use them, and what the others lack."""


@dataclass(frozen=True, kw_only=True)
class Settings(dmd.Settings):
    guidance: float = 3.0
    """Of the teacher, above 1: what it adds moves the student, which has it built in."""
    shield: Literal["dm", "statistics", "adversarial", "none"] = "dm"
    """What keeps the samples in bounds: distribution matching, the mean and variance within a sample, heads on the
    teacher's features, or nothing. All but the first need no fake score."""
    statistics: NotNegative = 1.0
    """Weight of the term of shield statistics."""
    adversarial: Adversarial = field(default_factory=lambda: Adversarial(weight=10.0))
    """Of shield adversarial alone. Its term has no scale that is known beforehand: of weight 1, points ran away."""


class DecoupledDMD(dmd.DMD):
    Settings = Settings

    def __init__(self, settings: Settings, data=None):
        if settings.guidance <= 1:
            raise Refusal(f"guidance {settings.guidance:g}: what it adds above 1 is what moves the student; give 3, or "
                          "match without guidance: stillroom distill dmd")
        refuse_given(settings, ("judge", "judge_weight"), "where there are heads here, there is no fake score; leave "
                                                          "it out")
        refuse_given(settings, ("weight",), "here each term is over its own residual; leave it out")
        for names, shields, lacks in OF_SHIELDS:
            if settings.shield not in shields:
                refuse_given(settings, names, f"shield {settings.shield} has no {lacks}; give --shield {shields[0]}, "
                                              "or leave it out")
        if settings.shield == "adversarial" and not settings.adversarial.weight:
            raise Refusal("shield adversarial: its weight is 0; give --adversarial.weight above 0, or --shield none")
        super().__init__(settings, data)
        self.settings = settings
        self.require_two_answers()
        self.below = [self.law_between(0.0, t, settings.times, settings.law) for t in self.plan[:-1]]
        self.k, self.usual = 0, (torch.zeros(()), torch.ones(()))       # of the step at hand

    def require_labels(self):
        if self.flow.classes is None:
            raise Refusal(f"teacher {self.settings.teacher}: it was trained without labels, so that no guidance can "
                          "move a student; match without it: stillroom distill dmd")
        super().require_labels()

    # ---- what there is, by shield ----

    def begun_fake(self):
        return super().begun_fake() if self.settings.shield == "dm" else self.origin

    def opposed(self):
        return super().opposed() if self.settings.shield == "adversarial" else None

    @property
    def needs_data(self):
        return super().needs_data or self.settings.shield == "statistics"

    def roles(self):
        roles = super().roles()
        if self.settings.shield in ("statistics", "none"):      # nothing must keep up with the student
            return {"student": self.role(self.student, self.settings.student, average=self.mean)}
        return roles if self.settings.shield == "dm" else {name: roles[name] for name in ("student", "head")}

    # ---- what moves the student ----

    def chosen(self, turn):
        self.k = super().chosen(turn)
        return self.k

    def generated(self, batch, turn):
        if self.settings.shield == "statistics":
            mean, variance = mean_and_variance(turn.gather(self.given(batch, turn)[0]))
            self.usual = mean.mean(), variance.mean()
        return super().generated(batch, turn)

    def followed(self, x, y, turn):
        if turn.micros == 1:        # of the whole batch: a part has less, and a single sample none
            mean = turn.mean(x.mean(0))
            turn.tell("samples/variance", turn.mean((x.detach() - mean).square().mean()))
        terms = {"augmentation": self.augmented(x, y, turn)}
        if self.settings.shield == "dm":
            terms["matching"] = self.gap(x, y, turn, self.flow.denoiser)
        if self.settings.shield == "statistics":
            terms["statistics"] = self.settings.statistics * statistics_kl(x, *self.usual)
        return terms

    def augmented(self, x: Tensor, y: Tensor | None, turn) -> Tensor:
        """Towards what guidance adds, at noise levels up to the time at which x was asked for."""
        teacher = self.teacher
        assert isinstance(teacher, Guided) and y is not None
        t, eps = turn.draw(self.below[self.k]), turn.randn(x)
        c, kind = teacher.path.over(t, x), teacher.prediction
        with torch.no_grad():
            conditional, unconditional = teacher.split(c.alpha * x + c.sigma * eps, t, y)
            true = target(kind, x, eps, c)
        return pseudo_target(x, augmentation(true, conditional, unconditional, sign_of(kind), teacher.scale))

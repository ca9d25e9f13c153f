"""Score identity distillation: the gradient of two scores' distance, through both scores.

Problem: draw in one evaluation, or few, what a flow draws in fifty, without data. `dmd` moves a sample along the
difference of two scores; this descends an estimate of its square, and the scores' own derivatives come in.

Equation (Zhou et al. 2024): for x = G(x_s, s, y), x_t = alpha x + sigma eps, and the x0 predictions R of the teacher
and F of a network that learns the generator's own distribution,

    L_G = E[ (R - F)'((R - x) - a (R - F)) ] / mean |x - R|,    R = R(x_t, t, y),  F = F(x_t, t, y)

with the gradient through x, R and F; the weight is a constant. Of `student_steps` times one is drawn in each step, so
that the mixture of all steps' answers is matched (few-step SiD, 2025). Each score has a scale of guidance of its own:
`guidance` the teacher's, `fake_guidance` F's in L_G, `fake_own_guidance` F's in its own loss. `cfg` zero guides nothing
and asks F without the label; anti guides F with a negative scale. Both need the adversarial term beside them, on F's
features. L_G and the scales follow SiD-LSG's released code; how zero and anti go into them is reconstructed from the
paper's abstract.

Paper: Few-Step Diffusion via Score identity Distillation, arXiv 2505.12674; SiD, 2404.04057; SiD-LSG, 2406.01561.

Expect: farther than `dmd` after as many updates (1.3 to 5.8 times, on each of three seeds of its claim), each with two
backward passes more. Guidance on both scores (`guidance` = `fake_guidance`) distorts little; on the teacher alone it
distorts much, and so it does with all three scales alike, for F then learns to be at its scale what it would be at
none.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from stillroom.flows import denoising_loss, guided
from stillroom.match import score_identity
from stillroom.recipes import dmd
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Share, refuse_given


@dataclass(frozen=True, kw_only=True)
class Settings(dmd.Settings):
    every: Count = 1
    alpha: float = 1.0
    """Of the squared difference of the scores in the student's loss."""
    cfg: Literal["plain", "zero", "anti"] = "plain"
    """plain: every score at its scale. zero: none guided, the fake score asked without the label. anti: the fake score
    guided with a negative scale. The last two only together with the adversarial term."""
    fake_guidance: float = 1.0
    """Of the fake score in the student's loss; negative with cfg anti."""
    fake_own_guidance: float = 1.0
    """Of the fake score in its own loss."""
    judge: Literal["teacher", "fake"] = "fake"
    judge_weight: NotNegative = 0.0
    drop: Share = 0.1
    """Share of labels dropped in the fake score's loss."""
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, betas=(0.0, 0.999), clip=1.0, warmup=100))
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, betas=(0.0, 0.999), clip=1.0))


class SiD(dmd.DMD):
    Settings = Settings

    def __init__(self, settings: Settings, data=None):
        require_scales(settings)
        super().__init__(settings, data)
        self.settings = settings
        asked = settings.cfg, settings.fake_guidance, settings.fake_own_guidance
        if self.flow.classes is None and asked != ("plain", 1, 1):
            raise Refusal(f"teacher {settings.teacher}: it was trained without labels; use cfg plain and guidance 1")
        if (settings.fake_guidance, settings.fake_own_guidance) != (1, 1):
            self.require_two_answers()
        if settings.cfg == "zero":
            self.require_null(self.origin, settings.origin or settings.teacher)
        self.guided_fake = guided(self.fake, settings.fake_guidance)
        self.taught_fake = guided(self.fake, settings.fake_own_guidance)

    def tracked(self, x: Tensor, y: Tensor | None, turn) -> Tensor:
        t, eps, y = turn.draw(self.gap_law), turn.randn(x), self.dropped(self.known(y), self.settings.drop, turn)
        return denoising_loss(self.taught_fake, x, t, eps, y)

    def followed(self, x: Tensor, y: Tensor | None, turn) -> dict[str, Tensor]:
        t, eps = turn.draw(self.gap_law), turn.randn(x)
        x_t = self.teacher.path.noise(x, t, eps)
        fake, real = self.guided_fake.x0(x_t, t, self.known(y)), self.teacher.x0(x_t, t, y)
        return {"identity": score_identity(x, fake, real, self.settings.alpha)}

    def known(self, y: Tensor | None) -> Tensor | None:
        """The label, as the fake score is told it."""
        return None if self.settings.cfg == "zero" else y


def require_scales(s: Settings) -> None:
    refuse_given(s, ("weight",), "of SiD's loss only the release's is there, one over the residual; leave it out")
    if s.cfg != "plain" and not s.adversarial.weight:
        raise Refusal(f"cfg {s.cfg}: alone it pushes samples away from the data; give the adversarial term a weight, "
                      "--adversarial.weight 1, or use cfg plain")
    if s.cfg == "zero":
        refuse_given(s, ("drop",), "with cfg zero the fake score is told no labels; leave it out")
    if s.cfg == "zero" and (s.guidance, s.fake_guidance, s.fake_own_guidance) != (1, 1, 1):
        raise Refusal("cfg zero: it guides no score; leave out guidance, fake_guidance and fake_own_guidance")
    if (s.cfg == "anti") != (s.fake_guidance < 0):
        raise Refusal(f"cfg {s.cfg} with fake_guidance {s.fake_guidance:g}: a negative scale and cfg anti come "
                      "together, --cfg anti --fake-guidance -1")

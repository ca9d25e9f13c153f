"""GDD: a diffusion teacher's network, as a one-step generator after a short adversarial game and nothing else.

Problem: a student that repeats its teacher's trajectories stops where the two networks' local minima differ. Match the
distribution of the data alone, and take of the teacher no more than its weights to start from.

Equation (Zheng & Yang 2024): for x = G(z, y), the teacher's network asked once at pure noise, and a critic D,

    G: min E softplus(-D(x, y))
    D: min E softplus(D(x, y)) + softplus(-D(x', y')) + r1 / 2 |grad_x' D(x', y')|^2,    x', y' real

each the mean over the heads of D, on all scales of a feature net: a frozen one (`features`, as in the paper), or one
that learns with them. The penalty is exact, of the heads' mean, and lazy: taken on every `lazy`-th step, so many times
as strong.

With `freeze`, a regular expression, parameters of such names stay the teacher's. GDD-I freezes the convolutions inside
the blocks of a U-Net (`conv|grow|shrink|out`) and learns norms, their modulation and attention: that this is enough
is the paper's evidence that the teacher's layers hold a one-step generator already. begin = scratch is its control.

Paper: Diffusion Models Are Innate One-Step Generators, arXiv 2405.20750.

Expect: few steps; with real data a critic of its own soon knows them by heart, and then says nothing of the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stillroom.flows import Denoiser
from stillroom.match.adversarial import critic_softplus, maker_softplus, r1
from stillroom.nets import ResNet, build, describe
from stillroom.nets.heads import Critic, Layers
from stillroom.recipes._students import Distillation, WithData, at_noise, averaged, one_step_of
from stillroom.recipes.features import feature_net
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Where, refuse_given
from stillroom.train import Role
from stillroom.train.schedule import ends
from stillroom.train.teacher import is_ours


@dataclass(frozen=True, kw_only=True)
class Settings(WithData):
    ABSENT: ClassVar[Mapping[str, str]] = {"student_steps": "GDD makes one step; leave it out"}

    begin: Literal["teacher", "scratch"] = "teacher"
    """scratch: the same architecture with new weights."""
    freeze: str = ""
    """A regular expression on parameter names; what matches stays as it began. conv|grow|shrink|out for a U-Net is
    GDD-I."""
    features: Where = ""
    """A run of `stillroom train features`, whose maps the critic judges by; unless given, a small net of its own."""
    width: Count = 32
    """Of that small net: channels of its first stage, which two more double, or of a perceptron for points."""
    r1: NotNegative = 0.1
    """Weight of the gradient penalty at real samples."""
    lazy: Count = 16
    """Steps from one penalty to the next."""
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, name="adam", betas=(0.0, 0.99), clip=1.0))
    critic: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, name="adam", betas=(0.0, 0.99), clip=1.0))


class GDD(Distillation):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data=None):
        self.settings = settings
        require_sense(settings, data)
        super().__init__(settings, data)
        self.settings = settings
        self.student = self.begun()
        self.learned = unfrozen(self.student, settings.freeze)
        self.mean = self.follower(self.student)
        self.critic = Critic(self.body(), self.flow.shape, self.flow.classes)
        self.ends = self.in_place_of_data(settings.guidance)

    def begun_whole(self) -> Denoiser:
        student = super().begun_whole()
        if self.settings.begin == "scratch":
            student.net = anew(student.net)
        return self.saving(student)

    def body(self) -> nn.Module:
        """What sees samples for the critic's heads."""
        shape = self.flow.shape
        if self.settings.features:
            return self.features(self.settings.features)
        if len(shape) not in (1, 3):
            raise Refusal(f"teacher {self.settings.teacher}: makes {list(shape)}, and critics see points or maps")
        width = self.settings.width
        return Layers(shape[0], width) if len(shape) == 1 else ResNet(shape[0], min(shape[1:]), width, (1, 1, 1))

    def features(self, place: str) -> nn.Module:
        """What other people's teachers make their latents of is not known."""
        known = self.data is not None or is_ours(Path(self.settings.teacher))
        return feature_net(place, self.flow.shape, self.encoding() if known else None)

    def roles(self):
        s = self.settings
        return {"student": Role(self.student, s.student, self.learned or self.learns, average=self.mean),
                "critic": Role(self.critic, s.critic, trains="^heads" if s.features else "")}

    def losses(self, batch, turn):
        real, y_real = self.given(batch, turn)
        y, z = self.labels(turn), self.noise(turn)
        with torch.set_grad_enabled("student" in turn):
            x = at_noise(self.student, z, y)
        if "student" in turn:
            yield {"student": {"adversarial": maker_softplus(self.critic(x, y))}}
        x = x.detach()
        yield {"critic": self.judged(real, y_real, x, y, turn.step)}

    def judged(self, real: Tensor, y_real: Tensor | None, made: Tensor, y: Tensor | None,
               step: int) -> dict[str, Tensor]:
        s, terms = self.settings, {"critic": critic_softplus(self.critic(real, y_real), self.critic(made, y))}
        if s.r1 and ends(step, s.lazy):
            with torch.autocast(real.device.type, enabled=False):     # a gradient of a gradient needs float32's digits
                x = real.detach().float().requires_grad_()
                terms["r1"] = s.r1 * s.lazy * r1(self.critic(x, y_real), x)
        return terms

    def generator(self):
        return one_step_of(averaged(self.mean), self.flow)

    def product(self):
        return self.left(self.generator(), begin=self.settings.begin, freeze=self.settings.freeze)


def anew(net: nn.Module) -> nn.Module:
    """The same architecture with new weights. What would begin at zero is drawn like the rest: frozen at zero, a layer
    passes nothing on, and would be a straw man of a control."""
    net = build(describe(net))
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not bool(module.weight.any()):
            module.reset_parameters()
    return net


def unfrozen(module: nn.Module, freeze: str) -> str:
    """As `Role.trains`: the names that `freeze` does not match."""
    if not freeze:
        return ""
    learned = rf"^(?!.*(?:{freeze}))"
    try:
        names = [(name, bool(re.search(learned, name))) for name, _ in module.named_parameters()]
    except re.error as error:
        raise Refusal(f"freeze {freeze!r}: no regular expression: {error}") from None
    some = f"{', '.join(name for name, _ in names[:5])}, ..."
    if not any(kept for _, kept in names):
        raise Refusal(f"freeze {freeze!r}: leaves nothing to learn; it matches every name, {some}")
    if all(kept for _, kept in names):
        raise Refusal(f"freeze {freeze!r}: matches no parameter name; there are {some}")
    return learned


def require_sense(s: Settings, data) -> None:
    if s.features:
        refuse_given(s, ("width",), "of a small net of the critic's own, in whose place features stand; leave it out")
    if not s.r1:
        refuse_given(s, ("lazy",), "of a penalty whose weight r1 is 0; leave it out")
    if s.freeze and s.lora:
        raise Refusal("freeze and lora both say what learns: give one of them")
    if s.begin == "scratch" and s.lora:
        raise Refusal("begin = scratch: adapters need weights to stand on; leave out lora")
    if s.guidance != 1 and data is not None:
        raise Refusal(f"guidance {s.guidance:g}: the student follows the data, and its teacher answers nothing; leave "
                      "it out, or take the teacher's samples with data = none")

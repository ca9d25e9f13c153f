"""Guidance distilled into low-rank adapters: a guided flow at half the evaluations, in a few per cent of its weights.

Problem: classifier-free guidance asks the network twice in every step, with the label and without.

Equation: with the guided answer T^w = T(null) + w (T(y) - T(null)) of a frozen flow T, and adapters L of low rank on
that flow's own weights,

    min_L E | T_L(x_t, t, y) - T^w(x_t, t, y) |^2

in the flow's own prediction, at noised data. Base and teacher are one set of weights, asked with the adapters and
without. With `strongest` above 1 the network is told w too, drawn from [1, strongest] (Meng et al. 2022): then the
strength is chosen when drawing.

Of the first paper we have the abstract; the loss is our reading of it.

Paper: LoRA-Enhanced Distillation on Guided Diffusion Models, arXiv 2312.06899; On Distillation of Guided Diffusion
Models, arXiv 2210.03142.

Expect: a flow, to be drawn from in as many steps as its teacher, one evaluation each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stillroom.flows import Denoiser, Flow, Guided, require_sight
from stillroom.match import squared_error
from stillroom.nets import tie
from stillroom.paths import convert, expand
from stillroom.recipes._students import Distillation, WithData, adapted, averaged, widened
from stillroom.settings import Natural, NotNegative, Refusal


@dataclass(frozen=True, kw_only=True)
class Settings(WithData):
    ABSENT: ClassVar[Mapping[str, str]] = {
        "student_steps": "what is left is a flow, of as many steps as its teacher; leave it out, and ask when drawing: "
                         "stillroom sample RUN --steps 8"}

    guidance: float = 3.0
    """Of the teacher; the student has it built in, unless it is told."""
    strongest: NotNegative = 0.0
    """Above 1 the network gets an input for the strength of guidance, and learns all from 1 to this."""
    lora: Natural = 8


class GuidanceLora(Distillation):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data=None):
        if settings.guidance <= 1:
            raise Refusal(f"guidance {settings.guidance:g}: one evaluation is what the teacher takes without guidance; "
                          "give a guidance above 1")
        if 0 < settings.strongest < settings.guidance:
            raise Refusal(f"strongest {settings.strongest:g}: below the guidance {settings.guidance:g} that is drawn "
                          "with; give at least that, or leave it out")
        super().__init__(settings, data)
        self.settings = settings
        self.require_two_answers()
        if self.origin.prediction != self.flow.denoiser.prediction:     # its answer is converted, up to pure noise
            require_sight(self.flow.denoiser, f"teacher {settings.teacher}")
        self.student = self.begun()
        self.teacher = Guided(self.flow.denoiser, settings.guidance)
        self.mean = self.follower(self.student)
        self.ends = self.in_place_of_data()

    def require_labels(self):
        if self.flow.classes is None:
            raise Refusal(f"teacher {self.settings.teacher}: it was trained without labels, so that there is no "
                          "guidance to distil; give a class-conditional flow")

    def told_strength(self) -> Denoiser:
        s = self.settings
        try:
            return self.saving(widened(self.origin, "guided"))
        except Refusal as refusal:
            raise Refusal(f"strongest {s.strongest:g}: teacher {s.origin or s.teacher}: {refusal}; leave it "
                          "out") from None

    def begun(self) -> Denoiser:
        """On the teacher's own weights where they are those it starts from: then they are held once."""
        s = self.settings
        student = self.told_strength() if s.strongest > 1 else self.begun_whole()
        if not s.lora or s.origin:
            return adapted(student, s.lora)
        tie(student.net, self.origin.net)
        self.flow.denoiser = student
        return self.begun_on_teacher(s.lora)

    def losses(self, batch, turn):
        x, y = self.given(batch, turn)
        t, eps = turn.draw(self.law()), turn.randn(x)
        w = self.strengths(t, turn)
        x_t = self.teacher.path.noise(x, t, eps)
        answer = self.student(x_t, t, y, w=w if self.settings.strongest > 1 else None)
        return {"student": {"guided": squared_error(answer, self.target(x_t, t, y, w))}}

    def strengths(self, t: Tensor, turn) -> Tensor:
        """[B]"""
        s = self.settings
        return 1 + (s.strongest - 1) * turn.rand(t) if s.strongest > 1 else torch.full_like(t, s.guidance)

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, y: Tensor | None, w: Tensor) -> Tensor:
        """The teacher's answer at each sample's own strength, in the student's prediction."""
        assert y is not None
        conditional, unconditional = self.teacher.split(x_t, t, y)
        native = unconditional + expand(w, x_t) * (conditional - unconditional)
        return convert(native, x_t, self.teacher.path.over(t, x_t), self.teacher.prediction, self.student.prediction)

    def made(self) -> Flow:
        return self.sampled(averaged(self.mean))

    def preview(self):
        return self.shown(self.made(), self.settings.guidance if self.settings.strongest > 1 else 1.0)

    def product(self):
        return self.left(self.made(), strongest=self.settings.strongest)

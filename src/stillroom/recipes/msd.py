"""Multi-student distillation: several generators, each of which answers for some of the classes.

Problem: a one-step generator of a small network cannot hold all that its teacher knows, and a larger one is slower.

Equation (Song et al. 2024): the teacher's classes are parted into K disjoint sets V_k of equal size, and

    G_k = Distill(T, V_k),    G(z, y) = G_k(z, y) for y in V_k

where Distill is any recipe whose student starts from a flow's network (`inner`), asked for the classes of V_k alone; a
sample costs the evaluations of one network. With `width` or `depth` students are of another size than the teacher:
nothing can be copied, and they first learn what it answers (teacher score matching, the stage "match"):

    min E | G_k(x_t, t, y) - T(x_t, t, y) |^2,    x_t a noised sample of the teacher's, y in V_k

All students move in every step, each by a batch of its own: K times the work, the memory and the weights of one.

Paper: Multi-student Diffusion Distillation for Better One-step Generators, arXiv 2410.23274.

Expect: nearer to the teacher than one student of the same size after as many updates of each (on each of three seeds
of its claim, not beyond their spread).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from stillroom.flows import Denoiser, Flow, Generator, Routed
from stillroom.match import squared_error
from stillroom.recipes._sets import Among, Own, inner_of, named, options_of, require_like, resized, routes_of, shared
from stillroom.recipes._students import Distillation, Ends, Student
from stillroom.settings import Count, Natural, Optimizer, Refusal, from_mapping, refuse_given
from stillroom.train import Role, Stage, parts_of


@dataclass(frozen=True, kw_only=True)
class Settings(Student):
    ABSENT: ClassVar[Mapping[str, str]] = {"data": "students take samples of their teacher; leave it out",
                                           "student_steps": "it is of the students' own recipe; give --options "
                                                            "student_steps=4"}

    inner: str = "dmd"
    """The recipe of each student."""
    options: tuple[str, ...] = ()
    """Settings of that recipe beside those told here, as a settings file has them: every=5 adversarial.weight=0.01"""
    students: Count = 4
    batch: int = 128
    """Of each student."""
    width: Natural = 0
    """Of the students' networks; 0 is the origin's, whose weights are then copied."""
    depth: Natural = 0
    """The same: blocks of a transformer, layers of an MLP, blocks per level of a U-Net."""
    match_steps: Count = 500
    """Of the whole, in which smaller students learn what the teacher answers."""
    matching: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, clip=1.0, warmup=50))
    teacher_samples: Count = 5000
    """That they see it on, drawn once."""


class MSD(Distillation):
    Settings = Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings = settings
        self.smaller = settings.width > 0 or settings.depth > 0
        if not self.smaller:
            refuse_given(settings, ("match_steps", "matching", "teacher_samples"), "students begin as copies of the "
                         "origin, and have nothing to match; give --width or --depth, or leave it out")
        self.routes = routes_of(settings.students, self.flow.classes, settings.teacher)
        recipe, own = inner_of(settings.inner), self.inner_settings()
        self.students = [self.made(recipe, own, k) for k in range(settings.students)]
        self.each = [dict(student.roles()) for student in self.students]
        self.samples = [self.drawn(k) for k in range(settings.students)] if self.smaller else []
        if self.smaller:
            student = self.each[0].get("student")
            require_like(student and student.module, self.small(), settings.inner)

    # ---- the students ----

    def classes(self, k: int) -> list[int]:
        return [y for y, route in enumerate(self.routes) if route == k]

    def inner_settings(self) -> Student:
        """What is said to all recipes here, and the options."""
        s = self.settings
        told = {**shared(s), "steps": self.distilled, **options_of(s.options)}
        return cast(Student, from_mapping(inner_of(s.inner).Settings, told, f"options of {s.inner}"))

    @property
    def distilled(self) -> int:
        """Steps of the recipe itself."""
        s = self.settings
        if self.smaller and s.match_steps >= s.steps:
            raise Refusal(f"match_steps {s.match_steps} leave none of {s.steps} steps for {s.inner}")
        return s.steps - s.match_steps * self.smaller

    def made(self, recipe: type[Distillation], settings: Student, k: int) -> Any:
        """The recipe of student k. Teacher and origin are held once for all."""
        outer, teacher = self, Among(self.flow, self.classes(k))

        class OfSome(recipe):
            def opened(self):
                return teacher, Flow(outer.origin, teacher.shape)

            def begun(self):
                if not outer.smaller:
                    return super().begun()
                require_like(self.begun_whole(), outer.origin, outer.settings.inner)
                return self.saving(outer.small())

        made = OfSome(settings)
        if made.flow is not teacher:
            raise Refusal(f"{self.settings.inner} puts adapters on its teacher, which the students share; leave out "
                          "its fake_lora, or choose another inner recipe")
        return made

    def small(self) -> Denoiser:
        """A network like the origin's, of other width and depth, new."""
        s, origin = self.settings, self.origin
        if s.lora:
            raise Refusal("lora: adapters need weights to stand on, and students of other width or depth begin anew")
        return Denoiser(resized(origin.net, s.width, s.depth), origin.path, origin.prediction, origin.scale_input)

    def drawn(self, k: int) -> Ends:
        s = self.settings
        return Ends(self.students[k].flow, -(-s.teacher_samples // s.students), s, s.guidance)

    # ---- what learns ----

    def roles(self):
        roles = {named(name, k): role for k, each in enumerate(self.each) for name, role in each.items()}
        if self.smaller:
            roles |= {named("match", k): Role(each["student"].module, self.settings.matching)
                      for k, each in enumerate(self.each)}
        return roles

    def stages(self):
        together = [self.together(stages) for stages in zip(*(s.stages() for s in self.students), strict=True)]
        if not self.smaller:
            return together
        count = range(self.settings.students)
        first = dataclasses.replace(together[0], fresh=(*together[0].fresh, *(named("student", k) for k in count)))
        match = Stage("match", self.settings.match_steps, tuple(named("match", k) for k in count), self.follow)
        return [match, first, *together[1:]]                    # fresh: averages begin at what was matched

    def together(self, stages: Sequence[Stage]) -> Stage:
        """One stage of all students at once."""
        def of_all(pick) -> tuple[str, ...]:
            return tuple(named(name, k) for k, stage in enumerate(stages) for name in pick(stage))

        def enter() -> None:
            for stage in stages:
                stage.enter()

        first = stages[0]
        return Stage(first.name, first.steps, of_all(lambda stage: stage.roles or self.each[0]), enter,
                     of_all(lambda stage: stage.fresh))

    def follow(self) -> None:
        for ends in self.samples:
            ends.follow()

    def memory(self):
        inner = {named(name, k): part for k, student in enumerate(self.students)
                 for name, part in student.memory().items()}
        return inner | {f"match {name} {k}": part for k, ends in enumerate(self.samples)
                        for name, part in ends.memory().items()}

    def losses(self, batch, turn):
        for k, student in enumerate(self.students):
            if turn.stage == "match":
                yield {named("match", k): {"teacher": self.matched(k, turn)}}
                continue
            for part in parts_of(student.losses(batch, self.own(turn, k))):
                yield {named(name, k): terms for name, terms in part.items()}

    def matched(self, k: int, turn) -> Tensor:
        student = cast(Denoiser, self.each[k]["student"].module)
        ends = self.samples[k]
        (x, y), t = ends.at(ends.chosen(turn)), turn.draw(self.law())
        x_t = student.path.noise(x, t, turn.randn(x))
        with torch.no_grad():
            said = self.teacher.predict(student.prediction, x_t, t, y)
        return squared_error(student(x_t, t, y), said)

    def after(self, batch, turn):
        if turn.stage != "match":
            for k, student in enumerate(self.students):
                student.after(batch, self.own(turn, k))

    def own(self, turn, k: int) -> Own:
        return Own(turn, k, self.settings.match_steps * self.smaller)

    # ---- what is left ----

    def generator(self) -> Generator:
        return Routed([student.generator() for student in self.students], self.routes)

    def product(self):
        return self.left(self.generator(), inner=self.settings.inner, routes=list(self.routes))

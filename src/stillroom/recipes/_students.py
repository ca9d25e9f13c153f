"""What students of a flow share: how they are told, how they begin, what they are asked, and what they leave."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from stillroom.data import encoding_card
from stillroom.flows import (
    Bare,
    Denoiser,
    Denoises,
    FewStep,
    Flow,
    Generator,
    Move,
    OneStep,
    drawn_at_once,
    guided,
    noise_of,
    require,
    require_sight,
)
from stillroom.flows.prompted import prompted
from stillroom.match import Weight, prediction_gap
from stillroom.nets import Lora, tie, with_input
from stillroom.nets.offload import device_of
from stillroom.nets.recompute import recompute
from stillroom.paths import Law, LawName, Restricted, law_of, uniform_grid
from stillroom.settings import (
    Count,
    Decay,
    Images,
    Natural,
    Optimizer,
    Refusal,
    Run,
    Where,
    refuse_given,
    seed_of,
)
from stillroom.train import Average, Product, Recipe, Ref, Role, Stage, nothing, product_hash
from stillroom.train.teacher import codec_beside, encoding_of, is_ours, open_teacher, open_teacher_of, teacher_card


@dataclass(frozen=True, kw_only=True)
class Student(Run):
    """Of a student that needs no data."""

    teacher: Where
    """A flow run, a diffusers folder, ring:MODES[:STD] or grid:SIDE[:STD]."""
    prompts: Where = ""
    """Of a text-to-image teacher: what `stillroom cache --prompts` wrote."""
    origin: Where = ""
    """A flow run whose network the student starts from; the teacher's own unless given."""
    steps: int = 2000
    batch: int = 128
    guidance: float = 1.0
    """Of the teacher; the student has it built in."""
    lora: Natural = 0
    """Rank of adapters that alone are learned, on the frozen weights; 0 learns all weights."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory for about a third more time."""
    average: Decay = 0.999
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0, warmup=100))


@dataclass(frozen=True, kw_only=True)
class WithData(Student, Images):
    """Of a student that is better off with data, and takes samples of its teacher for them where there are none."""

    data: Where = "none"
    teacher_samples: Count = 5000
    """Drawn once, in the place of data."""


def networked(flow: Flow, name: str) -> Denoiser:
    """The flow's denoiser, which must have a network for a student to start from."""
    if not isinstance(flow.denoiser, Denoiser):
        raise Refusal(f"teacher {name}: it has no network for a student to start from; give a flow run, as teacher or "
                      "as --origin")
    return flow.denoiser


def require_origin(origin: Flow, teacher: Flow, place: str) -> None:
    if (origin.shape, origin.classes) != (teacher.shape, teacher.classes):
        raise Refusal(f"origin {place}: it makes {list(origin.shape)} of {origin.classes or 'no'} classes, the teacher "
                      f"{list(teacher.shape)} of {teacher.classes or 'none'}")
    if origin.denoiser.path != teacher.denoiser.path:
        raise Refusal(f"origin {place}: its path is {origin.denoiser.path}, the teacher's {teacher.denoiser.path}; "
                      "give one that learned along the teacher's")


def require_teacher(flow: Flow, place: str, batch: int, given: tuple[Tensor, Tensor | None] | None = None) -> None:
    """The gate: the teacher on data and labels, or on its own samples where there are none."""
    count, device = few(flow, 512, 32), device_of(flow)
    x, y = given or (flow.sample(count, batch=few(flow, 256, batch)), flow.labels(0, count))
    require(flow.denoiser, x.to(device), None if y is None else y.to(device), f"teacher {place}")


def few(flow: Flow, count: int, prompted_count: int) -> int:
    """Samples of a text-to-image teacher are large, and dear."""
    return count if prompted(flow) is None else min(count, prompted_count)


class Ends:
    """Where the teacher's trajectories end, drawn once: samples in the place of data."""

    def __init__(self, flow: Flow, count: int, run: Run, guidance: float = 1.0, steps: int | None = None):
        self.flow: Flow | None = flow               # None where the teacher has gone
        self.at_once = few(flow, drawn_at_once(run), 8)
        self.labels, self.count, self.guidance, self.steps = flow.labels(0, count), count, guidance, steps
        self.seed = seed_of(run.seed, "ends")   # not the noises that a user draws with, which would be known by heart
        self.ends = torch.zeros(count, *flow.shape)
        self.ends.copy_(self.noises())      # until they are followed, as a plan leaves it: of some spread

    def noises(self) -> Tensor:
        """Where they begin, [count, *shape]."""
        return noise_of(tuple(self.ends.shape[1:]), 0, self.count, self.seed)

    def follow(self) -> None:
        assert self.flow is not None
        self.ends.copy_(self.flow.sample(self.count, self.seed, guidance=self.guidance, steps=self.steps,
                                         batch=self.at_once))

    def memory(self) -> dict[str, Tensor]:
        return {"ends": self.ends}

    def chosen(self, turn) -> Tensor:
        """[B]: numbers of some of them."""
        return (turn.rand((turn.batch,)) * self.count).long().clamp(max=self.count - 1)

    def at(self, i: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B]: ends and their labels."""
        return self.ends[i], None if self.labels is None else self.labels[i]


class Distillation(Recipe):
    """A recipe around a teacher `flow`, its guided answer `teacher`, and the network `origin` that students start from.

    A subclass says what learns, its losses, and the generator that comes of it.
    """

    ends: Ends | None = None        # of the teacher, for recipes that want them
    student: Denoiser
    mean: Average                   # of the student
    generator: Callable[[], Generator]

    def __init__(self, settings: Student, data=None):
        self.settings, self.data = settings, data
        self.flow, began = self.opened()
        self.taught_by = teacher_card(settings.teacher)         # now: another model may come to that place meanwhile
        self.origin = networked(began, settings.origin or settings.teacher)
        require_origin(began, self.flow, settings.origin)
        if hasattr(self, "generator"):
            require_sight(self.origin, f"teacher {settings.origin or settings.teacher}")
        self.null = self.flow.classes or 0          # the label that stands for none, of a network that has one
        self.require_labels()
        self.has_null = self.knows_null(self.origin)
        if settings.checkpointing:
            if getattr(settings, "fake_lora", 0):
                raise Refusal("checkpointing: with adapters as the fake score (fake_lora), what is computed again "
                              "would be another network by then; leave out --checkpointing")
            if not settings.offload:        # by the time of computing again, weights that are brought have left
                recompute(self.origin.net)
        self.teacher = guided(self.flow.denoiser, settings.guidance)

    def require_labels(self) -> None:
        if self.settings.guidance != 1 and self.flow.classes is None:
            raise Refusal(f"teacher {self.settings.teacher}: it was trained without labels; use guidance 1")
        if self.settings.guidance != 1:
            self.require_null(self.flow.denoiser, self.settings.teacher)

    def knows_null(self, denoiser: Denoises) -> bool:
        return getattr(getattr(denoiser, "net", None), "null", self.null) is not None

    def require_null(self, denoiser: Denoises, place: str) -> None:
        """For guidance, and for scores that are asked without the label; later, the teacher's samples would be drawn
        before it is known."""
        if not self.knows_null(denoiser):
            raise Refusal(f"teacher {place}: each of its {self.null} embeddings is of a class, and none stands for no "
                          "label; leave out guidance, and what asks without labels")

    def require_two_answers(self):
        """For guidance of a network that starts from the teacher's, or of the teacher in its two parts."""
        self.require_null(self.flow.denoiser, self.settings.teacher)
        self.require_null(self.origin, self.settings.origin or self.settings.teacher)
        if getattr(self.flow.denoiser, "takes_strength", False):
            raise Refusal(f"teacher {self.settings.teacher}: it is told the strength of guidance, and was taught no "
                          "answer without a label to be guided away from; give the flow that it was distilled from")

    def opened(self) -> tuple[Flow, Flow]:
        """The teacher, and the flow whose network students start from."""
        s = self.settings
        flow = (open_teacher(s.teacher, s.prompts) if self.data is None
                else open_teacher_of(s.teacher, self.data, s.prompts))
        return flow, open_teacher(s.origin, s.prompts) if s.origin else flow

    def check(self, batch):
        require_teacher(self.flow, self.settings.teacher, self.settings.batch, batch.get("data"))

    # ---- what learns ----

    def begun(self) -> Denoiser:
        """A copy of the origin's denoiser that learns: all of it, or adapters on weights that are held once."""
        whole = self.begun_whole()
        if self.settings.lora:
            tie(whole.net, self.origin.net)
        return adapted(whole, self.settings.lora)

    def begun_whole(self) -> Denoiser:
        return self.saving(copy.deepcopy(self.origin).requires_grad_(True))

    def saving(self, denoiser: Denoiser) -> Denoiser:
        """It, with activations computed again if the settings say so."""
        if self.settings.checkpointing:
            recompute(denoiser.net)
        return denoiser

    def begun_on_teacher(self, rank: int) -> Denoiser:
        """Adapters on the teacher's own weights, which are held once: the teacher then answers as without them. What
        starts from a copy of these weights must have begun."""
        teacher = self.flow.denoiser
        if not isinstance(teacher, Denoiser):
            raise Refusal(f"teacher {self.settings.teacher}: it has no network for adapters; give a flow run, or a "
                          "fake score with weights of its own")
        fake = adapted(teacher, rank)
        self.flow = self.sampled(Bare(fake))
        self.teacher = guided(self.flow.denoiser, self.settings.guidance)
        return fake

    @property
    def judge(self) -> Denoiser | Bare:
        """On whose features heads stand: the teacher's, or, where it has no network, the origin's."""
        teacher = self.flow.denoiser
        return teacher if isinstance(teacher, Denoiser | Bare) else self.origin

    def follower(self, module: nn.Module) -> Average:
        """Of something that `begun` made."""
        return Average(module, self.settings.average, self.learns)

    def role(self, module: nn.Module, optimizer: Optimizer, **more) -> Role:
        """Of something that `begun` made."""
        return Role(module, optimizer, trains=self.learns, **more)

    @property
    def learns(self) -> str:
        """As `Role.trains`, of something that `begun` made."""
        return "lora_" if self.settings.lora else ""

    def roles(self) -> dict[str, Role]:
        return {"student": self.role(self.student, self.settings.student, average=self.mean)}

    def stages(self) -> Sequence[Stage]:
        return [Stage("distil", self.settings.steps, enter=self.ends.follow if self.ends else nothing)]

    def memory(self):
        return self.ends.memory() if self.ends else {}

    # ---- what it is asked ----

    @property
    def device(self) -> torch.device:
        return device_of(self.origin)

    def noise(self, turn) -> Tensor:
        """[B, *shape], where samples of the student begin."""
        return turn.randn((turn.batch, *self.flow.shape))

    def labels(self, turn) -> Tensor | None:
        """[B], class-balanced over a global batch; of more classes than it holds, drawn."""
        s, classes = self.settings, self.flow.classes or 1
        count = max(classes, s.batch)
        # Where some classes come once more than others, each batch has others of those: a student that moves on every
        # k-th step would else meet few of them.
        first = seed_of(s.seed, "labels", turn.step) % classes if s.batch % classes else 0
        if (y := self.flow.labels(first, count)) is None:
            return None
        if count == s.batch:
            return y[turn.rows(count)].to(self.device)
        return y[(turn.rand((turn.batch,)) * count).long().clamp(max=count - 1).cpu()].to(self.device)

    def in_place_of_data(self, guidance: float = 1.0) -> Ends | None:
        """Samples of the teacher, where there are no data."""
        s = cast(WithData, self.settings)
        if self.data is None:
            return Ends(self.flow, s.teacher_samples, s, guidance)
        refuse_given(s, ("teacher_samples",), "there are data, and the teacher draws none in their place; leave it out")
        return None

    def given(self, batch, turn) -> tuple[Tensor, Tensor | None]:
        """Data and their labels, or samples of the teacher in their place."""
        return self.ends.at(self.ends.chosen(turn)) if self.ends else batch["data"]

    def dropped(self, y: Tensor | None, share: float, turn) -> Tensor | None:
        """Labels, that share of them the null label, of a teacher that has one: a score that shall be guided needs an
        answer without a label."""
        if y is None or not self.has_null:
            return y
        return y.masked_fill(turn.rand((len(y),)) < share, self.null)

    def law(self, low: float = 0.0, high: float = 1.0, name: LawName = "uniform") -> Law:
        """Times of a law between low and high, shifted as the teacher's."""
        return law_within(self.flow.denoiser, low, high, name, self.flow.shift)

    def law_between(self, low: float, high: float, times: tuple[float, float], name: LawName) -> Restricted:
        """What lies there of that law's `times`, shifted as the teacher's."""
        law, told = self.law(*times, name), f"times {times[0]:g} {times[1]:g}"
        if law.cdf(torch.tensor(low)) >= law.cdf(torch.tensor(high)):
            raise Refusal(f"{told}: reach no noise level between {low:.3g} and {high:.3g}, where a step of the student "
                          "learns; give wider ones, or fewer --student-steps")
        return Restricted(law, low, high)

    # ---- what it leaves ----

    def preview(self) -> Mapping[str, Tensor]:
        return self.shown(self.generator())

    def product(self) -> Product:
        return self.left(self.generator())

    def sampled(self, denoiser: Denoises) -> Flow:
        """As the teacher is sampled."""
        return Flow(denoiser, self.flow.shape, self.flow.sampler, self.flow.steps, self.flow.shift)

    def left(self, made: Generator | Flow, **more) -> Product:
        s, place = self.settings, self.settings.origin or self.settings.teacher
        kind = "flow" if isinstance(made, Flow) else "generator"
        card = {"shape": list(made.shape), "classes": made.classes, **self.taught_by, "guidance": s.guidance,
                **({"prompts": s.prompts} if s.prompts else {}), **self.encoding(), **more}
        base = Ref(place, product_hash(place)) if s.lora and is_ours(Path(place)) else None
        return Product(kind, {kind: made}, card, base)

    def encoding(self) -> dict:
        """Of the latents that the teacher makes, if it makes latents."""
        return encoding_of(self.settings.teacher) if self.data is None else encoding_card(self.data)

    def shown(self, made: Generator | Flow, guidance: float = 1.0) -> dict[str, Tensor]:
        """Both of the same noise."""
        at_once = few(self.flow, drawn_at_once(self.settings), self.settings.batch)
        own = made.sample(few(self.flow, 64, 8), guidance=guidance, batch=at_once)
        its = self.sampled(self.teacher).sample(len(own), batch=at_once)
        return self.seen(samples=own, teacher=its)

    @torch.no_grad()
    def seen(self, **latents: Tensor) -> dict[str, Tensor]:
        """As pictures, where the teacher's codec lies beside it. It is read anew each time, and leaves the memory."""
        if (codec := codec_beside(self.settings.teacher)) is None:
            return latents
        codec = codec.to(self.device)
        return {name: codec.pictures(z, 1) for name, z in latents.items()}


def adapted(denoiser: Denoiser, rank: int) -> Denoiser:
    """With adapters of that rank; as it is for rank 0. A new one, because a product is written down by what it was made
    of."""
    if not rank:
        return denoiser
    return Denoiser(Lora(denoiser.net, rank), denoiser.path, denoiser.prediction, denoiser.scale_input)


def widened(denoiser: Denoiser, argument: str) -> Denoiser:
    """A copy that learns, with one input more, "guided" or "two_times", which begins without effect."""
    return Denoiser(with_input(denoiser.net, argument), denoiser.path, denoiser.prediction, denoiser.scale_input)


def score_gap(fake: Denoiser, teacher: Denoises, x: Tensor, t: Tensor, eps: Tensor, y: Tensor | None,
              weight: Weight = "residual") -> Tensor:
    """[B]: the gap that samples x descend, between what both say of x noised, in the fake score's prediction."""
    c, kind = teacher.path.over(t, x), fake.prediction
    with torch.no_grad():
        x_t = c.alpha * x + c.sigma * eps
        made, real = fake(x_t, t, y), teacher.predict(kind, x_t, t, y)
    return prediction_gap(kind, x, eps, c, made, real, weight)


def law_within(denoiser: Denoises, low: float, high: float, name: LawName, shift: float = 1.0) -> Law:
    if low >= high:
        raise Refusal(f"times {low:g} {high:g}: the first is not below the second; give the lower noise level first")
    return law_of(name, denoiser.path, shift, low, high)


def generator_of(student: Denoiser, flow: Flow, plans: Sequence[Sequence[float]], move: Move) -> Generator:
    """What draws with a student along its plans."""
    if [len(times) for times in plans] == [2] and move != "jump" and not student.scale_input:
        return OneStep(student.net, student.path, student.prediction, flow.shape, takes_strength=False)
    return FewStep([student], flow.shape, plans, move)


def one_step_of(student: Denoiser, flow: Flow) -> Generator:
    """What draws with it in one evaluation."""
    return generator_of(student, flow, [(1.0, 0.0)], "ode")


def plans_of(flow: Flow, *steps: int) -> list[tuple[float, ...]]:
    """Of so many steps each, equal shares of the teacher's way."""
    return [tuple(flow.time(uniform_grid(k)).tolist()) for k in steps]


def at_noise(student: Denoiser, z: Tensor, y: Tensor | None) -> Tensor:
    """x0 as the student sees it in pure noise."""
    t = torch.ones(len(z), device=z.device)
    return student.x0(student.path.over(t, z).sigma * z, t, y)


def averaged(mean: Average) -> Denoiser:
    return cast(Denoiser, mean.module)

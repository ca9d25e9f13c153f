"""Drifting: a one-step generator whose samples follow a kernel field towards data and away from each other.

Problem: draw in one evaluation what a flow draws in fifty, without following its trajectories; or learn to draw in one
evaluation from data alone.

Equation (Deng et al. 2026; `match.drift`): in every class, for samples x = G(z, y) and real positives p,

    min E | phi(x) / s - sg(phi(x) / s + V) |^2,    V = sum over temperatures of V_T / rms(V_T)

V_T pulls phi(x) to the positives and pushes it off the other samples, with weights from a kernel of temperature T in
units of the mean distance s. It is zero where both are equally distributed. phi are taps: the sample itself, its
places, their means and deviations, the maps of a frozen feature net, or hidden states of the teacher.

With a teacher the student starts from its network, asked at t = 1. The positives are real or the teacher's samples.

Paper: Generative Modeling via Drifting, arXiv 2602.04770; Drift-RAE, arXiv 2606.15553 (its body is not public: noising,
extrapolation and the choice of taps are our reading).

Expect: the loss stands still, because V is normalised. Look at field/*: the raw field beside that of real samples in
the place of generated ones. `stillroom inspect` says what the kernel would see of a space; see `drifting-scatter`.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from stillroom import match
from stillroom.data import Source, Stream, Tensors, at_most, encoding_card, sample
from stillroom.flows import Denoiser, Flow, OneStep, Tally, drawn_at_once, require, student_of
from stillroom.match.taps import TAPS, Vectors, of_map, problems
from stillroom.measure import participation_ratio
from stillroom.nets.bank import Bank
from stillroom.recipes import flow as flows
from stillroom.recipes.features import feature_net
from stillroom.settings import (
    Count,
    Decay,
    NotNegative,
    Optimizer,
    Positive,
    Refusal,
    Share,
    Where,
    given,
    nearest,
    refuse_given,
    seed_of,
)
from stillroom.train import Average, Product, Recipe, Role, Stage
from stillroom.train.checkpoint import full
from stillroom.train.teacher import open_teacher_of, teacher_card
from stillroom.train.world import pick_device

LOOKS, CONTRACTED = 10, 0.7
"""Looks over which the ratio of the field to its floor is averaged, and the mean that tells of a contraction."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """How the field is taken: `stillroom.match.drift`."""

    temperatures: tuple[Positive, ...] = (0.02, 0.05, 0.2)
    """In units of the mean distance. Without any, they are chosen by how many dimensions the positives spread in."""
    kernel: Literal["laplace", "gauss", "matern"] = "laplace"
    coupling: Literal["joint", "separate"] = "separate"
    """joint, with x_softmax, is the released form. Its force vanishes where samples lie close together and positives
    far off, as they may when a student starts from a teacher."""
    x_softmax: bool = False
    self_mask: bool = True
    normalise: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings(flows.Net):
    teacher: Where = ""
    """A flow run: the student starts from its network. Without one it starts anew, as `net` says."""
    steps: int = 2000
    batch: int = 512
    """Generated samples of a step, shared among its groups."""
    groups: Count = 8
    """Classes of a step; a field acts within one class."""
    positives: Literal["data", "teacher"] = "data"
    teacher_samples: Count = 5000
    """Drawn for positives = teacher, when a run starts or goes on."""
    support: Count = 64
    """Positives of a group."""
    bank: Count = 256
    """Newest real samples kept of each class."""
    taps: tuple[str, ...] = ("identity",)
    """Of: identity, tokens, pooled, patches2, patches4; and features, hidden, where those are given."""
    features: Where = ""
    """A run of `stillroom train features`, for the tap of that name."""
    layers: tuple[str, ...] = ()
    """Modules of the teacher's network, for the tap `hidden`: blocks.1 blocks.3"""
    noising: Literal["none", "both", "query"] = "none"
    """both: samples and positives are compared at a common noise level of their group. query: samples alone are
    noised, and follow the difference of the two sets' ideal denoisers (DMD without networks)."""
    noise: tuple[Share, Share] = (0.0, 0.6)
    """Times of `noising`, uniform, one for each group."""
    strongest: Positive = 1.0
    """Above 1 the strength of guidance becomes an input, drawn from w^-power up to here."""
    power: Positive = 3.0
    plain: Share = 0.5
    """Share of groups whose strength is 1."""
    unconditional: Count = 16
    """Real samples of any class that join the negatives of guided groups."""
    drop: Share = 0.0
    """Share of groups without a class, so that extrapolated guidance has a weaker answer."""
    early: Share = 0.0
    """Share of the steps after which the average is kept as a weaker generator, for extrapolated guidance; 0: none."""
    coverage: NotNegative = 0.0
    """Weight of the anchor-margin term, against collapse within a class."""
    average: Decay = 0.999
    field: Field = dataclasses.field(default_factory=Field)
    student: Optimizer = dataclasses.field(
        default_factory=lambda: Optimizer(lr=2e-4, betas=(0.9, 0.95), clip=2.0, warmup=100))


class Group(NamedTuple):
    """What the groups of a step have in common, each [G]."""

    label: Tensor                   # the null label stands for any class
    w: Tensor                       # strength of guidance
    t: Tensor                       # noise level


class Compared(NamedTuple):
    """One set of vectors, and the field at the samples'."""

    x: Tensor                       # [G L, n, C]
    positives: Tensor               # [G L, P, C]
    negatives: Tensor | None        # [G L, U, C]
    weights: match.Weights | None
    drift: match.Drift


class Taught(Tensors):
    """Samples of a teacher, in the place of the data that it was taught on."""

    def __init__(self, x: Tensor, y: Tensor | None, real: Source | Stream, name: str, evaluations: int):
        super().__init__(x, y, real.classes, name)
        self.real, self.encoding, self.evaluations = real, getattr(real, "encoding", None), evaluations


class Drifting(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        self.settings, self.data, self.shape = settings, data, data.shape
        self.classes = None if data.classes is None else len(data.classes)
        self.groups = min(settings.groups, self.classes or settings.groups)
        self.n = settings.batch // self.groups
        refuse_what_cannot_be(settings, self.groups, self.classes)
        self.teacher = open_teacher_of(settings.teacher, data) if settings.teacher else None
        self.taught_by = teacher_card(settings.teacher) if settings.teacher else {"teacher": None}
        self.student = self.begun(self.teacher) if self.teacher else self.anew()
        self.mean = Average(self.student, settings.average)
        self.early = Average(self.student, settings.average) if settings.early else None
        self.bank = self.filled_bank()
        self.phi = self.compared()
        with torch.no_grad():                                   # once, so that taps that do not fit are refused now
            self.phi(self.bank.x[0, :2], torch.zeros(2), None)
        self.temperatures = settings.field.temperatures or self.automatic()
        self.form: dict[str, Any] = vars(settings.field) | {"temperatures": self.temperatures}
        self.ratios: dict[str, deque[float]] = {}

    @classmethod
    def prepare(cls, settings, sources, note):
        if settings.positives == "data":
            return sources
        if not settings.teacher:
            raise Refusal("positives = teacher: name the teacher too")
        data, n = sources["data"], settings.teacher_samples
        flow = open_teacher_of(settings.teacher, data).to(pick_device(settings.device))
        note(f"drawing {n} samples of teacher {settings.teacher}")
        tally = Tally()
        tally.watch("teacher", flow)
        with tally.counting():
            x = flow.sample(n, seed_of(settings.seed, "positives"))
        return {"data": Taught(x, flow.labels(0, n), data, settings.teacher, tally.counts["teacher"])}

    def spent(self):
        return {"teacher": self.data.evaluations} if isinstance(self.data, Taught) else {}

    # ---- what there is at the start ----

    def begun(self, teacher: Flow) -> OneStep:
        if not isinstance(teacher.denoiser, Denoiser):
            raise Refusal(f"teacher {self.settings.teacher}: it has no network for a student to start from")
        return student_of(teacher.denoiser, self.shape, self.settings.strongest > 1, self.settings.drop > 0)

    def anew(self) -> OneStep:
        net = flows.make_net(self.settings, self.shape, self.classes, guided=self.settings.strongest > 1)
        return OneStep(net, flows.PATHS["linear"](), "v", self.shape, unlabelled=self.settings.drop > 0,
                       takes_strength=self.settings.strongest > 1)

    def filled_bank(self) -> Bank:
        bank, device = Bank(self.classes or 1, self.settings.bank, self.shape), next(self.student.parameters()).device
        count = at_most(self.data, (self.classes or 1) * self.settings.bank)    # a second look at an item tells nothing
        x, y = sample(self.data, count, self.settings.seed)
        bank.push(x.to(device), None if y is None else y.to(device))
        names = self.data.classes or ("the data",)
        if short := [name for name, n in zip(names, bank.count.tolist(), strict=True) if n < 2]:
            which = " --teacher-samples" * (self.settings.positives == "teacher")
            raise Refusal(f"{self.data.name}: fewer than two samples of {', '.join(short[:5])}; a field needs "
                          f"more{which}")
        return bank

    def automatic(self) -> tuple[float, ...]:
        """Temperatures by how many dimensions a class spreads in."""
        held = zip(self.bank.x, self.bank.count.tolist(), strict=True)
        spread = [participation_ratio(x[:n].flatten(1)) for x, n in held]
        return match.auto_temperatures(sum(spread) / len(spread), self.settings.support)

    def compared(self) -> Callable[[Tensor, Tensor, Tensor | None], Vectors]:
        """phi(x, t, y): all taps, each {name: [B, L, C]}."""
        s, of = self.settings, encoding_card(self.data)
        features = feature_net(s.features, self.shape, of).to(self.bank.x.device) if "features" in s.taps else None

        def phi(x: Tensor, t: Tensor, y: Tensor | None) -> Vectors:
            found: dict[str, Tensor] = {}
            for tap in s.taps:
                if tap == "features":
                    assert features is not None
                    maps = {f"features {i}": m for i, m in enumerate(features(x))}
                elif tap == "hidden":
                    maps = cast(Denoiser, cast(Flow, self.teacher).denoiser).hidden(x, t, y, s.layers)
                else:
                    found |= TAPS[tap](x)
                    continue
                found |= {f"{name} {k}": v for name, m in maps.items() for k, v in of_map(m).items()}
            return found

        return phi

    def check(self, batch):
        if self.teacher is not None:
            x, y = batch["data"]
            if isinstance(self.data, Taught):           # its own samples say nothing against it
                real = sample(self.data.real, at_most(self.data.real, len(x)), self.settings.seed)
                x, y = real.x.to(x), None if real.y is None else real.y.to(y)
            require(self.teacher.denoiser, x, y, f"teacher {self.settings.teacher}")

    # ---- a step ----

    def roles(self):
        return {"student": Role(self.student, self.settings.student, average=self.mean)}

    def stages(self):
        return [Stage("distil" if self.teacher else "train", self.settings.steps)]

    def memory(self):
        return {"bank": self.bank} | ({} if self.early is None else {"early": self.early})

    def losses(self, batch, turn):
        s, group = self.settings, self.draw_groups(turn)
        rows = turn.rows(s.batch).to(group.w.device)
        y, w = (None if each is None else each.repeat_interleave(self.n)[rows]
                for each in (self.told(group), group.w if self.student.takes_strength else None))
        x = turn.gather(self.student(turn.randn((turn.batch, *self.shape)), y, w))      # [G n, *shape]
        real = self.bank.draw(group.label, s.support, turn.rand((self.groups, s.bank), shared=True)).flatten(0, 1)
        fields = {} if s.noising == "query" else self.fields(x, real, self.others(turn), group, turn)
        losses = {name: match.drift_loss(it.x, it.drift) for name, it in fields.items()}
        if s.noising == "query":
            losses = {"query": self.query_loss(x, real, group, turn)}
        if turn.watched and all(bool(loss.isfinite().all()) for loss in losses.values()):
            self.tell(x.detach(), real, fields, group, turn)
        if s.coverage:
            q, p = (self.grouped(part.flatten(1)) for part in (x, real))                # [G, n, D], [G, P, D]
            losses["coverage"] = s.coverage * match.uncovered(q, p)
        return {"student": losses}

    def draw_groups(self, turn) -> Group:
        s, g = self.settings, self.groups
        label = turn.rand((self.classes or g,), shared=True).argsort()[:g]
        anyone, guided, strength, t = turn.rand((4, g), shared=True)
        label = 0 * label if self.classes is None else label.masked_fill(anyone < s.drop, self.classes)
        w = torch.where((guided < s.plain) | (anyone < s.drop), 1.0, power_law(strength, s.strongest, s.power))
        return Group(label, w, s.noise[0] + (s.noise[1] - s.noise[0]) * t)

    def told(self, group: Group) -> Tensor | None:
        """The labels of nets, which an unconditional one has none of."""
        return None if self.classes is None else group.label

    def others(self, turn) -> Tensor | None:
        """[G U, *shape]: real samples of any class, that guided samples are pushed off."""
        u = self.settings.unconditional
        if not self.student.takes_strength:
            return None
        return self.bank.draw_any(turn.rand((self.groups, u), shared=True)).flatten(0, 1)

    def grouped(self, x: Tensor) -> Tensor:
        """[G n, ...] -> [G, n, ...]."""
        return x.unflatten(0, (self.groups, -1))

    def fields(self, x: Tensor, real: Tensor, others: Tensor | None, group: Group, turn) -> dict[str, Compared]:
        mine = self.vectors(x, group, turn)
        with torch.no_grad():
            theirs = self.vectors(real, group, turn)
            repel = {} if others is None else self.vectors(others, group, turn)
        found = {}
        for name, vectors in mine.items():
            q, p = (problems(part, len(group.w)) for part in (vectors, theirs[name]))
            u, weights = None, None
            if others is not None:
                u = problems(repel[name], len(group.w))
                strength = (group.w - 1) * (self.n - 1) / u.shape[1]                    # alpha - 1 is w - 1: A.7
                each = strength.repeat_interleave(vectors.shape[1])[:, None]            # [G L, 1]
                weights = match.Weights(negatives=each.expand(u.shape[:2]))
            found[name] = Compared(q, p, u, weights, match.drift_or_nan(q, p, u, weights=weights, **self.form))
        return found

    def vectors(self, x: Tensor, group: Group, turn) -> Vectors:
        """phi of samples [G n, *shape], at their group's noise level where both sides are noised."""
        each, noised = len(x) // len(group.t), self.settings.noising == "both"
        t, y = (group.t if noised else torch.zeros_like(group.t)).repeat_interleave(each), self.told(group)
        if noised:
            x = self.student.path.noise(x, t, turn.randn(tuple(x.shape), shared=True))
        return self.phi(x, t, None if y is None else y.repeat_interleave(each))

    def query_loss(self, x: Tensor, real: Tensor, group: Group, turn) -> Tensor:
        """Samples alone are noised, and follow the difference of the ideal denoisers of the two sets: DMD without
        networks (ours)."""
        q, (fake, target) = x.flatten(1), self.answers(x.detach(), real, group, turn)
        return match.gap(q, fake, target, match.residual_weight(q, target))

    def answers(self, x: Tensor, real: Tensor, group: Group, turn) -> tuple[Tensor, Tensor]:
        """[G n, D]: to noised samples, of the ideal denoisers of the samples, each left out of its own, and of the
        positives."""
        q, p = (part.flatten(1).unflatten(0, (len(group.t), -1)) for part in (x, real))     # [G, n, D], [G, P, D]
        c = self.student.path.over(group.t.clamp(min=1e-3), q)
        x_t = c.alpha * q + c.sigma * turn.randn(tuple(q.shape), shared=True)
        fake = match.parzen_x0(x_t, c.alpha, c.sigma, q, own=True)
        return fake.flatten(0, 1), match.parzen_x0(x_t, c.alpha, c.sigma, p).flatten(0, 1)

    # ---- what is told ----

    @torch.no_grad()
    def tell(self, x: Tensor, real: Tensor, fields: Mapping[str, Compared], group: Group, turn) -> None:
        """The field before it is normalised, beside its floor; of the first set of vectors, how many positives are
        heard too, and how far the joint form's gate is open."""
        raw, floors = self.beside_floor(x, real, group, turn)
        for name, size in raw.items():
            turn.tell(f"field/{name}", size)
            if name in floors:
                turn.tell(f"field/{name}, floor", floors[name])
                self.warn_if_contracted(name, float(size / floors[name]), turn)
        for name, it in [*fields.items()][:1]:
            looks = match.diagnose(it.x, it.positives, it.negatives, weights=it.weights, **self.form)
            turn.tell(f"field/{name}, positives heard", looks["positives"].mean())
            turn.tell(f"field/{name}, gate", looks["gate"].mean())

    def beside_floor(self, x: Tensor, real: Tensor, group: Group, turn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The raw fields, and those of real samples in the place of generated ones, both of as many samples as there
        are different real ones, and of groups of strength 1: guided, real samples have a field too."""
        at = (group.w == 1).nonzero().flatten()
        if not len(at):
            turn.note("a look found no group of strength 1, and only those have a floor that the field can be told "
                      "beside; give a higher plain")
            return self.raw(x, real, group, turn), {}
        plain = Group(*(part[at] for part in group))
        others = self.real_ones(plain, turn)                                            # [G', k, *shape]
        k = others.shape[1]
        if k < 4:
            turn.note(f"no floor is told beside the field: a group of {self.data.name} has {k} different samples, and "
                      "two of two or more are needed")
            return self.raw(x, real, group, turn), {}
        p = min(self.settings.support, max(k - self.n, k // 2))
        n = min(self.n, k - p)

        def raw(x: Tensor, real: Tensor) -> dict[str, Tensor]:
            return self.raw(x.flatten(0, 1), real.flatten(0, 1), plain, turn)

        return raw(self.grouped(x)[at, :n], self.grouped(real)[at, :p]), raw(others[:, :n], others[:, n:n + p])

    def raw(self, x: Tensor, real: Tensor, group: Group, turn) -> dict[str, Tensor]:
        """Root mean squares of the forces, mean over temperatures; of `query`, of the difference of both answers."""
        if self.settings.noising == "query":
            fake, target = self.answers(x, real, group, turn)
            return {"query": (target - fake).square().mean().sqrt()}
        fields = self.fields(x, real, None, group, turn)
        return {name: it.drift.stats["rms"].mean() for name, it in fields.items()}

    def real_ones(self, group: Group, turn) -> Tensor:
        """[G, k, *shape]: different real samples of each group, no more than a field is of."""
        held = torch.cat([self.bank.count, self.bank.count.sum()[None]])[group.label]   # the null label is of any class
        k = min(self.n + self.settings.support, self.settings.bank, int(held.min()))
        drawn = self.bank.draw(group.label, k, turn.rand((len(group.w), self.settings.bank), shared=True))
        found = [once(x) for x in drawn]
        return torch.stack([x[:min(map(len, found))] for x in found])

    def warn_if_contracted(self, name: str, ratio: float, turn) -> None:
        ratios = self.ratios.setdefault(name, deque(maxlen=LOOKS))
        ratios.append(ratio)
        if len(ratios) == LOOKS and sum(ratios) / LOOKS < CONTRACTED:
            turn.note(f"field of {name}: below that of real samples for {LOOKS} looks: generated samples lie closer to "
                      "the data's middle than data do; give noising = both, coverage, or field.coupling = separate")

    # ---- what comes of it ----

    def after(self, batch, turn):
        x, y = batch["data"]
        self.bank.push(turn.gather(x), None if y is None else turn.gather(y))
        s = self.settings
        if self.early is not None and turn.step == min(int(s.early * s.steps), s.steps - 1):
            self.early.module.load_state_dict({k: full(v) for k, v in self.mean.module.state_dict().items()})

    def preview(self):
        return {"samples": cast(OneStep, self.mean.module).sample(64, batch=drawn_at_once(self.settings))}

    def product(self):
        s = self.settings
        card = {"shape": list(self.shape), "classes": self.classes, "data": s.data, **self.taught_by,
                "taps": list(s.taps), "temperatures": list(self.temperatures), "strongest": s.strongest,
                **encoding_card(self.data)}
        parts: dict[str, nn.Module] = {"generator": self.mean.module}
        return Product("generator", parts if self.early is None else parts | {"early": self.early.module}, card)


def power_law(u: Tensor, strongest: float, power: float) -> Tensor:
    """Strengths w on [1, strongest] with density proportional to w^-power, from uniform u."""
    if power == 1:
        return strongest**u
    return (1 + u * (strongest ** (1 - power) - 1)) ** (1 / (1 - power))


def once(x: Tensor) -> Tensor:
    """[m, ...]: of equal items the first."""
    _, kind = x.flatten(1).unique(dim=0, return_inverse=True)
    first = {k: i for i, k in reversed([*enumerate(kind.tolist())])}
    return x[sorted(first.values())]


def refuse_what_cannot_be(s: Settings, groups: int, classes: int | None) -> None:
    if s.batch % groups:
        raise Refusal(f"batch = {s.batch} does not divide into {groups} groups of equal size; give a multiple of "
                      f"{groups}, or other --groups")
    if s.batch == groups:
        raise Refusal(f"batch = {s.batch} leaves one sample to each of {groups} groups, which nothing pushes")
    own = given(s, *(f.name for f in dataclasses.fields(flows.Network)))
    if s.teacher and own:
        raise Refusal(f"{own[0]}: a student of a teacher has its network; leave out {' and '.join(own)}, or teacher")
    if s.coverage and s.support < 2:
        raise Refusal("support = 1: coverage is of positives beside each other; give 2 or more, or leave out coverage")
    if s.support > s.bank:
        raise Refusal(f"support = {s.support} positives cannot be drawn from a bank of {s.bank}")
    known = {*TAPS, "features", "hidden"}
    for tap in s.taps:
        if tap not in known:
            raise Refusal(f"taps: no tap is called {tap!r}{nearest(tap, known)}")
    if not s.taps:
        raise Refusal("taps: name at least one")
    for tap, source, how in (("features", s.features, "--features RUN"),
                             ("hidden", s.teacher and s.layers, "--teacher with --layers")):
        if (tap in s.taps) != bool(source):
            raise Refusal(f"the tap {tap!r} and {how} come together")
    if s.strongest < 1:
        raise Refusal(f"strongest = {s.strongest}: strengths of guidance begin at 1")
    if classes is None and (s.drop or s.strongest > 1):
        raise Refusal("the data have no labels, so nothing can be guided: leave out drop and strongest")
    if s.strongest == 1:
        refuse_given(s, ("power", "plain", "unconditional"), "of strengths of guidance, and only 1 is drawn; give "
                                                             "--strongest above 1, or leave it out")
    if s.groups > groups and given(s, "groups"):
        raise Refusal(f"groups = {s.groups}: a step takes every class once at most, and the data have {classes}; give "
                      f"{classes} or fewer, or leave it out")
    if s.positives == "data":
        refuse_given(s, ("teacher_samples",), "positives = data draws none; give --positives teacher, or leave it out")
    if s.noising == "none":
        refuse_given(s, ("noise",), "noising = none compares samples as they are; give --noising both, or leave it out")
    if s.noise[0] > s.noise[1]:
        raise Refusal(f"noise = {s.noise[0]:g} {s.noise[1]:g}: give the lower time first")
    if s.noising == "query":
        refuse_given(s, ("taps", "strongest", "field"), "noising = query compares samples themselves, without a field "
                                                        "or guidance; leave it out")

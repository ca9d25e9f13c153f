"""Hyper-SD: consistency within segments of the trajectory, ever fewer of them, down to one.

Problem: `consistency` asks for the whole way at once. Its errors add up, and in several steps it leaves the teacher's
trajectories: each step noises anew.

Equation (Ren et al. 2024): with time parted into K segments, e_K(t) the lower end of the one that t lies in, and s the
time before t on the teacher's grid,

    min E d( J(x_t, t -> e_K(t), y), sg J^(J_T(x_t, t -> s, y), s -> e_K(t), y) )

J is the student's DDIM step, J^ that of its moving average, J_T that of the guided teacher. One stage after another
has fewer segments (8, 4, 2, 1), and goes on with the weights of the one before. Segments are drawn along by DDIM steps,
one each. A network that has come to one segment answers x0 for good: it is noised anew between its steps. With `told`
(ours) it is told where to jump as well, and draws along any of `segments`. Further terms, off unless given:

    adversarial       heads on the teacher's features, where a jump ends in data: in 1/K of all jumps
    reward            - R(x, y), through the last of K steps from pure noise; R is a function of the user's
    score             the gap of `dmd` at x = J(z, 1 -> 0), with a fake score, in the stage of one segment

Its training code is not public: the distance (there squared, and adversarial where far), the weights and the order of
the terms are a reconstruction.

Paper: Hyper-SD, arXiv 2404.13686.

Expect: K steps of a student whose stages end in K segments come where the teacher does; of one that has gone on, no
longer. See the claim `hyper-sd`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stillroom.flows import Denoiser, denoising_loss, rollout
from stillroom.match import pseudo_huber
from stillroom.paths import lower_edge, uniform_grid
from stillroom.recipes import consistency, module_of
from stillroom.recipes._adversary import Adversarial, Adversary, require_weight
from stillroom.recipes._students import averaged, generator_of, score_gap, widened
from stillroom.settings import Count, Natural, NotNegative, Optimizer, Refusal, Share, Where, refuse_given
from stillroom.train import Role, Stage, nothing
from stillroom.train.recipe import Terms


@dataclass(frozen=True, kw_only=True)
class Settings(consistency.Settings):
    student_steps: Natural = 0   # pyright: ignore[reportGeneralTypeIssues]
    """Evaluations of the student for a sample, unless `sample --steps` asks for others of `segments`; the last of them
    unless given."""
    segments: tuple[Count, ...] = (8, 4, 2, 1)
    """Of each stage; the steps of the run are parted equally among them. The last are those that the student serves
    best."""
    edges: tuple[Share, ...] = ()
    """Of the segments of one stage, in the place of `segments`: falling times from 1 to 0, before the teacher's shift.
    They need not lie on the grid."""
    told: bool = False
    """Tell the network where its jump ends, so that one serves all of `segments`; each stage then keeps up those before
    it (ours). It needs a network with an input for a second time."""
    adversarial: Adversarial = field(default_factory=Adversarial)
    reward: Where = ""
    """FILE.py:FUNCTION of samples [B, ...] and labels [B] or None, to be made large; it gives [B] with a gradient."""
    reward_weight: NotNegative = 0.1
    score_weight: NotNegative = 0.0
    """Of the gap in one step; 0 leaves out the fake score."""
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, clip=1.0))


class HyperSD(consistency.Consistency):
    Settings = Settings

    def __init__(self, settings: Settings, data=None):
        require_segments(settings)
        super().__init__(settings, data)
        self.settings = settings
        s, shape = settings, self.flow.shape
        if s.told:
            self.jump = "jump"
        self.edges = {f"segments {len(edges) - 1}": edges for edges in edges_of(s)}     # shares of the way
        self.plans = {name: tuple(self.flow.time(torch.tensor(edges, dtype=torch.float64)).tolist())
                      for name, edges in self.edges.items()}
        self.score_law = self.law(0.02, 0.98)
        self.adversary = Adversary(self.judge, s.adversarial, shape, self.score_law) if s.adversarial.weight else None
        self.reward = opened(s.reward, shape, self.flow.classes) if s.reward else None
        self.fake = super().begun_whole() if s.score_weight else None
        if len(self.plans) > s.steps:
            raise Refusal(f"steps {s.steps}: leave none for some of {len(self.plans)} stages; take more, or fewer "
                          "segments")

    def begins_near(self):
        return self.settings.edges != () or self.settings.segments[0] > 1

    def begun_whole(self):
        return self.saving(widened(self.origin, "two_times")) if self.settings.told else super().begun_whole()

    def roles(self):
        roles = super().roles()
        if self.adversary:
            roles["head"] = Role(self.adversary.heads, self.settings.adversarial.head)
        return roles | ({"fake": Role(self.fake, self.settings.score)} if self.fake else {})

    def stages(self):
        """Equal ones, and the remainder to the last."""
        names, each = list(self.plans), self.settings.steps // len(self.plans)
        rest = self.settings.steps - each * len(names)
        common = ("student", "head") if self.adversary else ("student",)
        enters = [self.ends.follow if self.ends else nothing] + [nothing] * (len(names) - 1)
        return [
            Stage(name, each + rest * (name == names[-1]), fresh=("student",), enter=enter,
                  roles=(*common, "fake") if self.fake and len(self.plans[name]) == 2 else common)
            for name, enter in zip(names, enters, strict=True)
        ]

    def goal(self, share, turn):
        """The lower edge of this stage; for a network that is told it, of one of the stages so far."""
        last = list(self.edges).index(turn.stage)
        edges = [lower_edge(share - consistency.ROUNDING, stage) for stage in list(self.edges.values())[: last + 1]]
        if not self.settings.told:
            return edges[last]
        chosen = (turn.rand(share) * len(edges)).long().clamp(max=last)
        return torch.stack(edges).gather(0, chosen[None])[0]

    @property
    def target(self):
        return averaged(self.mean)

    def losses(self, batch, turn):
        x, y = self.given(batch, turn)
        yield from self.jumps(x, y, turn)
        if self.reward:
            yield {"student": {"reward": -self.settings.reward_weight * self.reward(self.drawn(y, turn), y)}}
        if self.fake and "fake" in turn:
            yield from self.scored(self.fake, y, turn)

    def jumps(self, x: Tensor, y: Tensor | None, turn) -> Iterator[dict[str, Terms]]:
        here, there, r = self.jumped(x, y, turn)
        terms = {"jump": pseudo_huber(here, there)}
        if self.adversary:
            ended = (r == 0).to(here)                       # elsewhere a jump ends in noise, and is not judged
            yield {"head": {k: ended * v for k, v in self.adversary.critic(x, here, turn, y, y).items()}}
            terms["adversarial"] = ended * self.adversary.maker(here, turn, y)
        yield {"student": terms}

    def scored(self, fake: Denoiser, y: Tensor | None, turn) -> Iterator[dict[str, Terms]]:
        x = self.drawn(y, turn)
        t, eps = turn.draw(self.score_law), turn.randn(x)
        yield {"student": {"gap": self.settings.score_weight * score_gap(fake, self.teacher, x, t, eps, y)}}
        x = x.detach()
        t, eps = turn.draw(self.score_law), turn.randn(x)
        yield {"fake": {"dsm": denoising_loss(fake, x, t, eps, y)}}

    def drawn(self, y: Tensor | None, turn) -> Tensor:
        """Samples as the student makes them in this stage, with the gradient of the last step."""
        z = self.noise(turn)
        return rollout([self.student], z, self.plans[turn.stage], y, self.jump, lambda _: z, "last")

    def generator(self):
        counts = counts_of(self.settings)
        own = self.settings.student_steps or counts[-1]
        plans = sorted(self.plans.values(), key=lambda plan: len(plan) != own + 1)      # it first, then the others
        answers_x0 = counts[-1] == 1 and not self.settings.told
        return generator_of(averaged(self.mean), self.flow, plans, "renoise" if answers_x0 else self.jump)


def edges_of(s: Settings) -> list[tuple[float, ...]]:
    """Of each stage, from noise to data."""
    return [s.edges] if s.edges else [tuple(uniform_grid(k).tolist()) for k in s.segments]


def counts_of(s: Settings) -> tuple[int, ...]:
    """Segments of each stage."""
    return (len(s.edges) - 1,) if s.edges else s.segments


def require_segments(s: Settings) -> None:
    k, edges = counts_of(s), s.edges
    told = ", ".join(map(str, k))
    if edges and (list(edges) != sorted(set(edges), reverse=True) or (edges[0], edges[-1]) != (1, 0)):
        raise Refusal(f"edges {', '.join(f'{e:g}' for e in edges)}: give falling times from 1 to 0, as 1 0.6 0.2 0")
    if edges and s.segments != Settings.segments:
        raise Refusal("edges and segments: both part the way; give one of them")
    if not k or list(k) != sorted(set(k), reverse=True):
        raise Refusal(f"segments {told or 'of no stage'}: give falling numbers, as 8 4 2 1")
    if bad := [n for n in k if s.grid % n and not edges]:
        raise Refusal(f"grid {s.grid}: {bad[0]} segments do not divide it; give a multiple of all of {told}")
    if s.student_steps and s.student_steps not in k:
        raise Refusal(f"student-steps {s.student_steps}: with segments {told} the student takes one of these")
    require_weight(s.adversarial)
    if not s.reward:
        refuse_given(s, ("reward_weight",), "there is no reward; give --reward FILE.py:FUNCTION, or leave it out")
    if not s.score_weight:
        refuse_given(s, ("score",), "there is no fake score; give --score-weight above 0, or leave it out")
    if s.score_weight and k[-1] != 1:
        raise Refusal(f"score-weight {s.score_weight:g}: it is of the stage of one segment, and the last has {k[-1]}")


Reward = Callable[[Tensor, Tensor | None], Tensor]


def opened(spec: str, shape: tuple[int, ...], classes: int | None) -> Reward:
    """The function, which has given a gradient once."""
    file, colon, name = spec.rpartition(":")
    if not colon or not Path(file).is_file():
        raise Refusal(f"reward {spec}: no such file; give FILE.py:FUNCTION")
    try:
        reward = getattr(module_of(Path(file)), name, None)
    except Exception as error:      # whatever a user's file may do
        raise Refusal(f"reward {spec}: the file cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise Refusal(f"reward {spec}: the file has no function {name!r}")
    x = torch.randn(2, *shape).requires_grad_()
    try:
        told: Any = reward(x, None if classes is None else torch.arange(2) % classes)
    except Exception as error:
        raise Refusal(f"reward {spec}: it fails on two samples of noise: {type(error).__name__}: {error}") from error
    if not isinstance(told, Tensor) or told.shape != (2,):
        raise Refusal(f"reward {spec}: of samples [2, ...] it gives {getattr(told, 'shape', type(told).__name__)}; "
                      "give one number for each, [2]")
    gradient = torch.autograd.grad(told.sum(), x, allow_unused=True)[0] if told.requires_grad else None
    if gradient is None or not bool(gradient.isfinite().all()):
        raise Refusal(f"reward {spec}: no finite gradient comes back from it to the samples; it must be differentiable")
    return cast(Reward, reward)

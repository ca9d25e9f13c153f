"""DisBack: a student that follows its teacher's way down in reverse.

Problem: at the start of score distillation the student's samples lie where the teacher has no density, and its score
there says little about where to go.

Equation (Zhang et al. 2024). First the way down is recorded: a copy F of the teacher learns, by denoising, the samples
of the untouched student, and its weights are kept now and then: P_1, ..., P_K, then the degraded endpoint. Then the
student follows `dmd`'s gap with the kept weights as its targets, backwards, and the teacher last:

    grad_G = E[ w (F(x_t, t, y) - P(x_t, t, y)) dG ],    P = P_K, ..., P_1, T, each for `advance` steps

F goes on from the endpoint and follows the student as ever. With target = teacher the same F begins, and the teacher is
the target at once: the control, which tells the way back from a fake score that starts near the student. Steps of the
record are steps of the run.

Paper: Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation, arXiv 2408.15991.

Expect: no gain on small mixtures, where plain `dmd` needs few updates; see the claim `disback`.
"""

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from stillroom.flows import Denoiser, Denoises, guided
from stillroom.recipes import dmd
from stillroom.settings import Count, Refusal, refuse_given
from stillroom.train import Stage
from stillroom.train.checkpoint import full
from stillroom.train.schedule import ends


@dataclass(frozen=True, kw_only=True)
class Settings(dmd.Settings):
    record: Count = 400
    """Steps, of the whole, in which the way down is recorded."""
    kept: Count = 4
    """Weights kept on the way: whole networks, in memory and in every checkpoint."""
    advance: Count = 100
    """Steps until the next of them is the target."""
    target: Literal["backtrack", "teacher"] = "backtrack"
    """teacher: it is the target at once, and nothing is kept."""


class DisBack(dmd.DMD):
    Settings = Settings

    def __init__(self, settings: Settings, data=None):
        require_way(settings)
        super().__init__(settings, data)
        self.settings = settings
        kept = settings.kept if settings.target == "backtrack" else 0
        self.way = nn.ModuleList(copy.deepcopy(self.fake).requires_grad_(False) for _ in range(kept))
        back = [guided(each, settings.guidance) for each in reversed(self.way) if isinstance(each, Denoiser)]
        self.targets: list[Denoises] = [*back, self.teacher]

    def begun_fake(self) -> Denoiser:
        """A copy of the teacher, wherever the student begins; of the origin, if the teacher has no network."""
        teacher = self.flow.denoiser
        fake = copy.deepcopy(teacher if isinstance(teacher, Denoiser) else self.origin)
        return self.saving(fake.requires_grad_(True))

    def stages(self):
        s, (whole,) = self.settings, super().stages()
        followers = tuple(name for name in self.roles() if name != "student")
        return [Stage("record", s.record, roles=followers, enter=whole.enter),
                Stage("back", s.steps - s.record, fresh=("fake",))]

    def memory(self):
        return {**super().memory(), "way": self.way}

    def after(self, batch, turn):
        """Keeps weights at equal distances on the way down; its end is F itself."""
        every = self.settings.record // (len(self.way) + 1)
        k = turn.step // every
        if turn.stage == "record" and ends(turn.step, every) and k < len(self.way):
            self.way[k].load_state_dict({name: full(value) for name, value in self.fake.state_dict().items()})

    def followed(self, x: Tensor, y: Tensor | None, turn) -> dict[str, Tensor]:
        return {"gap": self.gap(x, y, turn, self.target(turn.step))}

    def target(self, step: int) -> Denoises:
        passed = (step - self.settings.record) // self.settings.advance
        return self.targets[min(passed, len(self.way))]


def require_way(s: Settings) -> None:
    if s.target == "teacher":
        refuse_given(s, ("kept", "advance"), "target teacher keeps nothing on the way down; leave it out")
    if s.fake_lora:
        raise Refusal("fake_lora: the way down is kept as whole networks; leave it out")
    back = s.kept * s.advance if s.target == "backtrack" else 0
    if s.record + back >= s.steps:
        raise Refusal(f"steps {s.steps}: {s.record} of the record and {back} of the way back leave none for the "
                      "teacher itself; take more steps, or a smaller record, kept or advance")
    if back and s.record <= s.kept:
        raise Refusal(f"record {s.record}: weights are kept {s.kept} times on the way; take more steps to record")

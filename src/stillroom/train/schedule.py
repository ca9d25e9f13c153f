"""Which stage a step belongs to, and which roles are due: the one place for "every k steps"."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from stillroom.settings import Refusal, nearest
from stillroom.train.recipe import Role, Stage


def ends(step: int, every: int) -> bool:
    """Whether the step is the last of each `every` of them."""
    return step % every == every - 1


class Schedule:
    def __init__(self, stages: Sequence[Stage], roles: Mapping[str, Role]):
        for stage in stages:
            for name in (*stage.roles, *stage.fresh):
                if name not in roles:
                    raise Refusal(f"stage {stage.name}: no role is called {name!r}{nearest(name, roles)}")
        self.stages, self.roles = list(stages), roles
        self.starts = [0, *accumulate(stage.steps for stage in stages)]

    @property
    def steps(self) -> int:
        return self.starts[-1]

    def entering(self, step: int) -> list[Stage]:
        """Stages that begin at this step: closed-form ones of no steps, then the one that holds it."""
        return [stage for stage, start in zip(self.stages, self.starts[:-1], strict=True) if start == step]

    def at(self, step: int) -> Stage:
        return next(s for s, end in zip(self.stages, self.starts[1:], strict=True) if step < end)

    def takes_part(self, name: str, stage: Stage) -> bool:
        return not stage.roles or name in stage.roles

    def due(self, step: int) -> frozenset[str]:
        """A role of every=k moves at the end of each k steps: a fake score is ahead of its student from the start."""
        stage = self.at(step)
        return frozenset(
            name
            for name, role in self.roles.items()
            if self.takes_part(name, stage) and ends(step, role.every)
        )

    def updates(self, name: str, step: int) -> int:
        """Updates of the role from its last fresh start at or before `step` to its next: the length of its schedule."""
        every = self.roles[name].every
        total = 0
        for stage, start in zip(self.stages, self.starts[:-1], strict=True):
            if name in stage.fresh:
                if start > step:
                    break
                total = 0
            if self.takes_part(name, stage):
                total += (start + stage.steps) // every - start // every
        return total

"""What a recipe of several students needs: flows of some classes, turns as one student sees them, which classes are
whose, and the settings of the recipe that each student follows."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.flows import Denoiser, Flow
from stillroom.nets import build, describe
from stillroom.recipes import find
from stillroom.recipes._students import Distillation, Student, WithData
from stillroom.recipes.flow import heads_of
from stillroom.settings import Refusal, to_mapping


class Among(Flow):
    """A flow, drawn from some of its classes alone."""

    def __init__(self, flow: Flow, classes: Sequence[int]):
        super().__init__(flow.denoiser, flow.shape, flow.sampler, flow.steps, flow.shift)
        self.among = torch.tensor(classes)

    def labels(self, first: int, count: int) -> Tensor:
        return self.among[torch.arange(first, first + count) % len(self.among)]


class Own:
    """A turn as the recipe of one student sees it: roles by its own names for them, steps since it began."""

    def __init__(self, turn, k: int, before: int):
        self._turn, self._k, self.step = turn, k, turn.step - before

    def __contains__(self, role: str) -> bool:
        return named(role, self._k) in self._turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._turn, name)

    def tell(self, name: str, value: Tensor) -> None:
        self._turn.tell(named(name, self._k), value)


def named(role: str, k: int) -> str:
    return f"{role} {k}"


def names(declared: type) -> set[str]:
    return {f.name for f in dataclasses.fields(declared)}


def shared(s: Student) -> dict[str, Any]:
    """What all recipes with students have. An optimizer that nobody named is the inner recipe's own."""
    told = {name: value for name, value in to_mapping(s).items() if name in names(Student)}
    default = next(f for f in dataclasses.fields(Student) if f.name == "student").default_factory
    if callable(default) and s.student == default():
        del told["student"]
    return told


def inner_of(name: str) -> type[Distillation]:
    """A recipe whose student starts from a flow's network and is a generator."""
    recipe = find(name)
    if name == "msd" or not issubclass(recipe, Distillation) or not hasattr(recipe, "generator"):
        raise Refusal(f"inner {name}: makes no generator that starts from a flow's network; give dmd, consistency or "
                      "the like")
    return recipe


def options_of(lines: Sequence[str]) -> Mapping[str, Any]:
    """As a settings file of these lines, without what is said to all students alike."""
    try:
        told = tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"options {' '.join(lines)}: {error}; write them as in a settings file, text in quotes: every=5 "
                      "asked='\"noised\"'") from None
    for name in told:
        if name in names(Student):
            raise Refusal(f"options: {name} is of all students alike: give --{name.replace('_', '-')} itself")
        if name in names(WithData) - {"teacher_samples"}:
            raise Refusal(f"options: {name} is of data, and students take samples of the teacher in their place")
    return told


def routes_of(students: int, classes: int | None, teacher: str) -> tuple[int, ...]:
    """Which student answers for each class: neighbouring classes have one."""
    if classes is None:
        raise Refusal(f"teacher {teacher}: it was trained without labels, by which a student is chosen")
    if classes < students:
        raise Refusal(f"students {students}: the teacher knows {classes} classes, and each student answers for one or "
                      "more")
    if classes % students:
        whole = [k for k in range(1, classes + 1) if classes % k == 0]
        raise Refusal(f"students {students}: {classes} classes do not part into so many equal sets; give "
                      f"{', '.join(map(str, whole[:-1]))} or {whole[-1]}")
    each = classes // students
    return tuple(y // each for y in range(classes))


def resized(net: nn.Module, width: int, depth: int) -> nn.Module:
    """The architecture in another width and depth, where they are given."""
    description = describe(net)
    known = description["arguments"]
    if "width" not in known or "class" not in description:
        raise Refusal(f"width, depth: a {type(net).__name__} cannot be made smaller; leave them out")
    known |= {"width": width or known["width"]}
    deep = "blocks" if "blocks" in known else "depth"
    known |= {deep: depth or known[deep]}
    if "heads" in known and deep == "depth":                    # of transformers; a U-Net's attention has its own
        known["heads"] = heads_of(known["width"])
    return build(description)


def require_like(student: nn.Module | None, other: Denoiser, inner: str) -> None:
    """A student that its recipe made of another kind of network, or put something around, cannot be made smaller."""
    if not isinstance(student, Denoiser) or describe(student.net) != describe(other.net):
        raise Refusal(f"width, depth: {inner} makes its student in a way of its own; leave them out")

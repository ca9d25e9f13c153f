"""The seam between methods and machinery: what a recipe says, and nothing of how it is carried out."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stillroom.settings import Optimizer, Run

if TYPE_CHECKING:
    from stillroom.train.turn import Turn

Terms = Mapping[str, Tensor]
Losses = Mapping[str, Terms] | Iterator[Mapping[str, Terms]]
"""{role: {term: scalar or [B]}}, whole or in parts."""


class Average(nn.Module):
    """An exponential average of a module's weights, which a recipe may read and only the trainer advances.

    The decay of the n-th update is min(decay, (1+n)/(10+n)), so that a short run is not an average of its start.
    `learned` is a regular expression on names, as a role's `trains`: other parameters are the module's own, held once.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float = 0.999, learned: str = ""):
        super().__init__()
        shared = {id(p): p for name, p in module.named_parameters() if not re.search(learned, name)}
        self.module = copy.deepcopy(module, shared).requires_grad_(False).eval()
        self.decay = decay
        self.followed: tuple[nn.Module, Sequence, Sequence, Sequence, Sequence] | None = None
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        n = int(self.updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        if self.followed is None or self.followed[0] is not module:
            # Kept, because finding the parameters of a small net takes longer than averaging them.
            pairs = zip(self.module.parameters(), module.parameters(), strict=True)
            mine, new = zip(*((a, p) for a, p in pairs if a is not p), strict=True)
            self.followed = (module, mine, new, list(self.module.buffers()), list(module.buffers()))
        _, mine, new, my_buffers, new_buffers = self.followed
        torch._foreach_lerp_(mine, new, 1 - decay)  # pyright: ignore
        if my_buffers:
            torch._foreach_copy_(my_buffers, new_buffers)  # pyright: ignore
        self.updates += 1


def mean_backward(terms: Terms, parameters: Sequence[Tensor] | None, turn: "Turn") -> None:
    """Gradients of the sum of the terms' means, over this role's parameters alone."""
    means = [term.mean() for term in terms.values()]
    shares = [torch.full_like(mean, 1 / turn.micros) for mean in means]
    torch.autograd.backward(means, shares, inputs=parameters, retain_graph=turn.keeps_graph)


@dataclass(frozen=True)
class Role:
    """One thing that learns."""

    module: nn.Module
    optimizer: Optimizer
    trains: str = ""  # a regular expression on parameter names; the others stay as they are
    every: int = 1  # takes its turn on every k-th step, at the end of each k
    average: Average | None = None
    backward: Callable[[Terms, Sequence[Tensor] | None, "Turn"], None] = mean_backward


def parts_of(losses: Losses) -> Iterator[dict[str, Terms]]:
    """A dictionary for each part; nothing here holds on to what the caller takes out of it."""
    if isinstance(losses, Mapping):
        whole, losses = dict(losses), iter(())
        yield whole
    else:
        yield from map(dict, losses)


def nothing() -> None:
    """A stage that needs no preparation."""


@dataclass(frozen=True)
class Stage:
    """Part of a run. `enter` runs before its first step; with steps=0 it is all the stage does (a closed form)."""

    name: str
    steps: int
    roles: tuple[str, ...] = ()  # who may take turns; () means all
    enter: Callable[[], None] = nothing
    fresh: tuple[str, ...] = ()  # roles whose optimizer and average start anew here
    best: str = ""  # "role/term" whose lowest mean marks the checkpoint to keep


@dataclass(frozen=True)
class Ref:
    """A model that a product stands on, by place and by hash of its weights."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Product:
    """What a run leaves for its user. The part named like the kind is what `stillroom.load` returns."""

    kind: str
    parts: Mapping[str, nn.Module | Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)
    base: Ref | None = None


class Recipe:
    """The mathematics of one method. Advances no optimizer, average, file or counter.

    A recipe of the command line has `Settings`, a frozen dataclass extending `settings.Run`, and is constructed as
    `Recipe(settings, **sources)` with one source per name in `inputs`.
    """

    Settings: ClassVar[type[Run]] = Run
    inputs: ClassVar[tuple[str, ...]] = ()  # () makes "needs no data" structural

    @classmethod
    def settled(cls, settings: Any) -> Any:
        """The settings, with what was left open decided by what they name: a codec's size, above all."""
        return settings

    @classmethod
    def prepare(cls, settings: Any, sources: Mapping[str, Any], note: Callable[[str], None]) -> Mapping[str, Any]:
        """What is made of the data before anything else, a cache of a teacher's answers above all. One process calls
        it first; the others find its work done."""
        return sources

    def spent(self) -> Mapping[str, int]:
        """Evaluations that `prepare` took, by whose they were; those of steps are counted as they are made."""
        return {}

    def roles(self) -> Mapping[str, Role]:
        return {}

    def stages(self) -> Sequence[Stage]:
        raise NotImplementedError

    def losses(self, batch: Mapping[str, Any], turn: "Turn") -> Losses:
        """For the roles in turn. What shares no graph may be yielded in parts: gradients of a part are taken, and its
        graph is gone, before the next is computed; weights move after the last."""
        raise NotImplementedError

    def check(self, batch: Mapping[str, Any]) -> None:
        """Before the first step: refuse what cannot work, an untrained teacher above all."""

    def after(self, batch: Mapping[str, Any], turn: "Turn") -> None:
        """Once per step, when all roles have moved: push a bank, clamp images."""

    def memory(self) -> Mapping[str, nn.Module | Tensor]:
        """What else a checkpoint must hold. Tensors are restored in place."""
        return {}

    def preview(self) -> Mapping[str, Tensor]:
        """Pictures for people: images [N, C, H, W] in [-1, 1], or points [N, 2], by name."""
        return {}

    def product(self) -> Product:
        raise NotImplementedError

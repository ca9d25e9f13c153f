"""One step as a recipe sees it: who moves, and the noise of this step.

Noise is a function of (seed, step, which draw), drawn for the whole global batch; a rank and a micro-batch take their
rows. So resuming, accumulating and adding processes change nothing.
"""

import torch
from torch import Tensor

from stillroom.paths import Law
from stillroom.settings import Refusal, seed_of
from stillroom.train.world import World


class Noise:
    """The draws of one step, kept while its micro-batches ask for their rows."""

    def __init__(self, seed: int, step: int, device: torch.device):
        self.seed, self.step, self.device = seed, step, device
        self.drawn: dict[int, Tensor] = {}

    def draw(self, n: int, sampler, shape: tuple[int, ...]) -> Tensor:
        if n not in self.drawn:
            generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, self.step, n))
            self.drawn[n] = sampler(shape, generator=generator, device=self.device)
        if self.drawn[n].shape != shape:
            raise ValueError(f"draw {n} of step {self.step} has another shape in another micro-batch")
        return self.drawn[n]


class Turn:
    def __init__(self, *, step: int, stage: str, roles: frozenset[str], batch: int, micros: int, world: World,
                 noise: Noise, micro: int | None, watched: bool):
        self.step, self.stage, self.micros = step, stage, micros
        self.watched = watched  # this step ends a row of the metrics: time for measurements that cost something
        self.told: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self.keeps_graph = False  # set by the trainer while other roles still need the graph
        self._roles, self._batch, self._world, self._noise, self._micro = roles, batch, world, noise, micro
        self._draws = 0

    def __contains__(self, role: str) -> bool:
        return role in self._roles

    @property
    def batch(self) -> int:
        """Samples that this call handles: one micro-batch in `losses`, all of them in `after`."""
        return self._batch // (self._world.size * (1 if self._micro is None else self.micros))

    def rows(self, count: int, rank: int | None = None) -> Tensor:
        """Which of `count` global samples this call handles: micro m of rank r takes slice m * world + r."""
        rank = self._world.rank if rank is None else rank
        slices = torch.arange(count).reshape(self.micros, self._world.size, -1)[:, rank]  # [micros, b]
        return slices.flatten() if self._micro is None else slices[self._micro]

    def _draw(self, sampler, shape: tuple[int, ...] | Tensor, shared: bool) -> Tensor:
        shape = tuple(shape.shape) if isinstance(shape, Tensor) else tuple(shape)
        n, self._draws = self._draws, self._draws + 1
        if shared:
            return self._noise.draw(n, sampler, shape)
        whole = shape[0] * self._world.size * (1 if self._micro is None else self.micros)
        drawn = self._noise.draw(n, sampler, (whole, *shape[1:]))
        if whole == shape[0]:  # one process and one micro-batch take all rows; a copy, as rows taken out are one
            return drawn.clone()
        return drawn[self.rows(whole).to(self._noise.device)]

    def randn(self, like: tuple[int, ...] | Tensor, shared: bool = False) -> Tensor:
        """Normal noise for this call's samples; shared: the same for every micro-batch and process."""
        return self._draw(torch.randn, like, shared)

    def rand(self, like: tuple[int, ...] | Tensor, shared: bool = False) -> Tensor:
        return self._draw(torch.rand, like, shared)

    def draw(self, law: Law, count: int | None = None) -> Tensor:
        """[B] times from a time law, none at its very end: a draw of exactly 0, one in 2^24, would ask for clean data,
        where some paths' derivatives are infinite."""
        return law.quantile(self.rand((self.batch if count is None else count,)).clamp(min=2**-25))

    def tell(self, name: str, value: Tensor) -> None:
        """A measurement that is no loss, for the metrics: `group/what`."""
        self.told[name] = value.detach()

    def note(self, text: str) -> None:
        """A line for people, said once."""
        self.notes.append(text)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over processes, without gradient."""
        return self._world.mean(x.detach())

    def gather(self, x: Tensor) -> Tensor:
        """All processes' samples in the order of the global batch, with gradient."""
        if self._micro is not None and self.micros > 1:
            raise Refusal("this recipe couples the samples of a batch: set accumulate = 1, or use more processes")
        if self._world.size == 1:
            return x
        parts = self._world.gather(x)
        order = torch.cat([self.rows(len(parts), rank) for rank in range(self._world.size)])
        return parts[order.argsort().to(x.device)]

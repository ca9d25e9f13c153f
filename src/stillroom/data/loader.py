"""The batches of a run, prepared ahead in threads. What step k yields depends on (source, seed, k) and the cut into
micro-batches and ranks, never on threads or on where the run was resumed."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch

from stillroom.data.batch import Batch, Item, Source, Stream
from stillroom.data.order import runs
from stillroom.settings import Refusal, seed_of


class Loader:
    """`at(step)`: this rank's slice of the global batch, one `Batch` per micro-batch.

    Micro-batch m of rank r is the slice that starts at (m * world + r) * b with b = batch / (micros * world): so each
    micro-batch of all ranks together is contiguous, as one process would have cut it.
    """

    def __init__(
        self, source: Source | Stream, *, seed: int, batch: int, micros: int = 1, rank: int = 0, world: int = 1,
        start: int = 0, cursor: dict | None = None, workers: int = 2, ahead: int = 2,
    ):
        if batch < 1 or batch % (micros * world):
            raise Refusal(
                f"batch {batch} cannot be cut into {micros} micro-batches on {world} processes: "
                f"make it a multiple of {micros * world}"
            )
        self.source, self.seed, self.batch = source, seed, batch
        self.micros, self.rank, self.world = micros, rank, world
        self._part = batch // (micros * world)
        if getattr(source, "in_memory", False):
            workers = 0  # a gather is faster than handing it to another thread
        self._ahead = max(ahead, workers) if workers else 0
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None
        self._ready: dict[int, list[Future[Batch]]] = {}
        self._tape = None
        if isinstance(source, Stream):
            if start > 0 and not cursor:
                raise Refusal(f"{source.name}: to start at step {start} a stream needs the cursor of the step before")
            self._tape = _Tape(source.iterate(cursor or None, seed), batch, start, threaded=workers > 0)
        elif len(source) < 1:
            raise Refusal(f"{source.name}: holds no items")

    def at(self, step: int) -> list[Batch]:
        if self._tape is not None:
            self._tape.turn_to(step)
        if self._pool is None:
            return [self._micro(step, m) for m in range(self.micros)]
        for k in [k for k in self._ready if not step <= k <= step + self._ahead]:
            for future in self._ready.pop(k):
                future.cancel()
        for k in range(step, step + self._ahead + 1):
            if k not in self._ready:
                if self._tape is not None:
                    self._tape.ask(k)
                self._ready[k] = [self._pool.submit(self._micro, k, m) for m in range(self.micros)]
        return [future.result() for future in self._ready.pop(step)]

    def cursor(self, step: int) -> dict:
        """JSON from which a new Loader goes on after `step`; {} where the step number alone is enough."""
        return {} if self._tape is None else self._tape.cursor(step)

    def close(self) -> None:
        for pool in (self._pool, self._tape and self._tape.pool):
            if pool:
                pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _micro(self, step: int, micro: int) -> Batch:
        first = (micro * self.world + self.rank) * self._part
        if self._tape is not None:
            assert isinstance(self.source, Stream)
            return self.source.decode(self._tape.read(step), range(first, first + self._part), seed_of(self.seed, step))
        source = cast(Source, self.source)      # no isinstance: of a protocol it takes longer than a fetch from memory
        # The key is the epoch's: an item that comes twice in a batch larger than the set is augmented twice.
        pieces = runs(len(source), self.seed, step * self.batch + first, self._part)
        batches = [source.fetch(indices, seed_of(self.seed, epoch)) for epoch, indices in pieces]
        if len(batches) == 1:
            return batches[0]
        labels = [b.y for b in batches if b.y is not None]
        return Batch(torch.cat([b.x for b in batches]), torch.cat(labels) if labels else None)


class _Tape:
    """Global batches of a stream, read strictly in order by one thread, with the cursor after each."""

    def __init__(self, items: Iterator[Item], batch: int, start: int, threaded: bool):
        self._items, self._batch, self._next, self._due = items, batch, start, start
        self._futures: dict[int, Future[list[Item]]] = {}
        self._cursors: dict[int, dict] = {}
        self.pool = ThreadPoolExecutor(1, "read") if threaded else None
        self._last: tuple[int, list[Item]] = (-1, [])

    def turn_to(self, step: int) -> None:
        if step != self._due:
            raise ValueError(f"a stream is read in order: step {self._due} comes next, not {step}")
        self._due += 1
        for k in [k for k in self._cursors if k < step - 8]:
            del self._cursors[k]
        for k in [k for k in self._futures if k < step]:
            del self._futures[k]

    def read(self, step: int) -> list[Item]:
        if self.pool is None:
            if self._last[0] != step:
                self._last = (step, self._take(step))
            return self._last[1]
        return self._futures[step].result()

    def ask(self, step: int) -> None:
        if self.pool is not None and step not in self._futures:
            self._futures[step] = self.pool.submit(self._take, step)

    def _take(self, step: int) -> list[Item]:
        items = [next(self._items) for _ in range(self._batch)]
        self._cursors[step] = items[-1].cursor
        return items

    def cursor(self, step: int) -> dict:
        if step not in self._cursors:
            raise ValueError(f"the cursor of step {step} is not known: it was not read, or long ago")
        return self._cursors[step]

"""Trial steps that change nothing: how fast each precision is here, and what a run would cost."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch

from stillroom.data import Batch
from stillroom.train.loop import Trainer
from stillroom.train.recipe import Stage, nothing
from stillroom.train.turn import Noise

Micros = Sequence[Mapping[str, Batch]]
Batches = Callable[[int], Micros]
ROUNDS = 3
LEAST_STEPS, LEAST_SECONDS = 10, 3.0
WORTH = 0.8
"""bfloat16 is taken only when its step takes at most this share of a float32 step."""


def _seconds(trainer: Trainer, micros: Micros, bfloat16: bool) -> float:
    """Forward and backward of one micro-batch with every role of the first stage in turn."""
    stage = trainer.schedule.at(0)
    roles = frozenset(n for n in trainer.roles if trainer.schedule.takes_part(n, stage))
    noise = Noise(trainer.settings.seed, 0, trainer.world.device)
    trainer.autocast = bfloat16
    _wait(trainer)
    start = time.perf_counter()
    turn = trainer.make_turn(0, roles, noise, 0)
    for losses in trainer.forward(micros[0], turn, 0):
        trainer.backward(losses, turn)
    _wait(trainer)
    spent = time.perf_counter() - start
    for learner in trainer.learners.values():
        learner.optimizer.zero_grad(set_to_none=True)
    return spent


def _wait(trainer: Trainer) -> None:
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()


def precision(trainer: Trainer, micros: Micros) -> tuple[str, str]:
    """The faster precision, and a note for people. Interleaved, medians, after one warm-up each."""
    modules = {n: role.module for n, role in trainer.roles.items()}
    buffers = [(b, b.clone()) for module in modules.values() for b in module.buffers()]
    times: dict[bool, list[float]] = {False: [], True: []}
    for i in range(ROUNDS + 1):
        for bfloat16 in (False, True):
            spent = _seconds(trainer, micros, bfloat16)
            if i > 0:
                times[bfloat16].append(spent)
    with torch.no_grad():
        for b, before in buffers:
            b.copy_(before)
    slow, fast = statistics.median(times[False]), statistics.median(times[True])
    chosen = trainer.world.same("bfloat16" if fast < WORTH * slow else "float32")
    trainer.autocast = chosen == "bfloat16"
    return chosen, f"precision: {chosen} (a step takes {1e3 * slow:.1f} ms in float32, {1e3 * fast:.1f} ms in bfloat16)"


class Timed(NamedTuple):
    """One stage, and what a step of it takes."""

    stage: Stage
    seconds: float


@dataclass(frozen=True)
class Plan:
    parameters: dict[str, int]
    memory_gib: float
    stages: list[Timed]
    begins: list[str]
    """Stages that do something as they begin, which is not counted: it may draw or measure for hours."""
    precision: str

    @property
    def steps(self) -> int:
        return sum(it.stage.steps for it in self.stages)

    @property
    def total_seconds(self) -> float:
        return sum(it.stage.steps * it.seconds for it in self.stages)


def peak_memory(device: torch.device) -> float:
    """GiB so far: of the accelerator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def plan(trainer: Trainer, batches: Batches, precision_name: str) -> Plan:
    """Real steps of every stage, in memory only.

    batches: step -> that step's micro-batches. Memory is the process's peak so far: code, data and model.
    """
    stream = map(batches, count())
    schedule = trainer.schedule
    stages = [Timed(stage, _seconds_of(trainer, stage, start, stream))
              for stage, start in zip(schedule.stages, schedule.starts[:-1], strict=True) if stage.steps]
    begins = [stage.name for stage in schedule.stages if stage.enter is not nothing]
    counts = {n: sum(p.numel() for p in w.parameters.values()) for n, w in trainer.learners.items()}
    return Plan(counts, peak_memory(trainer.world.device), stages, begins, precision_name)


def _seconds_of(trainer: Trainer, stage: Stage, start: int, stream: Iterator[Micros]) -> float:
    """Of a step: whole cycles, with every role's turn in them, for as long as a watch needs to be true and what is
    prepared ahead to be used up. The first is left out."""
    cycle = max((role.every for role in trainer.roles.values()), default=1)
    trainer.step = start
    trainer.train_step(next(stream))
    _wait(trainer)
    begun, done = time.perf_counter(), 0
    while trainer.world.same(done < LEAST_STEPS or time.perf_counter() - begun < LEAST_SECONDS):
        for _ in range(cycle):
            done += 1
            trainer.step = start + done % stage.steps
            trainer.train_step(next(stream))
        _wait(trainer)
    return (time.perf_counter() - begun) / done

"""Carrying a claim out: every arm with every seed, then the verdict, then one JSON file that says it all."""

import atexit
import importlib.metadata
import json
import math
import multiprocessing
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stillroom import train
from stillroom.claims import find
from stillroom.claims.claim import Claim, verdict
from stillroom.claims.kept import Kept, Outcome, Task, part_of
from stillroom.settings import Refusal
from stillroom.settings.files import read_json, write_atomically
from stillroom.train.asked import asked_to_stop
from stillroom.train.folder import machine, now, read_rows
from stillroom.train.loop import Interrupted


def run_in(folder: Path, recipe: type, given: Mapping[str, Any] | None = None, **settings: Any) -> Path:
    """A run of the recipe. Always on the CPU and in float32, so that the figures are those of any laptop."""
    resolved = recipe.Settings(out=folder, device="cpu", precision="float32", **settings)
    try:
        return train.start(recipe, resolved, recipe.__name__, given, watch=train.Silent())
    except Interrupted:     # its text names a folder to resume that is about to go
        raise KeyboardInterrupt from None


class Learned(NamedTuple):
    product: train.Product
    record: dict[str, Any]
    """What the run tells of itself, run.json."""
    rows: list[dict[str, Any]]
    """metrics.jsonl"""

    @property
    def model(self) -> Any:
        """The part of the product that is what its kind says."""
        return self.product.parts[self.product.kind]

    @property
    def evaluations(self) -> int:
        """In training, of all generators and denoisers, for a sample each."""
        return sum(self.record["evaluations"].values())


def learned(recipe: type, given: Mapping[str, Any] | None = None, **settings: Any) -> Learned:
    """What such a run leaves; its folder goes."""
    with tempfile.TemporaryDirectory(prefix="stillroom-claim-") as folder:
        out = run_in(Path(folder) / "run", recipe, given, **settings)
        return Learned(train.load_product(out), read_json(out / "run.json"), read_rows(out / "metrics.jsonl"))


@cache
def shared_place() -> Path:
    """For runs that several arms of this process start from; it goes with the process."""
    folder = tempfile.mkdtemp(prefix="stillroom-claim-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


EVALUATIONS = "millions of evaluations"
"""What a claim calls those that an arm took in training."""

LOOK = 0.2
"""Seconds between looks for whether to stop."""


def idle(recipe: type, *roles: str) -> type:
    """The recipe with roles that have no reason to move, which is what a null arm is."""

    class Idle(recipe):
        def losses(self, batch, turn):
            for part in train.parts_of(super().losses(batch, turn)):
                yield {r: {name: 0 * x if r in roles else x for name, x in terms.items()} for r, terms in part.items()}

    return Idle


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that it too leaves no process and no folder behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Nets this small gain nothing from a second thread, and lose tenfold where another process uses that core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(claim: Claim, task: Task, quick: bool) -> Outcome:
    start = time.perf_counter()
    with one_thread():
        metrics = claim.measure(*task, quick)
    # JSON has no word for nan; None is what the verdict refuses
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return finite, time.perf_counter() - start


def claim_on(name: str, data: str) -> Claim:
    """The claim of a name, on the user's data where some is given."""
    claim = find(name)
    if data and claim.on is None:
        raise Refusal(f"claim {name} takes no data; leave out --data")
    return claim.on(data) if data and claim.on else claim


def timed_by_name(name: str, data: str, task: Task, quick: bool) -> Outcome:
    """In a process of its own, which finds the claim again: functions of a claim do not travel."""
    return timed(claim_on(name, data), task, quick)


def write_in(folder: str) -> None:
    tempfile.tempdir = folder


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """However the block ends, its processes end at once, and the folders that they wrote go."""
    with (tempfile.TemporaryDirectory(prefix="stillroom-claim-") as folder,
          ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), write_in, (folder,)) as pool):
        try:
            yield pool
        finally:
            for process in list((pool._processes or {}).values()):
                process.kill()      # SIGTERM would end one training, and begin what is next


def submitted(pool: ProcessPoolExecutor, claim: Claim, data: str, tasks: Sequence[Task],
              quick: bool) -> dict[Future[Outcome], Task]:
    """Workers inherit that Ctrl-C is blocked: it is this process that answers it, for all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(timed_by_name, claim.name, data, task, quick): task for task in tasks}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def carried_out(claim: Claim, data: str, tasks: Sequence[Task], quick: bool,
                jobs: int) -> Generator[tuple[Task, Outcome], None, None]:
    """(task, what came of it), as they end. Each is a function of its seed alone, whichever process it runs in.
    The first that fails ends the others."""
    if jobs == 1:
        yield from ((task, timed(claim, task, quick)) for task in tasks)
        return
    try:
        # Raised wherever it comes, Ctrl-C may leave a lock of the pool taken, for which its end then waits for ever.
        with asked_to_stop() as asked, workers(jobs) as pool:
            left = submitted(pool, claim, data, tasks, quick)
            while left:
                ended, _ = wait(left, LOOK, return_when=FIRST_COMPLETED)
                for future in sorted(ended, key=lambda f: f.exception() is not None):   # a failure last, to lose none
                    yield left.pop(future), future.result()
                if asked():
                    raise KeyboardInterrupt
    except BrokenProcessPool:
        raise Refusal(f"claim {claim.name}: one of its {jobs} processes was killed, perhaps for want of memory; the "
                      "same command goes on, and takes less memory with a smaller --jobs") from None


def run(claim: Claim, seeds: Sequence[int], quick: bool = False, jobs: int = 1,
        tell: Callable[[str], None] = print, data: str = "", path: Path | None = None) -> dict[str, Any]:
    """`path`: of the result that this writes. What was carried out is kept beside it until then."""
    tasks = [(a, s) for a in claim.arms for s in seeds]
    kept = path and Kept(part_of(path, quick, data), claim=claim.name, quick=quick, data=data)
    done = kept.read() if kept else {}
    if before := [task for task in tasks if task in done]:
        tell(f"{claim.name}: {len(before)} of {len(tasks)} arms and seeds were carried out before; going on")
    left = [task for task in tasks if task not in done]
    try:
        with closing(carried_out(claim, data, left, quick, jobs)) as outcomes:
            for (arm, seed), (metrics, seconds) in outcomes:
                done[arm, seed] = metrics, seconds
                if kept:
                    kept.add((arm, seed), done[arm, seed])
                told = "  ".join(f"{n} {'not finite' if v is None else f'{v:.3g}'}" for n, v in metrics.items())
                tell(f"{claim.name}: {arm}, seed {seed}, {seconds:.0f} s: {told}")
    except KeyboardInterrupt:
        if kept:
            tell(f"{claim.name}: stopped; the same command goes on with the arms and seeds that are left")
        raise
    values = {arm: {seed: done[arm, seed][0] for seed in seeds} for arm in claim.arms}
    seconds = {arm: round(sum(done[arm, seed][1] for seed in seeds), 1) for arm in claim.arms}
    judged = verdict(claim, values)
    flag = (" --quick" if quick else "") + (" --data DATA" if data else "")
    result = {
        "claim": claim.name,
        "verdict": judged.pop("verdict"),
        "reason": judged.pop("reason"),
        "quick": quick,
        "seeds": list(seeds),
        "arms": dict(claim.arms),
        "values": values,
        **judged,
        "budget": claim.quick if quick else claim.budget,
        "seconds": seconds,  # all seeds, one thread
        "jobs": jobs,
        "machine": machine(torch.device("cpu")),
        "stillroom": importlib.metadata.version("stillroom"),
        "date": now(),
        "command": f"stillroom claims run {claim.name}{flag} --seeds {','.join(map(str, seeds))}",
    }
    if path and kept:
        write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        kept.forget()
    return result


def ready(path: Path) -> None:
    """Before an hour's work, not after it: the place for the result exists."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"{path}: no folder can be made there ({error.strerror}); choose another --out") from None
    if path.is_dir():
        raise Refusal(f"{path} is a folder; give a file, or a folder for NAME.json")

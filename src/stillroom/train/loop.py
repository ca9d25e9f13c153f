"""The loop. It knows no method: it asks a recipe for losses and carries them out, exactly and resumably.

One step k, over micro-batches m:  losses(batch_km, turn_km) -> each due role's backward over its own parameters, part
by part of the losses -> gradients averaged role by role over processes -> finite? -> clip, step, average ->
after(batch_k).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.data import Batch, Loader, Source
from stillroom.flows import Tally
from stillroom.flows.tally import asked_in
from stillroom.nets.offload import offload
from stillroom.settings import Refusal, Run, seed_of
from stillroom.train import checkpoint
from stillroom.train.asked import asked_to_stop
from stillroom.train.card import readme
from stillroom.train.folder import RunFolder, resuming
from stillroom.train.learner import Learner, freeze_rest
from stillroom.train.pictures import save_previews
from stillroom.train.product import save_product
from stillroom.train.reach import Reach, require_connected
from stillroom.train.recipe import Recipe, Role, Terms, mean_backward, parts_of
from stillroom.train.schedule import Schedule
from stillroom.train.shard import gathered, is_sharded, shard
from stillroom.train.turn import Noise, Turn
from stillroom.train.watch import Silent, Watch
from stillroom.train.world import World

SYNC_EVERY = 10
"""Steps between looks at the losses on an accelerator: each look waits for the device."""


class Diverged(Refusal):
    """A loss or a gradient was not finite."""


class Interrupted(Refusal):
    """The user asked the run to stop; it stopped between two steps, with a checkpoint."""


def join(micros: Sequence[Batch]) -> Batch:
    if len(micros) == 1:
        return micros[0]
    x, y = zip(*micros, strict=True)
    return Batch(torch.cat(x), None if y[0] is None else torch.cat(y))


def reseed(device: torch.device, seed: int) -> None:
    """What torch.manual_seed does here, without its call on every kind of accelerator there is (0.2 ms on a CPU)."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def tally_of(recipe: Recipe, roles: Mapping[str, Role]) -> Tally:
    """Of every network that a recipe holds: by its role, by `average`, or, where it neither learns nor follows, by
    `teacher`."""
    tally = Tally()
    for name, role in roles.items():
        tally.watch(name, role.module)
    for role in roles.values():
        if role.average is not None:
            tally.watch("average", role.average)
    for part in held_in(recipe):
        tally.watch("teacher", part)
    tally.counts.update(recipe.spent())
    return tally


def held_in(recipe: Recipe) -> Iterator[nn.Module]:
    """What it holds itself, and what recipes hold that it is made of."""
    for part in vars(recipe).values():
        if isinstance(part, nn.Module):
            yield part
        for inner in part if isinstance(part, list) else []:
            if isinstance(inner, Recipe):
                yield from held_in(inner)


def alone(recipe: Recipe, learners: Mapping[str, Learner]) -> bool:
    """Nothing but one role's parameters takes a gradient. Autograd that is not told where to stop is then as exact, and
    sooner done (0.2 ms on a net of 60 tensors)."""
    mine = {id(p) for learner in learners.values() for p in learner.parameters.values()}
    held = (p for part in held_in(recipe) for p in part.parameters())
    usual = all(learner.role.backward is mean_backward for learner in learners.values())
    return usual and len(learners) == 1 and all(id(p) in mine for p in held if p.requires_grad)


def offload_frozen(recipe: Recipe, roles: Mapping[str, Role]) -> None:
    """Networks that share no weight with what learns, or follows."""
    modules = [m for role in roles.values() for m in (role.module, role.average) if m is not None]
    moving = {id(p) for module in modules for p in module.parameters()}
    held = {id(net): net for part in held_in(recipe) for net in asked_in(part)}
    frozen = [net for net in held.values() if (own := {id(p) for p in net.parameters()}) and not own & moving]
    if not frozen:
        raise Refusal("offload: this run holds no network whose weights are neither learned nor those of one that "
                      "learns; leave it out")
    for net in frozen:
        offload(net)


def means_of(losses: Mapping[str, Terms]) -> dict[str, Tensor]:
    return {f"{name}/{term}": value.detach().float().mean()
            for name, terms in losses.items() for term, value in terms.items()}


class Trainer:
    def __init__(self, recipe: Recipe, settings: Run, sources: Mapping[str, Source], world: World,
                 folder: RunFolder | None = None, watch: Watch | None = None):
        self.recipe, self.settings, self.sources, self.world = recipe, settings, sources, world
        self.folder, self.watch = folder, watch or Silent()
        self.roles = dict(recipe.roles())
        self.schedule = Schedule(recipe.stages(), self.roles)
        self.micros = settings.accumulate
        if settings.batch % (self.micros * world.size):
            raise Refusal(
                f"batch = {settings.batch} does not divide into {self.micros} micro-batches on {world.size} processes"
            )
        if settings.shard:
            shard(self.roles, world)
        self.learners = {n: Learner(n, role, self.schedule.updates(n, 0)) for n, role in self.roles.items()}
        freeze_rest(self.roles.values(), [p for w in self.learners.values() for p in w.parameters.values()])
        apart = not alone(recipe, self.learners)
        self.inputs = {n: list(w.parameters.values()) if apart else None for n, w in self.learners.items()}
        self.autocast = settings.precision == "bfloat16"
        self.checkpoint_every = settings.checkpoint_every or max(1, min(1000, self.schedule.steps // 8))
        self.step, self.seconds = 0, 0.0
        self.window: dict[str, list[float]] = {}  # sum and count of every term since the last row
        self.since_checkpoint: dict[str, list[float]] = {}  # the same, for the stage's best metric
        self.reach = Reach()
        self.tally = tally_of(recipe, self.roles)
        self.asked_before = Counter[str]()      # evaluations of all processes, before this session
        if settings.offload:
            offload_frozen(recipe, self.roles)
        self.pending: list[tuple[int, list[str], Tensor]] = []
        self.noted: set[str] = set()

    @property
    def name(self) -> str:
        """The recipe's, as the command line knows it. Only the first process may have its record on its disk yet."""
        is_told = self.folder is not None and self.world.first
        return self.folder.read_info()["recipe"] if is_told else type(self.recipe).__name__     # pyright: ignore

    # ---- one step ----

    def make_turn(self, step: int, roles: frozenset[str], noise: Noise, micro: int | None) -> Turn:
        return Turn(step=step, stage=self.schedule.at(step).name, roles=roles, batch=self.settings.batch,
                    micros=self.micros, world=self.world, noise=noise, micro=micro, watched=self.ends_row(step))

    def ends_row(self, step: int) -> bool:
        return (step + 1) % self.settings.log_every == 0 or step + 1 == self.schedule.steps

    @property
    def checkpoint_due(self) -> bool:
        return self.step % self.checkpoint_every == 0 or self.step == self.schedule.steps

    def forward(self, batch: Mapping[str, Batch], turn: Turn, micro: int) -> Iterator[dict[str, Terms]]:
        """The losses in their parts; whoever takes one leaves nothing of it before asking for the next."""
        # Dropout and the like draw from torch's own generator: it too is a function of (seed, step, micro, rank).
        reseed(self.world.device, seed_of(self.settings.seed, "network", turn.step, micro, self.world.rank))
        due, answered = {name for name in self.roles if name in turn}, set()
        with self.cast():
            parts = parts_of(self.recipe.losses(batch, turn))
        while True:
            with self.cast():
                losses = next(parts, None)
            answered |= set(losses or ())
            if not answered <= due or (losses is None and answered != due):
                raise Refusal(f"losses of step {turn.step} answer for {sorted(answered)}, "
                              f"but in turn are {sorted(due)}")
            if losses is None:
                return
            require_connected(losses, turn.step)
            yield losses

    def cast(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def backward(self, losses: dict[str, Terms], turn: Turn) -> None:
        """Takes them out one by one: a graph that no later role needs goes with the last word of it."""
        for name in list(losses):
            learner, terms = self.learners[name], losses.pop(name)
            turn.keeps_graph = bool(losses)
            if self.settings.shard:
                self.backward_alone(learner, terms, turn)
            else:
                learner.role.backward(terms, self.inputs[name], turn)

    def backward_alone(self, learner: Learner, terms: Terms, turn: Turn) -> None:
        """FSDP2 hangs gradients on gathered copies, which `inputs` cannot name: what leaks to other roles is undone."""
        mine = {id(p) for p in learner.parameters.values()}     # another role may learn them in its own turns
        others = [p for w in self.learners.values() for p in w.parameters.values() if id(p) not in mine]
        before = [p.grad for p in others]
        for p in others:
            p.grad = None
        with gathered(self.roles.values()):
            learner.role.backward(terms, None, turn)
        for p, gradient in zip(others, before, strict=True):
            p.grad = gradient

    def train_step(self, micros: Sequence[Mapping[str, Batch]]) -> None:
        due = self.schedule.due(self.step)
        noise = Noise(self.settings.seed, self.step, self.world.device)
        totals: dict[str, list[Tensor]] = {}    # one of each micro-batch
        for m, batch in enumerate(micros):
            turn = self.make_turn(self.step, due, noise, m)
            for losses in self.forward(batch, turn, m):
                if m == 0 and not self.settings.shard:
                    self.reach.probe(losses, self.learners, self.step)
                for key, value in means_of(losses).items():
                    totals.setdefault(key, []).append(value)
                self.backward(losses, turn)
            for key, value in turn.told.items():
                totals.setdefault(key, []).append(value.float().mean().to(self.world.device))
            self.say(turn.notes)
        learners = [self.learners[n] for n in self.roles if n in due]
        for learner in learners:
            self.world.average_gradients([p for p in learner.parameters.values() if not is_sharded(p)])
        norms = {learner.name: learner.gradient_norm() for learner in learners}
        means = [parts[0] if len(parts) == 1 else torch.stack(parts).mean() for parts in totals.values()]
        if means and self.world.size > 1:
            means = list(self.world.mean(torch.stack(means)))
        names = [*totals, *(f"{n}/gradient" for n in norms)]
        told = [x.detach().float() for x in (*means, *norms.values())]
        self.pending.append((self.step, names, torch.stack(told) if told else torch.zeros(0)))
        if self.world.device.type == "cpu" or self.step % SYNC_EVERY == SYNC_EVERY - 1:
            self.look()
        for learner in learners:
            learner.step(norms[learner.name])
        whole = {key: join([batch[key] for batch in micros]) for key in micros[0]} if micros else {}
        with torch.no_grad():
            self.recipe.after(whole, self.make_turn(self.step, due, noise, None))

    def say(self, notes: Sequence[str]) -> None:
        for note in notes:
            if note not in self.noted and self.world.first:
                self.watch.note(note)
            self.noted.add(note)

    def look(self) -> None:
        """Reads the losses of the steps since the last look, and stops at the first that is not finite."""
        for step, names, values in self.pending:
            for name, value in zip(names, values.tolist(), strict=True):
                if not math.isfinite(value):
                    self.stop_at(step, name, value)
                for window in (self.window, self.since_checkpoint):
                    entry = window.setdefault(name, [0.0, 0])
                    entry[0] += value
                    entry[1] += 1
        self.pending = []

    def stop_at(self, step: int, name: str, value: float) -> None:
        role, _, term = name.rpartition("/")
        kept = self.folder.shelf.steps()[-1:] if self.folder else []
        where = f"the checkpoint of step {kept[0]} is kept, and a resume would come to the same; " if kept else ""
        again = f": --config {self.folder.path}/settings.toml --out NEW" if self.folder else ""
        what = f"role {role}: {term}" if role in self.roles else f"{name}, which is measured,"
        raise Diverged(f"{what} became {value} at step {step}; {where}lower the rate or clip in a new "
                      f"run{again}")

    # ---- the run ----

    def device_batch(self, micros: Mapping[str, list[Batch]]) -> list[dict[str, Batch]]:
        def move(batch: Batch) -> Batch:
            x = batch.x.to(self.world.device, non_blocking=True)
            return Batch(x, None if batch.y is None else batch.y.to(self.world.device, non_blocking=True))

        return [{name: move(parts[m]) for name, parts in micros.items()} for m in range(self.micros)]

    @contextmanager
    def loaders(self, cursors: Mapping[str, dict]):
        with ExitStack() as stack:
            yield {
                name: stack.enter_context(
                    Loader(source, seed=self.settings.seed, batch=self.settings.batch, micros=self.micros,
                           rank=self.world.rank, world=self.world.size, start=self.step, cursor=cursors.get(name))
                )
                for name, source in self.sources.items()
            }

    def enter_stages(self) -> None:
        for stage in self.schedule.entering(self.step):
            torch.manual_seed(seed_of(self.settings.seed, "enter", stage.name))
            stage.enter()
            for name in stage.fresh:
                self.learners[name].fresh()
                self.learners[name].total = self.schedule.updates(name, self.step)

    def fit(self, cursors: Mapping[str, dict] | None = None) -> None:
        """From the current step to the end. A checkpoint at a stage's first step is from before `enter`, which a resume
        repeats."""
        with self.loaders(cursors or {}) as loaders, self.stop_between_steps() as asked, ExitStack() as stack:
            self.watch.started(self.name, self.step, self.schedule.steps)
            clock, row_clock, row_step = time.perf_counter(), time.perf_counter(), self.step
            stack.callback(self.watch.ended)
            stack.enter_context(self.tally.counting())
            while self.step < self.schedule.steps:
                self.enter_stages()
                self.train_step(self.device_batch({n: loader.at(self.step) for n, loader in loaders.items()}))
                self.step += 1
                now = time.perf_counter()
                self.seconds, clock = self.seconds + now - clock, now
                if self.ends_row(self.step - 1):
                    self.look()
                    self.log_row((self.step - row_step) / (now - row_clock))
                    row_clock, row_step = now, self.step
                if self.settings.sample_every and self.step % self.settings.sample_every == 0:
                    self.draw_preview()
                if asked() or self.checkpoint_due:
                    self.look()
                    self.save({n: loader.cursor(self.step - 1) for n, loader in loaders.items()})
                if asked() and self.step < self.schedule.steps:
                    raise Interrupted(f"stopped at step {self.step}; go on with: {resuming(self.settings.out)}")
        self.enter_stages()  # closed-form stages after the last step

    def log_row(self, pace: float) -> None:
        row: dict[str, Any] = {"step": self.step, "stage": self.schedule.at(self.step - 1).name}
        row |= {"seconds": round(self.seconds, 3), "steps_per_second": round(pace, 3)}
        row |= {name: total / count for name, (total, count) in self.window.items()}
        row |= {f"{n}/rate": w.rate for n, w in self.learners.items() if w.updates}
        self.window = {}
        self.say(list(self.reach.complaints(self.step)))
        if self.world.first:
            self.watch.row(row)
            if self.folder:
                self.folder.append(row)

    def draw_preview(self) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), self.tally.counting(False):
            pictures = dict(self.recipe.preview())
        if self.world.first and self.folder:
            save_previews(self.folder.path / "samples", self.step, pictures)

    # ---- state ----

    @cached_property
    def frozen(self) -> str:
        return checkpoint.frozen_digest(self.learners)

    def state(self, cursors: Mapping[str, dict]) -> dict[str, Any]:
        return {
            "step": self.step, "seconds": self.seconds, "recipe": type(self.recipe).__name__,
            "updates": {n: w.updates for n, w in self.learners.items()},
            "window": self.window, "since_checkpoint": self.since_checkpoint,     # not empty where it was interrupted
            "reach": self.reach.state(), "cursors": dict(cursors),
            "frozen": self.frozen, "evaluations": self.evaluations(),
        }

    def evaluations(self) -> dict[str, int]:
        """Of all processes, which are asked alike: a run may go on with another number of them."""
        now = Counter({name: self.world.size * count for name, count in self.tally.counts.items()})
        return dict(self.asked_before + now)

    def save(self, cursors: Mapping[str, dict]) -> None:
        metric, mean = self.schedule.at(self.step - 1).best, None
        if self.checkpoint_due:
            total, count = self.since_checkpoint.get(metric, (0.0, 0))
            mean, self.since_checkpoint = total / count if count else None, {}
        if self.folder is None:
            return
        shelf = self.folder.shelf
        groups = checkpoint.collect(self.learners, self.recipe.memory())
        checkpoint.save(shelf.path(self.step), groups, self.state(cursors), self.world.first)
        if self.world.first:
            shelf.offer(self.step, metric, mean)
            shelf.prune()

    def restore(self, step: int) -> dict[str, dict]:
        """Loads a checkpoint in place; returns the cursors of its streams."""
        assert self.folder
        state = checkpoint.load(self.folder.shelf.path(step), self.learners, self.recipe.memory())
        if state["recipe"] != (mine := type(self.recipe).__name__):
            raise Refusal(f"{self.folder.path}: its checkpoint is of {state['recipe']}, not of {mine}")
        if state["frozen"] != self.frozen:
            raise Refusal(f"{self.folder.path}: weights that this run keeps frozen are not those it began with")
        self.step, self.seconds = state["step"], state["seconds"]
        self.window, self.since_checkpoint = state["window"], state["since_checkpoint"]
        self.reach = Reach.of(state["reach"])
        self.asked_before = Counter(state["evaluations"])
        self.tally.counts.clear()       # of what a start prepares, which those are told with
        for name, learner in self.learners.items():
            learner.total = self.schedule.updates(name, max(0, self.step - 1))
        return state["cursors"]

    def finish(self) -> None:
        """The last picture, and the product."""
        self.draw_preview()
        if self.folder:
            product, path = self.recipe.product(), self.folder.path
            told = readme(product, self.name, path) if self.world.first else ""
            save_product(product, path / "product", self.world.first, told)

    def stop_between_steps(self) -> AbstractContextManager[Callable[[], bool]]:
        """Not across processes: they would stop at different steps. A second Ctrl-C waits for no step: what a stage
        does as it begins may take hours."""
        return asked_to_stop(patience=1) if self.world.size == 1 else nullcontext(lambda: False)

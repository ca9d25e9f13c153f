"""Starting a run, planning one, and going on with one."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stillroom.data import Source, Tensors, open_source, unreadable
from stillroom.settings import Images, Refusal, Run, checked, from_mapping, read_toml, seed_of
from stillroom.settings.files import read_json
from stillroom.settings.limits import places_of
from stillroom.train import trial
from stillroom.train.folder import RunFolder, machine, now, resuming
from stillroom.train.loop import Trainer
from stillroom.train.recipe import Recipe
from stillroom.train.teacher import is_ours, weights_digest
from stillroom.train.track import tracked
from stillroom.train.watch import Lines, Watch
from stillroom.train.world import World, open_world

Make = Callable[..., Recipe]
"""A recipe class, or anything that takes (settings, **sources) and gives a recipe."""


NOTHING = "none"
"""The setting of an input that a recipe can do without: its constructor has a default for it."""


def sources_of(make: Make, settings: Run, given: Mapping[str, Any] | None) -> dict[str, Source]:
    """One source per input that the recipe names: given by the caller (tensors will do), or opened from settings."""
    given = dict(given or {})
    names = getattr(make, "inputs", tuple(given))
    for name in given:
        if name not in names:
            raise Refusal(f"{getattr(make, '__name__', 'this recipe')} has no input {name!r}; it reads {list(names)}")
    out = {}
    for name in names:
        if name in given:
            out[name] = as_source(given[name])
        elif getattr(settings, name, "") == NOTHING:
            continue
        elif isinstance(settings, Images):
            out[name] = open_source(dataclasses.replace(settings, data=getattr(settings, name)))
        else:
            raise Refusal(f"input {name!r} is missing: give it, or extend settings.Images to open it by path")
    return out


def settled(make: Make, settings: Run) -> Run:
    decide: Callable[[Run], Run] | None = getattr(make, "settled", None)
    return settings if decide is None else decide(settings)


def as_source(thing: Any) -> Source:
    """Tensors x, or (x, y), as a source; a source as it is."""
    if isinstance(thing, torch.Tensor):
        return Tensors(thing)
    return Tensors(*thing) if isinstance(thing, tuple) else thing


def readied(make: Make, settings: Run, sources: Mapping[str, Source], watch: Watch | None,
            world: World) -> Mapping[str, Source]:
    """The first process prepares; the others wait, for hours if need be, and then find it done."""
    prepare = getattr(make, "prepare", None)
    if prepare is None or getattr(prepare, "__func__", None) is Recipe.prepare.__func__:  # pyright: ignore
        return sources
    with world.patience() as wait:
        if not world.first:
            wait()
        sources = prepare(settings, sources, (watch or Lines()).note)
        if world.first:
            wait()
    return sources


@contextmanager
def prepared(make: Make, settings: Run, sources: Mapping[str, Source], folder: RunFolder | None, watch: Watch | None,
             world: World) -> Iterator[Trainer]:
    """A trainer whose recipe was built on the device and from the seed, so that it can be built the same again."""
    torch.manual_seed(seed_of(settings.seed, "init"))
    with torch.device(world.device):
        try:
            recipe = make(settings, **sources)
        except ValueError as error:  # a net, an adapter or a time law that these settings do not allow
            raise Refusal(f"{getattr(make, '__name__', 'the recipe')} cannot be built: {error}") from error
    with tracked(settings, world, watch or Lines()) as told:
        yield Trainer(recipe, settings, sources, world, folder, told)


def first_batch(trainer: Trainer) -> list:
    with trainer.loaders({}) as loaders:
        return trainer.device_batch({name: loader.at(0) for name, loader in loaders.items()})


def settle_precision(trainer: Trainer, batch: list) -> list[str]:
    """Replaces precision = auto by what is faster here. The choice goes into the resolved settings and stays."""
    if trainer.settings.precision != "auto":
        return []
    if not trainer.roles or trainer.schedule.steps == 0:
        trainer.settings = dataclasses.replace(trainer.settings, precision="float32")
        return []
    chosen, note = trial.precision(trainer, batch)
    trainer.settings = dataclasses.replace(trainer.settings, precision=chosen)
    return [note]


def require_empty(out: Path) -> None:
    if (out / "settings.toml").exists():
        raise Refusal(f"{out} already holds a run: go on with it ({resuming(out)}), or choose another folder "
                      "with --out")
    if left := [name for name in ("checkpoints", "metrics.jsonl") if (out / name).exists()]:
        raise Refusal(f"{out} holds {' and '.join(left)} of a run, without its settings.toml; delete the folder, or "
                      "choose another with --out")


def start(make: Make, settings: Run, name: str, given: Mapping[str, Any] | None = None,
          watch: Watch | None = None) -> Path:
    """A new run from its first step to its product. Returns its folder."""
    settings = settled(make, checked(settings, name))
    with open_world(settings.device) as world:
        require_empty(settings.out)
        world.wait()
        sources = readied(make, settings, sources_of(make, settings, given), watch, world)
        with prepared(make, settings, sources, None, watch, world) as trainer:
            batch = first_batch(trainer)
            trainer.recipe.check(batch[0])
            notes = settle_precision(trainer, batch)
            folder = RunFolder(settings.out, settings.keep, world.first)
            try:
                if world.first:
                    require_empty(settings.out)         # another may have begun while this one prepared
                trainer.folder = folder
                for note in notes:
                    trainer.watch.note(note)
                if world.first:
                    folder.write_info(info(trainer, name, notes))
                    folder.write_settings(name, trainer.settings)
                carry_out(trainer, {})
            finally:
                folder.close()
    return settings.out


def resume(path: Path, find: Callable[[str], Make], given: Mapping[str, Any] | None = None,
           watch: Watch | None = None, changed: Mapping[str, Any] | None = None) -> Path:
    """Goes on from the last good checkpoint. `find` turns the recipe's name in settings.toml into the recipe; `changed`
    are settings of which what is learned does not depend: where places are now, how many bad pictures are borne."""
    name, settings, make = read_run(path, find)
    settings = checked(dataclasses.replace(settings, **(changed or {})), str(path))
    if is_finished(path):
        (watch or Lines()).note(f"{path}: finished already")
        return path
    with open_world(settings.device) as world:
        folder = RunFolder(path, settings.keep, world.first)
        try:
            require_weights(folder, settings)
            sources = readied(make, settings, sources_of(make, settings, given), watch, world)
            require_inputs(folder, sources)
            with prepared(make, settings, sources, folder, watch, world) as trainer:
                cursors = {}
                step, complaints = folder.shelf.last_good()
                for complaint in complaints:
                    trainer.watch.note(complaint)
                if complaints and step is None:
                    trainer.watch.note("no checkpoint is left: the run starts again from its first step")
                world.wait()
                if world.first:
                    folder.shelf.forget_after(step or 0)
                    folder.rewind(step or 0)
                    old = folder.read_info()
                    session = {"start_step": step or 0, "started": now()}
                    folder.write_info(old | {"sessions": [*old["sessions"], session]})
                    folder.write_settings(name, settings)
                world.wait()
                if step is not None:
                    cursors = trainer.restore(step)
                carry_out(trainer, cursors)
        finally:
            folder.close()
    return path


def is_finished(path: Path) -> bool:
    info = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    return bool(info.get("finished")) and (path / "product/product.json").is_file()


def require_weights(folder: RunFolder, settings: Run) -> None:
    """Those that the run began with; asked before anything is prepared with them."""
    for name, was in folder.read_info()["weights"].items():
        place = getattr(settings, name)
        held = weights_digest(place)
        if held != was:
            what = "holds other weights than those it began with" if held or Path(place).exists() else "is not there"
            raise Refusal(f"{folder.path}: {name} {place} {what}; say where they are: {resuming(folder.path)} "
                          f"--{name.replace('_', '-')} PLACE")


def require_inputs(folder: RunFolder, sources: Mapping[str, Source]) -> None:
    """As many items, of the same shape and as many classes, as the run learned from until now."""
    def told(facts: Mapping[str, Any]) -> str:
        classes = facts.get("classes")
        return f"{facts['count']} of {facts['shape']}{f' in {classes} classes' if classes else ''}"

    before = folder.read_info()["inputs"]
    for name, here in inputs_of(sources).items():
        if (was := before.get(name)) and told(was) != told(here):
            raise Refusal(f"{folder.path}: {name} {here['name']} holds {told(here)}, and the run began with "
                          f"{told(was)}; put these back, or choose another folder")


def weights_of(settings: Run, inputs: Collection[str]) -> dict[str, str]:
    """Of every place that a setting names: other weights may come there, and they may move. Inputs are no weights,
    unless they are a product of ours."""
    named = {name: getattr(settings, name) for name in places_of(type(settings))}
    held = {name: weights_digest(place) for name, place in named.items()
            if place and (name not in inputs or is_ours(Path(place)))}
    return {name: digest for name, digest in held.items() if digest}


def fit(make: Make, settings: Run, watch: Watch | None = None, **given: Any) -> Path:
    """A run from Python: starts it, or goes on if its folder holds it already. `given` are tensors x, or (x, y)."""
    settings = settled(make, checked(settings, "settings"))
    if not (settings.out / "settings.toml").exists():
        return start(make, settings, f"python:{getattr(make, '__name__', 'recipe')}", given, watch)
    _, before, _ = read_run(settings.out, lambda _name: make)
    for field in dataclasses.fields(settings):
        old, new = getattr(before, field.name), getattr(settings, field.name)
        if old != new and (field.name, new) != ("precision", "auto"):
            raise Refusal(f"{settings.out} was begun with {field.name} = {old}, not {new}; choose another folder")
    return resume(settings.out, lambda _name: make, given, watch)


def read_run(path: Path, find: Callable[[str], Make]) -> tuple[str, Run, Make]:
    """Name, settings and recipe of a run folder."""
    if not (path / "settings.toml").is_file():
        raise Refusal(f"{path}: not a run folder; it has no settings.toml")
    values = read_toml(path / "settings.toml")
    if "recipe" not in values:
        raise Refusal(f"{path}/settings.toml: 'recipe' is missing")
    name = str(values.pop("recipe"))
    make = find(name)
    declared = getattr(make, "Settings", Run)
    settings = from_mapping(declared, values | {"out": str(path)}, f"{path}/settings.toml")
    return name, settings, make


def carry_out(trainer: Trainer, cursors: Mapping[str, dict]) -> None:
    trainer.fit(cursors)
    trainer.finish()
    told = trainer.world.each([unreadable(source) for source in trainer.sources.values()])
    for note in dict.fromkeys(line for lines in told for line in lines if line):    # a process knows what it read
        trainer.watch.note(note)
    folder = trainer.folder
    if folder and trainer.world.first:
        old = folder.read_info()
        peak = max(old.get("memory_gib") or 0.0, round(trial.peak_memory(trainer.world.device), 3))
        folder.write_info(old | {"finished": now(), "seconds": round(trainer.seconds, 3),
                                 "evaluations": trainer.evaluations(), "memory_gib": peak})


def info(trainer: Trainer, name: str, notes: list[str]) -> dict[str, Any]:
    return {
        "recipe": name,
        "stillroom": importlib.metadata.version("stillroom"),
        "created": now(),
        "finished": None,
        "seconds": 0.0,
        "machine": machine(trainer.world.device),
        "processes": trainer.world.size,
        "parameters": {n: sum(p.numel() for p in w.parameters.values()) for n, w in trainer.learners.items()},
        "trained": sum({id(p): p.numel() for w in trainer.learners.values() for p in w.parameters.values()}.values()),
        "steps": trainer.schedule.steps,
        "precision": trainer.settings.precision,
        "inputs": inputs_of(trainer.sources),
        "weights": weights_of(trainer.settings, trainer.sources),
        "notes": notes,
        "sessions": [{"start_step": 0, "started": now()}],
    }


def inputs_of(sources: Mapping[str, Source]) -> dict[str, Any]:
    return {n: {"name": s.name, "shape": list(s.shape), "count": len(s) if hasattr(s, "__len__") else None,
                "classes": None if s.classes is None else len(s.classes)} for n, s in sources.items()}


def make_plan(make: Make, settings: Run, given: Mapping[str, Any] | None = None,
              watch: Watch | None = None) -> trial.Plan:
    """What the run would cost, from a few steps that leave nothing behind: nothing is prepared on disk either."""
    settings = settled(make, settings)
    with open_world(settings.device) as world:
        untracked = dataclasses.replace(settings, track="none")
        with prepared(make, untracked, sources_of(make, settings, given), None, watch, world) as trainer:
            batch = first_batch(trainer)
            trainer.recipe.check(batch[0])
            for note in settle_precision(trainer, batch):
                trainer.watch.note(note)
            with trainer.loaders({}) as loaders:
                return trial.plan(
                    trainer,
                    lambda step: trainer.device_batch({n: loader.at(step) for n, loader in loaders.items()}),
                    trainer.settings.precision,
                )

"""Trackers through accelerate: the same rows that go to metrics.jsonl."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stillroom.settings import Refusal, Run, to_mapping
from stillroom.train.watch import Watch
from stillroom.train.world import World


class Tracked:
    """Another watch, and a tracker beside it, which begins with the first step: a refused run leaves no folder."""

    def __init__(self, watch: Watch, make: Callable[[], Any]):
        self.watch, self.make, self.tracker = watch, make, None
        self.note, self.ended = watch.note, watch.ended

    def started(self, name, step, steps):
        self.tracker = self.tracker or self.make()
        self.watch.started(name, step, steps)

    def row(self, row):
        self.watch.row(row)
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])


def make_tracker(settings: Run, world: World):
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=world.device.type == "cpu")  # accelerate's trackers ask it whether they are the main process
    kind = LOGGER_TYPE_TO_CLASS[settings.track]
    folders = {"logging_dir": str(settings.out / "track")} if kind.requires_logging_directory else {}
    tracker = kind(settings.out.name, **folders)
    tracker.start()
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in to_mapping(settings).items()}
    tracker.store_init_configuration(flat)
    return tracker


@contextmanager
def tracked(settings: Run, world: World, watch: Watch) -> Iterator[Watch]:
    if settings.track == "none" or not world.first:
        yield watch
        return
    try:
        importlib.import_module(settings.track)
    except ImportError as error:
        raise Refusal(f"track = {settings.track}: not installed ({error}); pip install {settings.track}") from None
    told = Tracked(watch, lambda: make_tracker(settings, world))
    try:
        yield told
    finally:
        if told.tracker:
            told.tracker.finish()

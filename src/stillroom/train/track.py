"""Trackers through accelerate: the same rows that go to metrics.jsonl."""

from collections.abc import Iterator
from contextlib import contextmanager

from stillroom.settings import Refusal, Run, to_mapping
from stillroom.train.watch import Watch
from stillroom.train.world import World


class Tracked:
    """Another watch, and a tracker beside it."""

    def __init__(self, watch: Watch, tracker):
        self.watch, self.tracker = watch, tracker
        self.started, self.note, self.ended = watch.started, watch.note, watch.ended

    def row(self, row):
        self.watch.row(row)
        self.tracker.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])


@contextmanager
def tracked(settings: Run, world: World, watch: Watch) -> Iterator[Watch]:
    if settings.track == "none" or not world.first:
        yield watch
        return
    try:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=world.device.type == "cpu")  # accelerate's trackers ask it whether they are the main process
        kind = LOGGER_TYPE_TO_CLASS[settings.track]
        folders = {"logging_dir": str(settings.out / "track")} if kind.requires_logging_directory else {}
        tracker = kind(settings.out.name, **folders)
        tracker.start()
    except ImportError as error:
        raise Refusal(f"track = {settings.track}: not installed ({error}); pip install {settings.track}") from None
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in to_mapping(settings).items()}
    tracker.store_init_configuration(flat)
    try:
        yield Tracked(watch, tracker)
    finally:
        tracker.finish()

"""Does data arrive faster than training consumes it? Each kind of source against the step that it feeds.

One round times, a batch of 64 at a time: the loader alone in the first epoch (decoding, rendering) and in a later one
(from memory, where the source keeps what it made), the step with its batch in memory, and the step fed by each loader.
A loader works ahead; a block ends when it has nothing under way, so that no work slips into another's turn.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from compare import bench, interleave, row
from stillroom.data import (
    Batch,
    Encoding,
    Latents,
    LatentSpace,
    Loader,
    Photos,
    Scenes,
    digits,
    open_source,
    write_latents,
)
from stillroom.recipes.flow import FlowMatching, Settings
from stillroom.settings import Images
from stillroom.train import Silent
from stillroom.train.run import prepared
from stillroom.train.world import open_world

BATCH, WORKERS = 64, 2
BLOCK = 4
"""Batches per turn. All turns of a first epoch together must fit into the smallest set that is made only once."""
ROUNDS = 7

UNET = {"net": "unet", "width": 32, "depth": 1}
DIT = {"net": "dit", "width": 96, "depth": 2}


def latents(folder: Path) -> Latents:
    encoding = Encoding(LatentSpace(4, 8, (0.0,) * 4, (1.0,) * 4), codec="none", crop="none")
    generator = torch.Generator().manual_seed(0)
    batches = (Batch(torch.randn(1024, 4, 32, 32, generator=generator)) for _ in range(8))
    return Latents(write_latents(folder / "latents", batches, encoding))


def pairs(folder: Path) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], str, dict]]:
    """(source, new, the same in a later epoch, step, settings of the step).

    Sets that keep what they made are small where they are to be gone through before the clock starts.
    """
    def photos():
        return Photos(64)

    yield "digits 8", digits, digits, "U-Net w32", UNET
    yield "shapes 32", lambda: Scenes("shapes", 32), lambda: Scenes("shapes", 32, 1024), "U-Net w32", UNET
    yield "leaves 32", lambda: Scenes("leaves", 32), lambda: Scenes("leaves", 32, 1024), "DiT/4 w96", DIT | {"patch": 4}
    yield "leaves 64", lambda: Scenes("leaves", 64), lambda: Scenes("leaves", 64, 1024), "DiT/8 w96", DIT | {"patch": 8}
    yield "photos 64", photos, photos, "DiT/8 w96", DIT | {"patch": 8}
    if data := os.environ.get("STILLROOM_DATA"):
        def cifar():
            return open_source(Images(data=str(Path(data) / "cifar10-jpeg" / "test.parquet"), size=32))

        yield "CIFAR parquet 32", cifar, cifar, "DiT/4 w96", DIT | {"patch": 4}
    store = latents(folder)
    yield "latents 4x32x32", lambda: store, lambda: store, "DiT/4 w96", DIT | {"patch": 4}


class Feed:
    """Successive batches of one loader, and its rest at the end of a turn."""

    def __init__(self, source):
        self.loader, self.step = Loader(source, seed=0, batch=BATCH, workers=WORKERS), 0

    def take(self) -> list[Batch]:
        self.step += 1
        return self.loader.at(self.step - 1)

    def rest(self) -> None:
        for parts in self.loader._ready.values():
            for part in parts:
                part.result()


def compete(new, later, settings: Settings, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch of each contender."""
    again = later()
    for first in range(0, len(again), 256):
        again.fetch(range(first, min(first + 256, len(again))), 0)
    with open_world("cpu") as world, contextlib.ExitStack() as stack:
        feeds = {"first epoch": Feed(new()), "later epoch": Feed(again)}
        for feed in feeds.values():
            stack.enter_context(feed.loader)
        trainer = stack.enter_context(
            prepared(FlowMatching, settings, {"data": again}, None, Silent(), world)
        )
        held = again.fetch(range(BATCH), 0)

        def alone(feed: Feed) -> None:
            for _ in range(BLOCK):
                feed.take()
            feed.rest()

        def fed(feed: Feed) -> None:
            for _ in range(BLOCK):
                trainer.train_step(trainer.device_batch({"data": feed.take()}))
            feed.rest()

        def memory() -> None:
            for _ in range(BLOCK):
                trainer.train_step(trainer.device_batch({"data": [held]}))

        contenders = {"step": memory}
        for name, feed in feeds.items():
            contenders |= {name: lambda f=feed: alone(f), f"step, {name}": lambda f=feed: fed(f)}
        samples = interleave(contenders, rounds)
        return {name: [s / BLOCK for s in taken] for name, taken in samples.items()}


def run(quick: bool) -> tuple[list[dict], list[str]]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, new, later, step, net in pairs(Path(place)):
            settings = Settings(out=Path(place) / "run", data="", size=8, precision="float32", batch=BATCH, **net)
            s = compete(new, later, settings, 3 if quick else ROUNDS)
            against = f"{step}", s["step"]
            rows.append(row(f"{step} on {name}, batch in memory", s["step"]))
            for epoch in ("first epoch", "later epoch"):
                rows += [
                    row(f"{name}, {epoch}: loader alone", s[epoch], against, above=1, inverse=True),
                    row(f"{name}, {epoch}: step fed by it", s[f"step, {epoch}"], against),
                ]
    notes = [
        f"A batch is {BATCH} items, prepared by {WORKERS} threads; in the rows of a loader alone the ratio is how many "
        "times faster it is than the step, and must be above 1; in those of a fed step how many times slower the step "
        "became.",
        "Photos are cut anew in every epoch; digits lie in memory; latents are mapped from disk.",
    ]
    if "STILLROOM_DATA" not in os.environ:
        notes.append("CIFAR was left out: STILLROOM_DATA is not set.")
    return rows, notes


if __name__ == "__main__":
    bench("Loader against training, a batch of 64", run)

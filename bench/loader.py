"""Does data arrive faster than training consumes it? Each kind of source against a step that it feeds; among them those
of the shipped recipes that ask for most items a second.

One round times, a batch at a time: the loader alone in the first epoch (decoding, rendering) and in a later one
(from memory, where the source keeps what it made), the step with its batch in memory, and the step fed by each loader.
A loader works ahead; a block ends when it has nothing under way, so that no work slips into another's turn.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from stillroom.recipes import drifting, encoder, features, flow, rae
from stillroom.settings import Images, Run
from stillroom.train import Recipe, Silent
from stillroom.train.run import prepared
from stillroom.train.world import open_world

BATCH, WORKERS = 64, 2
BLOCK, TURN = 4, 256
"""Batches per turn, and items at most, unless one batch has more. All turns of a first epoch together must fit into the
smallest set that is made only once."""
ROUNDS = 7

GIVEN: dict[str, Any] = {"out": Path("unused"), "data": "", "precision": "float32"}
UNET: dict[str, Any] = {"net": "unet", "width": 32, "depth": 1}
DIT: dict[str, Any] = {"net": "dit", "width": 96, "depth": 2}


def latents(folder: Path) -> Latents:
    encoding = Encoding(LatentSpace(4, 8, (0.0,) * 4, (1.0,) * 4), codec="none", crop="none")
    generator = torch.Generator().manual_seed(0)
    batches = (Batch(torch.randn(1024, 4, 32, 32, generator=generator)) for _ in range(8))
    return Latents(write_latents(folder / "latents", batches, encoding))


class Pair(NamedTuple):
    source: str
    new: Callable[[], Any]
    later: Callable[[], Any]
    """The same in a later epoch."""
    step: str
    recipe: Callable[..., Recipe]
    settings: Run


def photos() -> Photos:
    return Photos(64)


def flows(folder: Path, cifar: Callable[[], Any] | None) -> Iterator[Pair]:
    """Sets that keep what they made are small where they are to be gone through before the clock starts."""
    def pair(source: str, new: Callable[[], Any], later: Callable[[], Any], net: dict, patch: int = 0) -> Pair:
        step = f"DiT/{patch} w96" if patch else "U-Net w32"
        more: dict[str, Any] = {"patch": patch} if patch else {}
        settings = flow.Settings(**GIVEN, size=8, batch=BATCH, **net, **more)
        return Pair(source, new, later, step, flow.FlowMatching, settings)

    yield pair("digits 8", digits, digits, UNET)
    yield pair("shapes 32", lambda: Scenes("shapes", 32), lambda: Scenes("shapes", 32, 1024), UNET)
    yield pair("leaves 32", lambda: Scenes("leaves", 32), lambda: Scenes("leaves", 32, 1024), DIT, 4)
    yield pair("leaves 64", lambda: Scenes("leaves", 64), lambda: Scenes("leaves", 64, 1024), DIT, 8)
    yield pair("photos 64", photos, photos, DIT, 8)
    if cifar:
        yield pair("CIFAR parquet 32", cifar, cifar, DIT, 4)
    store = latents(folder)
    yield pair("latents 4x32x32", lambda: store, lambda: store, DIT, 4)


def hungry(cifar: Callable[[], Any] | None, photographs: Callable[[], Any] | None) -> Iterator[Pair]:
    """Steps that ask for most items a second, as their recipes have them by default."""
    pictures = [("photos 64", photos), *([("photographs 64", photographs)] if photographs else [])]
    small = [("digits 8", digits), *([("CIFAR parquet 32", cifar)] if cifar else [])]
    for source, new in pictures:
        yield Pair(source, new, new, "encoder distillation", encoder.EncoderDistillation,
                   encoder.Settings(**GIVEN, teacher="bundled"))
        yield Pair(source, new, new, "rae, its encoder", rae.RAE, rae.Settings(**GIVEN))
    for source, new in small:
        yield Pair(source, new, new, "features", features.MaskedFeatures, features.Settings(**GIVEN, size=8))
    yield Pair("digits 8", digits, digits, "drifting", drifting.Drifting, drifting.Settings(**GIVEN, size=8))


def of_user(place: str, **how: Any) -> Callable[[], Any] | None:
    data = os.environ.get("STILLROOM_DATA")
    return (lambda: open_source(Images(data=str(Path(data) / place), **how))) if data else None


def pairs(folder: Path) -> Iterator[Pair]:
    cifar = of_user("cifar10-jpeg/test.parquet", size=32)
    yield from flows(folder, cifar)
    yield from hungry(cifar, of_user("bsds500/train", size=64, crop="shrink"))


class Feed:
    """Successive batches of one loader, and its rest at the end of a turn."""

    def __init__(self, source, batch: int):
        self.loader, self.step = Loader(source, seed=0, batch=batch, workers=WORKERS), 0

    def take(self) -> list[Batch]:
        self.step += 1
        return self.loader.at(self.step - 1)

    def rest(self) -> None:
        for parts in self.loader._ready.values():
            for part in parts:
                part.result()


def compete(pair: Pair, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch of each contender."""
    again, settings = pair.later(), pair.settings
    block = max(1, min(BLOCK, TURN // settings.batch))
    for first in range(0, len(again), 256):
        again.fetch(range(first, min(first + 256, len(again))), 0)
    with open_world("cpu") as world, contextlib.ExitStack() as stack:
        feeds = {"first epoch": Feed(pair.new(), settings.batch), "later epoch": Feed(again, settings.batch)}
        for feed in feeds.values():
            stack.enter_context(feed.loader)
        trainer = stack.enter_context(prepared(pair.recipe, settings, {"data": again}, None, Silent(), world))
        held = again.fetch(range(settings.batch), 0)

        def alone(feed: Feed) -> None:
            for _ in range(block):
                feed.take()
            feed.rest()

        def fed(feed: Feed) -> None:
            for _ in range(block):
                trainer.train_step(trainer.device_batch({"data": feed.take()}))
            feed.rest()

        def memory() -> None:
            for _ in range(block):
                trainer.train_step(trainer.device_batch({"data": [held]}))

        contenders = {"step": memory}
        for name, feed in feeds.items():
            contenders |= {name: lambda f=feed: alone(f), f"step, {name}": lambda f=feed: fed(f)}
        samples = interleave(contenders, rounds)
        return {name: [s / block for s in taken] for name, taken in samples.items()}


def run(quick: bool) -> tuple[list[dict], list[str]]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for pair in pairs(Path(place)):
            s = compete(pair, 3 if quick else ROUNDS)
            name, against = f"{pair.source}, {pair.settings.batch} a batch", (pair.step, s["step"])
            rows.append(row(f"{pair.step} on {name}, in memory", s["step"]))
            for epoch in ("first epoch", "later epoch"):
                rows += [
                    row(f"{name}, {epoch}: loader alone", s[epoch], against, above=1, inverse=True),
                    row(f"{name}, {epoch}: step fed by it", s[f"step, {epoch}"], against),
                ]
    notes = [
        f"Batches are prepared by {WORKERS} threads; in the rows of a loader alone the ratio is how many "
        "times faster it is than the step, and must be above 1; in those of a fed step how many times slower the step "
        "became.",
        "Photos and photographs are cut anew in every epoch; digits lie in memory; latents are mapped from disk.",
        "Encoder distillation, rae, features and drifting are as their recipes have them by default, in float32.",
    ]
    if "STILLROOM_DATA" not in os.environ:
        notes.append("CIFAR and photographs were left out: STILLROOM_DATA is not set.")
    return rows, notes


if __name__ == "__main__":
    bench("Loader against training", run)

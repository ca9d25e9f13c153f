"""What the trainer adds to a step: a whole run by `Trainer.fit` against the same mathematics written by hand, and the
same hand-written loop inside accelerate.

Ours is an untouched `fit` on a run folder. The others take their turns between its steps, after the last word of the
recipe, so that all alternate within a tenth of a second: the machine's speed wanders from second to second. A contender
is the mean of its steps, because its log comes with one in twenty. Where a process lays its arrays makes two copies of
one loop differ by a per cent or two; so the race is run in several processes, each of which counts once, and by hand in
two copies. Checkpoints come too seldom: they are timed by themselves, and ours is charged its share at the cadence of a
default run.
"""

import contextlib
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from compare import bench, interleave, row
from stillroom.data import Tensors
from stillroom.recipes.flow import FlowMatching, Settings
from stillroom.train import Silent
from stillroom.train.folder import RunFolder
from stillroom.train.loop import Trainer
from stillroom.train.run import prepared
from stillroom.train.world import open_world

LIMIT = 1.03
BLOCK = 2
"""Steps a contender runs before the next one's turn."""
WARM, ROUNDS, PROCESSES = 10, 40, 16
"""Rounds that are not counted, and those that are, in each process."""
LATENT = (4, 8, 8)
BOUNDED, SMALL = 96, (36, 1)
"""Width of the net that the bound is for, which is as deep as a step of LEAST asks for on this machine; width and depth
of a smaller one, there to be honest about the rest."""
LEAST = 0.03


def by_hand(net: nn.Module, x: Tensor, settings: Settings,
            accelerator: Accelerator | None = None) -> Callable[[], None]:
    """One block of flow matching as a careful person writes it: AdamW, warm-up, clipping, average, a log every 20."""
    average = copy.deepcopy(net).requires_grad_(False)
    adam = torch.optim.AdamW(net.parameters(), lr=settings.model.lr, weight_decay=0.0, fused=True)
    backward: Callable[[Tensor], Any] = Tensor.backward
    clip: Callable[[Any, float], Any] = clip_grad_norm_
    optimizer: Any = adam
    if accelerator:
        net, optimizer = accelerator.prepare(net, adam)
        backward, clip = accelerator.backward, accelerator.clip_grad_norm_
    parameters: list[Tensor] = list(net.parameters())
    averages: list[Tensor] = list(average.parameters())
    k, order, total = 0, torch.randperm(len(x)), torch.zeros(())

    def block() -> None:
        nonlocal k, order, total
        for _ in range(BLOCK):
            at = k * settings.batch % len(x)
            if at == 0:
                order = torch.randperm(len(x))
            x0 = x[order[at:at + settings.batch]]
            t, eps = torch.rand(len(x0)), torch.randn_like(x0)
            s = t[:, None, None, None]
            loss = (net((1 - s) * x0 + s * eps, t) - (eps - x0)).square().mean()
            backward(loss)
            clip(parameters, settings.model.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.model.lr * min(1, (k + 1) / settings.model.warmup)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - min(settings.average, (1 + k) / (10 + k)))  # pyright: ignore
            total = total + loss.detach()
            k += 1
            if k % settings.log_every == 0:
                mean = float(total) / settings.log_every
                assert mean < 1e3, f"loss {mean} at step {k}"
                total = torch.zeros(())

    return block


class Race(FlowMatching):
    """At the end of each of our blocks the guests run one of theirs."""

    guests: Mapping[str, Callable[[], None]]

    def start(self, guests: Mapping[str, Callable[[], None]]) -> None:
        self.guests, self.ran, self.since = guests, 0, time.perf_counter()
        self.samples: dict[str, list[float]] = {name: [] for name in ("ours", *guests)}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.samples[name].append((now - self.since) / BLOCK)
        self.since = time.perf_counter()

    def after(self, batch, turn):
        super().after(batch, turn)
        self.ran += 1
        if self.ran % BLOCK == 0:
            self.lap("ours")
            for name, block in self.guests.items():
                with torch.enable_grad():
                    block()
                self.lap(name)


def race(settings: Settings, x: Tensor) -> tuple[dict[str, list[float]], list[float], Trainer]:
    """Seconds per step of each contender and round; seconds of checkpoints; our trainer."""
    with open_world("cpu") as world:
        folder = RunFolder(settings.out, settings.keep)
        ours = prepared(Race, settings, {"data": Tensors(x)}, folder, Silent(), world)
        with contextlib.closing(folder), ours as trainer:
            recipe, accelerator = cast(Race, trainer.recipe), Accelerator(cpu=True)
            net = recipe.model.net
            recipe.start({
                "by hand": by_hand(copy.deepcopy(net), x, settings),
                "by hand in accelerate": by_hand(copy.deepcopy(net), x, settings, accelerator),
                "by hand, again": by_hand(copy.deepcopy(net), x, settings),
            })
            trainer.fit()
            saves = []
            for trainer.step in range(1, 9):
                start = time.perf_counter()
                trainer.save({})
                saves.append(time.perf_counter() - start)
            return {name: s[WARM:] for name, s in recipe.samples.items()}, saves, trainer


def floor(trainer: Trainer, x: Tensor) -> tuple[float, str]:
    """Seconds that the step's operations and bytes take at the rates this machine reaches on nothing else."""
    model, batch = trainer.recipe.model, x[:64]  # pyright: ignore
    with FlopCounterMode(display=False) as counter:
        model(batch, torch.rand(len(batch))).square().mean().backward()
    a, b = torch.randn(1024, 1024), torch.randn(2**24)
    target = torch.empty_like(b)
    times = interleave({"matmul": lambda: a @ a, "copy": lambda: target.copy_(b)}, 15)
    rate = 2 * 1024**3 / statistics.median(times["matmul"])
    bandwidth = 8 * 2**24 / statistics.median(times["copy"])
    # Clipping reads and writes gradients; AdamW reads p, g, m, v and writes p, m, v; the average reads two, writes one.
    moved = 4 * (2 + 7 + 3) * sum(p.numel() for p in model.parameters())
    flops = counter.get_total_flops()
    seconds = flops / rate + moved / bandwidth
    return seconds, (f"{flops / 1e9:.2f} GFLOP at {rate / 1e9:.0f} GFLOP/s and {moved / 1e6:.1f} MB at "
                     f"{bandwidth / 1e9:.1f} GB/s: {1e3 * seconds:.1f} ms")


def settings_of(width: int, depth: int, place: Path) -> Settings:
    return Settings(out=place / "run", data="", size=LATENT[-1], net="dit", width=width, depth=depth,
                    precision="float32")


def latents() -> Tensor:
    return Tensors(torch.randn(4096, *LATENT, generator=torch.Generator().manual_seed(0))).x


def deep_enough(width: int) -> int:
    """The least depth with which a step by hand takes LEAST."""
    x = latents()
    for depth in range(1, 65):
        settings = settings_of(width, depth, Path())
        block = by_hand(FlowMatching(settings, data=Tensors(x)).model.net, x, settings)
        block()
        if statistics.median(interleave({"": block}, 15)[""]) / BLOCK >= LEAST:
            return depth
    sys.exit(f"64 blocks of width {width} take less than {1e3 * LEAST:.0f} ms a step: give BOUNDED a greater width")


def race_here(width: int, depth: int, rounds: int) -> dict[str, Any]:
    """A race in this process: the mean of each contender's rounds, what a checkpoint costs, and the floor."""
    x = latents()
    with tempfile.TemporaryDirectory() as place:
        settings = settings_of(width, depth, Path(place))
        cadence, steps = max(1, min(1000, settings.steps // 8)), BLOCK * (WARM + rounds)
        samples, saves, trainer = race(dataclasses.replace(settings, steps=steps, checkpoint_every=steps), x)
        seconds, how = floor(trainer, x)
    return {"samples": {name: statistics.mean(s) for name, s in samples.items()}, "save": statistics.median(saves),
            "cadence": cadence, "floor": seconds, "how": how}


def apart(*numbers: int) -> dict[str, Any]:
    said = subprocess.run([sys.executable, __file__, "--one", *map(str, numbers)], check=True, capture_output=True,
                          text=True)
    return json.loads(said.stdout.splitlines()[-1])


def run(quick: bool) -> tuple[list[dict], list[str]]:
    rows, notes = [], []
    for width, depth in ((BOUNDED, deep_enough(BOUNDED)), SMALL):
        name = f"DiT, width {width}, {depth} block{'s' * (depth > 1)}"
        races = [apart(width, depth, 10 if quick else ROUNDS) for _ in range(3 if quick else PROCESSES)]
        one, plain, accelerated, again = ([r["samples"][who] for r in races] for who in
                                          ("by hand", "ours", "by hand in accelerate", "by hand, again"))
        hand = [(a + b) / 2 for a, b in zip(one, again, strict=True)]
        ours = [r["samples"]["ours"] + r["save"] / r["cadence"] for r in races]
        rows += [
            row(f"{name}: by hand, mean of two copies", hand),
            row(f"{name}: one copy", one, ("the other", again)),
            row(f"{name}: Trainer.fit, checkpoints included", ours, ("by hand", hand),
                below=LIMIT if width == BOUNDED else None),
            row(f"{name}: Trainer.fit, checkpoints left out", plain, ("by hand", hand)),
            row(f"{name}: by hand in accelerate", accelerated, ("by hand", hand)),
        ]
        own = 1e6 * (statistics.median(ours) - statistics.median(hand))
        last, least = races[-1], min(r["floor"] for r in races)
        notes += [
            f"{name}: floor {last['how']}; by hand takes {statistics.median(hand) / least:.1f} times the least.",
            f"{name}: a checkpoint takes {1e3 * last['save']:.0f} ms and comes every {last['cadence']} steps of a "
            f"default run; all the trainer adds is {own:.0f} microseconds a step.",
        ]
    return rows, notes


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(race_here(*map(int, sys.argv[2:]))))
    else:
        bench("Trainer overhead, one step of batch 64 on 4x8x8 latents", run)

"""A step of distribution matching by the trainer against the same mathematics by hand: the fake score in every step,
the student in every second one.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from compare import bench, interleave, row
from stillroom.flows import Flow
from stillroom.recipes.dmd import DMD, Settings
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.flow import Settings as FlowSettings
from stillroom.train import Silent, load, start
from stillroom.train.run import prepared
from stillroom.train.world import open_world

LIMIT, BLOCK = 1.03, 10


def teacher(place: Path) -> str:
    """Of digits, in steps enough to pass the gate."""
    settings = FlowSettings(out=place / "flow", data="digits", size=8, net="dit", width=96, depth=4, steps=400,
                            precision="float32", device="cpu")
    return str(start(FlowMatching, settings, "flow", watch=Silent()))


def by_hand(net: nn.Module, settings: Settings, shape: tuple[int, ...], classes: int) -> Callable[[], None]:
    student, fake, average = (copy.deepcopy(net).requires_grad_(True) for _ in range(3))
    average.requires_grad_(False)
    mine, its = list(student.parameters()), list(fake.parameters())
    move, follow = (torch.optim.AdamW(p, lr=2e-4, weight_decay=0.0, fused=True) for p in (mine, its))
    n, k, (low, high) = settings.batch, 0, settings.times
    y, one = torch.arange(n) % classes, torch.ones(n)

    def over(t: Tensor) -> Tensor:
        return t[:, None, None, None]

    def step() -> None:
        nonlocal k
        moving = k % settings.every == settings.every - 1
        z = torch.randn(n, *shape)
        with torch.set_grad_enabled(moving):
            x = z - student(z, one, y)
        t, eps, x0 = low + (high - low) * torch.rand(n), torch.randn_like(x), x.detach()
        (fake((1 - over(t)) * x0 + over(t) * eps, t, y) - (eps - x0)).square().mean().backward()
        if moving:
            t, eps = low + (high - low) * torch.rand(n), torch.randn_like(x)
            with torch.no_grad():
                x_t = (1 - over(t)) * x + over(t) * eps
                f, real = fake(x_t, t, y), net(x_t, t, y)
                size = (eps - x - real).abs().flatten(1).mean(1)[:, None, None, None]
                goal = x + (f - real) / size            # v = eps - x falls where x0 rises
            (0.5 * (x - goal) ** 2).mean().backward()
        for due, parameters, optimizer in ((True, its, follow), (moving, mine, move)):
            if due:
                clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if moving:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), mine, 0.001)  # pyright: ignore
        k += 1

    return step


def run(quick: bool) -> tuple[list[dict], list[str]]:
    with tempfile.TemporaryDirectory() as place, open_world("cpu") as world, contextlib.ExitStack() as stack:
        settings = Settings(out=Path(place) / "run", teacher=teacher(Path(place)), precision="float32", device="cpu")
        flow = load(settings.teacher)
        assert isinstance(flow, Flow)
        trainer = stack.enter_context(prepared(DMD, settings, {}, None, Silent(), world))
        hand = by_hand(flow.denoiser.net, settings, flow.shape, flow.classes or 0)  # pyright: ignore

        def fit() -> None:
            for _ in range(BLOCK):
                trainer.train_step([{}])
                trainer.step += 1

        samples = interleave({"hand": lambda: [hand() for _ in range(BLOCK)], "fit": fit}, 3 if quick else 41)
    samples = {name: [s / BLOCK for s in taken] for name, taken in samples.items()}
    return [
        row("a step of 128 digits, DiT of width 96 and 4 blocks, by hand", samples["hand"]),
        row("the same by the trainer", samples["fit"], ("by hand", samples["hand"]), below=LIMIT),
    ], []


if __name__ == "__main__":
    bench("Distribution matching: a step of its distillation", run)

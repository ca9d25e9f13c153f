"""A distillation step by the trainer against the same mathematics by hand, and the memory of encoding a picture of
4096 x 4096 in tiles, in a process of its own.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from compare import bench, interleave, peak_of, row
from stillroom.codecs import Codec
from stillroom.data import Photos, Tensors
from stillroom.nets.coding import Encoder
from stillroom.recipes import encoder as recipe
from stillroom.train import Silent
from stillroom.train.run import prepared
from stillroom.train.world import open_world


def by_hand(net: Encoder, teacher: Codec, std: Tensor, x: Tensor, settings) -> Callable[[], None]:
    average, parameters = copy.deepcopy(net).requires_grad_(False), list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.student.lr, weight_decay=0.0, fused=True)
    averages, k = list(average.parameters()), 0

    def step() -> None:
        nonlocal k
        at = k * settings.batch % len(x)
        x0 = x[at : at + settings.batch].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
            with torch.no_grad():
                target = teacher.space.normalise(teacher.encoder(x0).chunk(2, 1)[0].float())
            answer = teacher.space.normalise(net(x0).float())
        loss = F.huber_loss(answer / std, target / std, delta=0.15)
        loss.backward()
        clip_grad_norm_(parameters, settings.student.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.student.lr * min(1, (k + 1) / settings.student.warmup)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(settings.average, (1 + k) / (10 + k)))  # pyright: ignore
        k += 1
        assert float(loss.detach()) < 1e3

    return step


def step(quick: bool) -> tuple[list[dict], list[str]]:
    """The trainer around the same mathematics; the bundled teacher, squares in memory."""
    x, block = Photos(64).fetch(range(512), 0).x, 2 if quick else 10
    with tempfile.TemporaryDirectory() as place, open_world("cpu") as world:
        settings = recipe.Settings(out=Path(place) / "run", data="", teacher="bundled", params=300_000,
                                   precision="bfloat16")
        with (prepared(recipe.EncoderDistillation, settings, {"data": Tensors(x)}, None, Silent(), world) as trainer,
              trainer.loaders({}) as loaders):
            ours = trainer.recipe
            assert isinstance(ours, recipe.EncoderDistillation)
            hand = by_hand(copy.deepcopy(ours.codec.encoder), ours.teacher, ours.std, x, settings)     # pyright: ignore

            def fit() -> None:
                for _ in range(block):
                    trainer.train_step(trainer.device_batch({"data": loaders["data"].at(trainer.step)}))
                    trainer.step += 1

            samples = interleave({"hand": lambda: [hand() for _ in range(block)], "fit": fit}, 3 if quick else 61)
    samples = {name: [s / block for s in taken] for name, taken in samples.items()}
    return [
        row("a step of the 0.3M student, by hand", samples["hand"]),
        row("the same by the trainer", samples["fit"], ("by hand", samples["hand"]), below=1.03),
    ], []


TILED = """
import torch
from stillroom.codecs import Codec, Tiled
from stillroom.data import LatentSpace
from stillroom.nets.coding import Decoder, Encoder, sized
torch.set_num_threads(2)
encoder = sized(2_000_000, lambda w: Encoder(16, w, (1, 3, 3, 3), stem="unshuffle"))
codec = Codec(encoder, Decoder(16, 8), LatentSpace(16, 8, (0.0,) * 16, (1.0,) * 16)).eval()
with torch.inference_mode():
    Tiled(codec).encode(torch.rand(1, 3, 4096, 4096) * 2 - 1)
print(resident("VmHWM"))
"""
LIMIT_GB = 1.5


def memory() -> str:
    peak = peak_of(TILED)
    return (f"A student of 2M encodes 4096 x 4096 pixels in tiles with a peak of {peak:.2f} GB in the whole process, "
            f"torch and picture included; bound {LIMIT_GB} GB: {'met' if peak < LIMIT_GB else 'missed'}.")


def run(quick: bool) -> tuple[list[dict], list[str]]:
    rows, notes = step(quick)
    return rows, [*notes, memory()]


if __name__ == "__main__":
    bench("A student: a step of its distillation, memory in tiles", run)

"""How fast encoders encode, and what their distillation costs.

Speed: one picture of 256 x 256 through each encoder, each at the fastest of four settings (float32 or bfloat16,
contiguous or channels last), found first. The large one is Flux's, built to its true size with random weights.
Cache: an epoch of distilling it with the default student, the teacher asked in every step against its answers kept on
disk. Step: `Trainer.fit` against the same mathematics by hand. Memory: a picture of 4096 x 4096 encoded in tiles, in a
process of its own.
"""

import copy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from compare import bench, interleave, row
from stillroom.codecs import Codec, fingerprint
from stillroom.codecs.folders import DiffusersDecoder, DiffusersEncoder
from stillroom.data import LatentSpace, Photos, write_pairs
from stillroom.nets.coding import Encoder, sized
from stillroom.recipes import encoder as recipe
from stillroom.train import Silent
from stillroom.train.run import prepared
from stillroom.train.world import open_world

FLUX = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY = {"latent_channels": 16}
SIZE, ROUNDS, BATCH = 256, 15, 16
SETTINGS = {
    f"{dtype}, {layout}": (getattr(torch, dtype), getattr(torch, layout))
    for dtype in ("float32", "bfloat16") for layout in ("contiguous_format", "channels_last")
}


def student(params: int, stem: str) -> Encoder:
    return sized(params, lambda w: Encoder(16, w, (1, 3, 3, 3), stem=stem, padding="asymmetric"))   # pyright: ignore


def encoders() -> dict[str, nn.Module]:
    return {
        "Flux's encoder": DiffusersEncoder("AutoencoderKL", FLUX),
        "AutoencoderTiny's encoder": DiffusersEncoder("AutoencoderTiny", TINY),
        "student of 2M, unshuffle": student(2_000_000, "unshuffle"),
        "student of 2M, conv": student(2_000_000, "conv"),
        "student of 1.2M, unshuffle": student(1_200_000, "unshuffle"),
        "student of 0.3M, unshuffle": student(300_000, "unshuffle"),
    }


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def at(net: nn.Module, setting: str) -> Callable[[], Tensor]:
    dtype, layout = SETTINGS[setting]
    net = copy.deepcopy(net).to(dtype).to(memory_format=layout).eval()      # pyright: ignore[reportCallIssue]
    x = torch.rand(1, 3, SIZE, SIZE).to(dtype).contiguous(memory_format=layout)

    @torch.inference_mode()
    def encode() -> Tensor:
        return net(x)

    return encode


def fastest(net: nn.Module) -> str:
    times = interleave({setting: at(net, setting) for setting in SETTINGS}, 3)
    return min(times, key=lambda setting: statistics.median(times[setting]))


def speed(quick: bool) -> tuple[list[dict], list[str]]:
    nets = encoders()
    best = {name: fastest(net) for name, net in nets.items()}
    samples = interleave({name: at(net, best[name]) for name, net in nets.items()}, 3 if quick else ROUNDS)
    names = {name: f"{name}: {count(net) / 1e6:.2f}M parameters, {best[name]}" for name, net in nets.items()}
    flux, tiny = (("Flux's", samples["Flux's encoder"]), ("AutoencoderTiny's", samples["AutoencoderTiny's encoder"]))
    rows = [row(names["Flux's encoder"], flux[1])]
    rows.append(row(names["AutoencoderTiny's encoder"], tiny[1], flux, inverse=True))
    for name in list(nets)[2:]:
        bounds = {"above": 8} if name == "student of 2M, unshuffle" else {}
        rows.append(row(names[name], samples[name], flux, inverse=True, **bounds))
    rows.append(row("student of 1.2M, unshuffle, again", samples["student of 1.2M, unshuffle"], tiny, below=1))
    return rows, ["Ratios to Flux's say how many times faster; the last row's how many times slower."]


def flux_codec() -> Codec:
    space = LatentSpace(16, 8, (FLUX["shift_factor"],) * 16, (1 / FLUX["scaling_factor"],) * 16, 7.0)
    return Codec(DiffusersEncoder("AutoencoderKL", FLUX), DiffusersDecoder("AutoencoderKL", FLUX), space).eval()


class OfFlux(recipe.EncoderDistillation):
    """The recipe with a teacher that lies in no folder. Random weights answer nothing like pictures: no gate."""

    def check(self, batch):
        pass


def epochs(quick: bool) -> tuple[list[dict], list[str]]:
    """Steps of a run of the default settings: the teacher asked in each, or its answers read."""
    teacher, crops, block = flux_codec().requires_grad_(False), 64, 1 if quick else 4
    recipe.open_codec = lambda _spec: teacher
    with tempfile.TemporaryDirectory() as place, open_world("cpu") as world:
        settings = recipe.Settings(out=Path(place) / "run", data="", teacher="flux", precision="bfloat16")
        photos = Photos(settings.size)
        with torch.autocast("cpu", torch.bfloat16):
            pairs = write_pairs(Path(place) / "cache", photos, crops, recipe.answering(teacher), fingerprint(teacher),
                                "bench")
        watch = Silent()
        with (prepared(OfFlux, settings, {"data": photos}, None, watch, world) as asked,
              prepared(OfFlux, settings, {"data": pairs}, None, watch, world) as cached,
              asked.loaders({}) as live, cached.loaders({}) as kept):

            def steps(trainer, loaders):
                for _ in range(block):
                    trainer.train_step(trainer.device_batch({"data": loaders["data"].at(trainer.step)}))
                    trainer.step += 1

            samples = interleave({"asked": lambda: steps(asked, live), "cached": lambda: steps(cached, kept)},
                                 3 if quick else 7)
    samples = {name: [s / block for s in taken] for name, taken in samples.items()}
    rows = [
        row(f"a step of {BATCH} squares of {settings.size}, the teacher asked", samples["asked"]),
        row("the same, its answers cached", samples["cached"], ("asked", samples["asked"]), above=4, inverse=True),
    ]
    return rows, ["The teacher is Flux's codec with random weights, in bfloat16; the student the recipe's default."]


def by_hand(net: Encoder, teacher: Codec, std: Tensor, x: Tensor, settings) -> Callable[[], None]:
    average, parameters = copy.deepcopy(net).requires_grad_(False), list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.student.lr, weight_decay=0.0, foreach=True)
    averages, k = list(average.parameters()), 0

    def step() -> None:
        nonlocal k
        at = k * settings.batch % len(x)
        x0 = x[at : at + settings.batch].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
            with torch.no_grad():
                target = teacher.space.normalise(teacher.encoder(x0).chunk(2, 1)[0].float())
            answer = teacher.space.normalise(net(x0).float())
        loss = (((answer - target) / std) ** 2).mean()
        loss.backward()
        clip_grad_norm_(parameters, settings.student.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.student.lr * min(1, (k + 1) / settings.student.warmup)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(settings.average, (1 + k) / (10 + k)))  # pyright: ignore
        k += 1
        assert float(loss) < 1e3

    return step


def step(quick: bool) -> tuple[list[dict], list[str]]:
    """The trainer around the same mathematics; the bundled teacher, squares in memory."""
    x, block = Photos(64).fetch(range(512), 0).x, 2 if quick else 10
    with tempfile.TemporaryDirectory() as place, open_world("cpu") as world:
        settings = recipe.Settings(out=Path(place) / "run", data="", teacher="bundled", params=300_000,
                                   precision="bfloat16")
        with (prepared(recipe.EncoderDistillation, settings, {"data": x}, None, Silent(), world) as trainer,
              trainer.loaders({}) as loaders):
            ours = trainer.recipe
            assert isinstance(ours, recipe.EncoderDistillation)
            hand = by_hand(copy.deepcopy(ours.codec.encoder), ours.teacher, ours.std, x, settings)     # pyright: ignore

            def fit() -> None:
                for _ in range(block):
                    trainer.train_step(trainer.device_batch({"data": loaders["data"].at(trainer.step)}))
                    trainer.step += 1

            samples = interleave({"hand": lambda: [hand() for _ in range(block)], "fit": fit}, 3 if quick else 21)
    samples = {name: [s / block for s in taken] for name, taken in samples.items()}
    return [
        row("a step of the 0.3M student, by hand", samples["hand"]),
        row("the same by the trainer", samples["fit"], ("by hand", samples["hand"]), below=1.03),
    ], []


PEAK = """
import resource, sys, torch
from stillroom.codecs import Codec, Tiled
from stillroom.data import LatentSpace
from stillroom.nets.coding import Decoder, Encoder, sized
torch.set_num_threads(2)
encoder = sized(2_000_000, lambda w: Encoder(16, w, (1, 3, 3, 3), stem=sys.argv[1]))
codec = Codec(encoder, Decoder(16, 8), LatentSpace(16, 8, (0.0,) * 16, (1.0,) * 16)).eval()
with torch.inference_mode():
    Tiled(codec).encode(torch.rand(1, 3, 4096, 4096) * 2 - 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
LIMIT_GB = 1.5


def memory() -> list[str]:
    notes = []
    for stem in ("unshuffle", "conv"):
        said = subprocess.run([sys.executable, "-c", PEAK, stem], capture_output=True, text=True, check=True)
        peak = int(said.stdout) / 1e9
        verdict = "met" if peak < LIMIT_GB else "missed"
        notes.append(f"A student of 2M ({stem}) encodes 4096 x 4096 pixels in tiles with a peak of {peak:.2f} GB in "
                     f"the whole process, torch and picture included; bound {LIMIT_GB} GB: {verdict}.")
    return notes


def run(quick: bool) -> tuple[list[dict], list[str]]:
    parts = [speed(quick), epochs(quick), step(quick)]
    return [r for rows, _ in parts for r in rows], [n for _, notes in parts for n in notes] + memory()


if __name__ == "__main__":
    bench("Encoders: speed at 256 x 256, cached teachers, memory in tiles", run)

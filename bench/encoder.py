"""How fast encoders encode, and what a teacher's kept answers save.

Speed: one picture of 256 x 256 through each encoder, each at the fastest of four settings (float32 or bfloat16,
contiguous or channels last), found first. The large one is Flux's, built to its true size with random weights.
Cache: an epoch of distilling it with the default student, the teacher asked in every step against its answers kept on
disk.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

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


def run(quick: bool) -> tuple[list[dict], list[str]]:
    parts = [speed(quick), epochs(quick)]
    return [r for rows, _ in parts for r in rows], [n for _, notes in parts for n in notes]


if __name__ == "__main__":
    bench("Encoders: speed at 256 x 256, and cached teachers", run)

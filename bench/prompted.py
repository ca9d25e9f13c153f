"""A step of DMD2 at the size of real text-to-image teachers, on a machine with CUDA: images a second, memory at the
peak, and the share of the machine's rate of bfloat16 matrix products that the step's operations reach.

Weights and prompts are random, which speed does not see, and no VAE takes part. The rate is that of products of 8192 by
8192, which take turns with the steps; operations are counted by torch, those of the backward pass with them.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from compare import bench, interleave, row
from stillroom.flows import Flow
from stillroom.flows.folders import flow_of
from stillroom.flows.prompted import PromptedNet
from stillroom.flows.prompts import Prompts
from stillroom.paths import Tabulated
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.dmd import DMD, Settings
from stillroom.train import Silent
from stillroom.train.run import prepared
from stillroom.train.teacher import frozen
from stillroom.train.world import open_world

CYCLE = 5
"""Updates of the fake score for one of the student, as released."""
TEXTS, SIDE = 64, 8192


@dataclass(frozen=True)
class Case:
    pipeline: str
    unet: Mapping[str, Any]
    side: int                       # of the latents
    tokens: tuple[int, int]         # of a prompt, and their width
    pooled: int
    batch: int
    method: Mapping[str, Any]


SD15 = Case(
    "StableDiffusionPipeline",
    {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
     "attention_head_dim": 8},
    side=64, tokens=(77, 768), pooled=0, batch=16,
    method={"adversarial": Adversarial(weight=1e-3), "teacher_samples": 64})
SDXL = Case(
    "StableDiffusionXLPipeline",
    {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
     "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
     "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
     "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
     "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
     "projection_class_embeddings_input_dim": 2816},
    side=128, tokens=(77, 2048), pooled=1280, batch=2, method={"lora": 64, "fake_lora": 64})
CASES = {"SD1.5's size, 512 pixels, all weights, critic": SD15,
         "SDXL's size, 1024 pixels, student and fake score as adapters of rank 64": SDXL}


def teacher(case: Case) -> Flow:
    """Of random weights, asked with random prompts."""
    rows, shape = TEXTS + 1, (4, case.side, case.side)
    table = {"embeddings": torch.randn(rows, *case.tokens)}
    if case.pooled:
        table["pooled"] = torch.randn(rows, case.pooled)
    prompts = Prompts(case.pipeline, 8 * case.side, shape, (rows, *case.tokens),
                      tuple(table["pooled"].shape) if case.pooled else (), "", "", tuple(map(str, range(TEXTS))))
    net = PromptedNet("UNet2DConditionModel", case.unet, prompts)
    net.fill(table)
    return frozen(flow_of(net, shape, Tabulated("scaled_linear", 1000, 0.00085, 0.012), "eps", 1.0))


def cycle(case: Case, device: str, stack: ExitStack) -> Callable[[], None]:
    """As many steps as go to one of the student."""

    class Given(DMD):
        def opened(self):
            flow = teacher(case)
            return flow, flow

    settings = Settings(out=Path("unused"), teacher="random", batch=case.batch, every=CYCLE, device=device,
                        precision="bfloat16", **case.method)
    world = stack.enter_context(open_world(device))
    trainer = stack.enter_context(prepared(Given, settings, {}, None, Silent(), world))

    def run() -> None:
        for _ in range(CYCLE):
            trainer.train_step([{}])
            trainer.step += 1
        trainer.look()

    return run


def operations(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measured(name: str, case: Case, rounds: int) -> tuple[list[dict], list[str]]:
    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)

    def synchronised(run: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            run()
            torch.cuda.synchronize()

        return whole

    with ExitStack() as stack:
        torch.cuda.reset_peak_memory_stats()
        run = cycle(case, "cuda", stack)
        run()
        flops = operations(run) / CYCLE
        times = interleave({"product": synchronised(lambda: a @ a), "steps": synchronised(run)}, rounds, warmup=2)
        memory = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.empty_cache()
    steps = [s / CYCLE for s in times["steps"]]
    seconds, rate = statistics.median(steps), 2 * SIDE**3 / statistics.median(times["product"])
    return [row(f"{name}: a step of {case.batch}", steps)], [
        f"{name}: {case.batch / seconds:.1f} images a second, {memory:.1f} GB at the peak, {flops / 1e12:.1f} TFLOP a "
        f"step: {flops / seconds / rate:.0%} of {rate / 1e12:.0f} TFLOP/s, the rate of a product of {SIDE} by {SIDE}; "
        f"{torch.cuda.get_device_name()}."]


def run(quick: bool) -> tuple[list[dict], list[str]]:
    tables = [measured(name, case, 3 if quick else 15) for name, case in CASES.items()]
    return [r for rows, _ in tables for r in rows], [n for _, notes in tables for n in notes]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench/prompted.py is for a machine with CUDA, and this one has none")
    bench("Text-to-image teachers: a step of DMD2 on one GPU", run)

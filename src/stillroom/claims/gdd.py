"""Frozen convolutions do as well as all weights, where a teacher's network is made a one-step generator by a critic.

On the digits (8 by 8 pixels) a class-conditional U-Net is the teacher, and every student starts from its weights or
anew in the same architecture. All take as many updates of the same game against real digits, with a critic that starts
anew, and are judged by the features of a classifier that no other part of the claim has seen: Fréchet distance to the
training digits, and coverage beside it. Claimed of GDD-I (`frozen`), whose convolutions inside the blocks stay the
teacher's, so that a sixth of the weights learns:

- its Fréchet distance is at most 0.8 times that of the teacher at one step, where it begins;
- it is at most 1.2 times that of the same game on all weights (`full`);
- it is at most half of that of the same mask on a network that began at random (`frozen-scratch`): what the frozen
  layers hold is the teacher's.

Each arm has a rate of its own, of 1e-4, 3e-4 and 1e-3 the one that was best for it on seed 1: all weights take 1e-4 (at
3e-4 they came to 2.8 times the distance, at 1e-3 they diverged), the frozen and the random ones 3e-4.

Reported, and judged by nothing: regression on the ends of the teacher's trajectories in as many updates (`endpoint`),
the teacher at 1 and 8 steps of Heun's method, and real digits of the test set. The arm `null` is `frozen` whose
objective is multiplied by zero.

How to read it: 300 updates of 64 samples are a small part of what such a game takes. It moves the teacher's one step a
good part of the way and ends far from the teacher's eight; endpoint regression may well be nearer by then. Not claimed:
that freezing improves anything, which is the paper's finding on larger data; that a critic of pretrained features,
which the paper has, would say the same.
"""

import time
from functools import cache
from typing import Any

from torch import Tensor

from stillroom import train
from stillroom.claims._digits import features, pixels
from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import EVALUATIONS, idle, learned, run_in, shared_place
from stillroom.measure import panel
from stillroom.recipes.endpoint import Endpoint
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.gdd import GDD
from stillroom.settings import Optimizer

N, STEPS = 2000, 300
FROZEN = "conv|grow|shrink|out"
RATE = Optimizer(lr=1e-3, clip=1.0, warmup=50, decay="cosine")
RATES = {"frozen": 3e-4, "full": 1e-4, "frozen-scratch": 3e-4, "null": 3e-4}
DATA = {"data": "given", "size": 8}


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    x, y = pixels("train")
    return {"data": (x.view(-1, 1, 8, 8), y)}


@cache
def teacher(seed: int, quick: bool) -> str:
    out, steps = shared_place() / f"gdd-{seed}", 900 if quick else 1500
    return str(run_in(out, FlowMatching, digits(), **DATA, net="unet", width=16, depth=1, steps=steps, batch=64,
                      model=RATE, average=0.99, seed=seed))


def game(rate: float) -> Optimizer:
    return Optimizer(lr=rate, name="adam", betas=(0.0, 0.99), clip=1.0, warmup=50, decay="cosine")


def arm_of(arm: str) -> tuple[type, dict[str, Any]]:
    if arm == "endpoint":
        return Endpoint, {"student": RATE, "pairs": 1500, "teacher_steps": 8}
    return idle(GDD, "student") if arm == "null" else GDD, {
        **DATA, "student": game(RATES[arm]), "critic": game(1e-3), "width": 16, "r1": 0.05,
        "begin": "scratch" if arm == "frozen-scratch" else "teacher", "freeze": "" if arm == "full" else FROZEN}


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    if arm == "real":
        return judged(pixels("test")[0], seed)
    if arm.startswith("teacher-"):
        flow = train.load(teacher(seed, quick))
        return judged(flow.sample(N, seed, steps=int(arm.removeprefix("teacher-"))), seed)
    recipe, settings = arm_of(arm)
    steps, start = (20 if arm == "null" else 75 if quick else STEPS), time.perf_counter()
    run = learned(recipe, digits() if recipe.inputs else None, teacher=teacher(seed, quick), batch=64, average=0.99,
                  steps=steps, seed=seed, **settings)
    share = run.record["parameters"]["student"] / sum(p.numel() for p in run.model.parameters())
    spent = time.perf_counter() - start
    return judged(run.model.sample(N, seed), seed) | {
        "share of weights learned": share, "seconds": spent, EVALUATIONS: run.evaluations / 1e6}


def judged(x: Tensor, seed: int) -> dict[str, float]:
    seen = panel(features(x.flatten(1).clamp(-1, 1)), features(pixels("train")[0]), seed)
    return {"FD": seen["frechet"], "coverage": seen["coverage"]}


CLAIM = Claim(
    name="gdd",
    arms={"frozen": "subject", "full": "control", "frozen-scratch": "control", "teacher-1": "control", "null": "null",
          **dict.fromkeys(("endpoint", "teacher-8", "real"), "reported")},
    measure=measure,
    checks=[Check.at_most("FD", share, control)
            for share, control in ((0.8, "teacher-1"), (1.2, "full"), (0.5, "frozen-scratch"))],
    budget="300 updates of 64 samples each; the teacher 1500 of 64",
    quick="75 updates, the teacher 900: tries the machinery",
)

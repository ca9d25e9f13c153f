"""Segments keep a student of 2 and 4 steps on its teacher's trajectories, where consistency distillation leaves them.

The teacher is a small flow of a grid of 25 Gaussians in the plane (square of side 2, standard deviation 0.1), without
labels. All students start from it and take 1200 updates of 128 draws, on a teacher's grid of 32 steps. Distances are
those of 1000 samples from where 400 DDIM steps of the teacher lead from the same noise. Claimed, at 2 and at 4 steps,
of Hyper-SD whose stages end in as many segments (`segments`: a run of 8-4-2 for 2 steps, one of 8-4 for 4), and of a
single one of 8-4-2-1 that is told where its jumps end (`told`, ours):

- the distance is below that of consistency distillation at as many steps, drawn as its recipe does, with new noise
  between the steps (`consistency`);
- and below that of the same students drawn by DDIM steps (`consistency-ode`). This is the stronger control: new noise
  alone leads away from the trajectory.

For a sample of an update `segments` asks the student once, its average and the teacher once each, as consistency asks
the student twice and the teacher once. Reported, and judged by nothing: Hyper-SD of 8-4-2-1 that is told nothing, the
paper's form, as it is drawn from (`through`) and by DDIM steps (`through-ode`); the teacher; of all arms the
distance at 1 step and the energy distance to the mixture. The arm `null` is `told` whose losses are multiplied by
zero: the teacher's DDIM steps.

How to read it: a student that has gone on to one segment knows where trajectories end and no longer how they get there.
Its DDIM steps are then worse than its one step, and with new noise between them they follow the law but no trajectory;
so `through` is no subject. What serves all numbers of steps at once is telling.

Not claimed: the one step, or anything about the adversarial term, the reward and score distillation. The rate, 2e-3,
was chosen on seed 1.
"""

from functools import cache
from typing import Any

from torch import Tensor

from stillroom.claims._mixtures import draw, far, flow_on
from stillroom.claims._trajectories import N, apart, drawn_from, ends
from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import idle, learned
from stillroom.flows import FewStep
from stillroom.recipes.consistency import Consistency
from stillroom.recipes.hyper_sd import HyperSD
from stillroom.settings import Optimizer

GRID, STEPS, BATCH, SERVED = "grid:5:0.1", 1200, 128, (2, 4)
RATE = Optimizer(lr=2e-3, clip=1.0, warmup=50, decay="cosine")
RUNS: dict[str, tuple[type, dict[str, Any]]] = {
    "consistency": (Consistency, {"student_steps": 2}),
    "segments 2": (HyperSD, {"segments": (8, 4, 2)}),
    "segments 4": (HyperSD, {"segments": (8, 4)}),
    "told": (HyperSD, {"told": True}),
    "through": (HyperSD, {}),
    "null": (idle(HyperSD, "student"), {"told": True}),
}


def teacher(seed: int, quick: bool) -> str:
    return flow_on(GRID, seed, 1000 if quick else 2000, labelled=False)


@cache
def student(name: str, seed: int, quick: bool) -> tuple[FewStep, float]:
    """And how many evaluations a sample of an update took."""
    recipe, more = RUNS[name]
    steps = 20 if name == "null" else 400 if quick else STEPS
    run = learned(recipe, {"data": draw(GRID, 20_000, "flow", seed)[0]}, data="given", size=1,
                  teacher=teacher(seed, quick), steps=steps, batch=BATCH, student=RATE, average=0.99, seed=seed,
                  log_every=100, **more)
    return run.model, run.evaluations / (steps * BATCH)


def drawn(arm: str, k: int, seed: int, quick: bool) -> tuple[Tensor, float]:
    """[N, 2] samples in k steps."""
    if arm == "teacher":
        return ends(teacher(seed, quick), seed, k), 0.0
    made, cost = student(f"segments {k}" if arm == "segments" else arm.removesuffix("-ode"), seed, quick)
    if arm.endswith("-ode"):
        made = FewStep(list(made.denoisers), made.shape, list(made.plans.values()), "ode")      # pyright: ignore
    return made.sample(N, drawn_from(seed), steps=k), cost


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for k in SERVED if arm == "segments" else (*SERVED, 1):
        x, cost = drawn(arm, k, seed, quick)
        found |= {f"distance, {k} steps": apart(x, ends(teacher(seed, quick), seed)),
                  f"energy distance x 1000, {k} steps": 1000 * far(x, GRID)}
        found |= {"evaluations in training": cost} if cost else {}
    return found


CLAIM = Claim(
    name="hyper-sd",
    arms={"segments": "subject", "told": "subject", "consistency": "control", "consistency-ode": "control",
          "null": "null", **dict.fromkeys(("through", "through-ode", "teacher"), "reported")},
    measure=measure,
    checks=[Check.at_most(f"distance, {k} steps", 1, control)
            for k in SERVED for control in ("consistency", "consistency-ode")],
    budget="1200 updates of 128 samples each; the teacher 2000 of 256; null 20",
    quick="400 updates, teacher 1000",
)

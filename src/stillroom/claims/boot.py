"""BOOT's one step comes as near to its teacher's trajectories as eight steps of the teacher, without data.

The teacher is a small flow of a grid of 25 Gaussians in the plane (square of side 2, standard deviation 0.1), without
labels. The student starts from it and takes 1000 updates of 128 samples on a grid of 64 steps. Distances are those of
1000 samples from where 400 DDIM steps of the teacher lead from the same noise. Claimed:

- the student's distance at one evaluation is at most 1.1 times that of eight DDIM steps of the teacher (`teacher-8`);
- it is below that of four (`teacher-4`);
- the run has read no data: it has no input for them.

For a sample of an update the student is asked three times and the teacher twice. Reported, and judged by nothing:
the teacher at 1, 2 and 16 steps; of all arms the energy distance to the mixture; BOOT without its boundary term
(`no-boundary`), which is behind it where updates are few. The arm `null` is BOOT whose losses are multiplied by zero:
the teacher's network, told the time 0 in pure noise.

Not claimed: anything about guidance, labels, pictures or other paths. The rate, 2e-3, and the 1000 updates were chosen
on seed 1.
"""

from typing import Any

from stillroom.claims._mixtures import far, flow_on
from stillroom.claims._trajectories import N, apart, drawn_from, ends
from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import idle, learned
from stillroom.recipes.boot import BOOT
from stillroom.settings import Optimizer

GRID, STEPS, BATCH = "grid:5:0.1", 1000, 128
RATE = Optimizer(lr=2e-3, clip=1.0, warmup=100, decay="cosine")
DISTANCE, INPUTS = "distance to the teacher's end", "data sets read"


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    teacher = flow_on(GRID, seed, 1000 if quick else 2000, labelled=False)
    if arm.startswith("teacher-"):
        x, told = ends(teacher, seed, int(arm.removeprefix("teacher-"))), {}
    else:
        recipe = idle(BOOT, "student") if arm == "null" else BOOT
        steps = 20 if arm == "null" else 400 if quick else STEPS
        more: dict[str, Any] = {"boundary": 0.0} if arm == "no-boundary" else {}
        run = learned(recipe, teacher=teacher, steps=steps, batch=BATCH, student=RATE, average=0.99, seed=seed,
                      log_every=100, **more)
        x = run.model.sample(N, drawn_from(seed))
        told = {INPUTS: float(len(run.record["inputs"])), "evaluations in training": run.evaluations / (steps * BATCH)}
    return {DISTANCE: apart(x, ends(teacher, seed)), "energy distance x 1000": 1000 * far(x, GRID), **told}


CLAIM = Claim(
    name="boot",
    arms={"boot": "subject", "teacher-8": "control", "teacher-4": "control", "null": "null",
          **dict.fromkeys(("no-boundary", "teacher-1", "teacher-2", "teacher-16"), "reported")},
    measure=measure,
    checks=[
        Check.at_most(DISTANCE, 1.1, "teacher-8", says="at most 1.1 times that of eight steps"),
        Check.at_most(DISTANCE, 1, "teacher-4", says="below that of four steps"),
        Check(INPUTS, "none; margin: 1 less their number", lambda mine, arms: 1 - mine[INPUTS]),
    ],
    budget="1000 updates of 128 samples; the teacher 2000 of 256; null 20",
    quick="400 updates, teacher 1000",
)

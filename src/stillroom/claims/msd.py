"""Five students of 5 modes each are nearer to a mixture than one student of the same size that answers for all 25.

The teacher is the exact score of a grid of 25 Gaussians (`grid:5:0.1`), each a class. The fake scores start from a flow
of 64 channels that learned to draw it; the students have 16, so that nothing can be copied: they first learn what the
teacher answers (500 steps of teacher score matching) and then move 500 times by `dmd`, each with a batch of its own.
Claimed of five students (`five`):

- the energy distance of their samples to the mixture, class by class, is at most 0.8 times that of one student of the
  same size after as many updates of it (`one`).

Five students take four times the evaluations (five times those of students), which the table prints, and hold five
times the weights; a sample costs the same. So `one-long` is reported beside them, one student with five times the
updates in both stages, and `five-unmatched`, which begin at random. Nothing is judged by these. The arm `null` is five
students whose objectives in the second stage are multiplied by zero: what matching alone gives. `truth` is fresh draws
of the mixture.

How to read it: the classes are what is shared out, not the work. With as many evaluations in all, one student of five
times the updates comes nearer than five (`one-long`); five have theirs in parallel.

Not claimed: that five students beat one of five times the size, or one that has five times the updates.
"""

from functools import cache, reduce

from torch import Tensor

from stillroom.claims._mixtures import draw, far, far_by_class, flow_on, mixture
from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import EVALUATIONS, idle, learned
from stillroom.measure import held_modes
from stillroom.recipes.msd import MSD
from stillroom.settings import Optimizer

SPEC, N, MATCH, UPDATES = "grid:5:0.1", 5000, 500, 500
RATE = Optimizer(lr=1e-3, clip=1.0, warmup=50, decay="cosine")
KEY = "energy distance, by class"


@cache
def origin(seed: int, quick: bool) -> str:
    return flow_on(SPEC, seed, 1000 if quick else 1500, width=64)


def drawn(arm: str, seed: int, quick: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Samples, their classes, and what they cost."""
    if arm == "truth":
        return *draw(SPEC, N, "truth", seed), {}
    count, longer = 5 if arm.startswith(("five", "null")) else 1, 5 if arm == "one-long" else 1
    match = 1 if arm == "five-unmatched" else longer * MATCH
    updates = 10 if arm == "null" else longer * UPDATES // (2 if quick else 1)
    recipe = reduce(idle, [f"student {k}" for k in range(count)], MSD) if arm == "null" else MSD
    run = learned(recipe, teacher=SPEC, origin=origin(seed, quick), students=count, width=16, match_steps=match,
                  steps=match + 2 * updates, batch=128, student=RATE, matching=RATE, average=0.99, seed=seed,
                  log_every=100, options=("every=2", "score.lr=1e-3"))
    student, spent = run.model, run.record["evaluations"]
    own = sum(n for name, n in spent.items() if name.startswith("student"))
    return student.sample(N, seed), student.labels(0, N), {
        EVALUATIONS: run.evaluations / 1e6, "of students": own / 1e6,
        "weights of a student": sum(p.numel() for p in student.students[0].parameters()),
    }


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    x, y, cost = drawn(arm, seed, quick)
    law = mixture(SPEC)
    held = held_modes(x, law.means, 3 * float(law.stds.max()))
    return {KEY: far_by_class(x, y, SPEC), "energy distance": far(x, SPEC), "modes": held.modes,
            "within 3 deviations": held.good, **cost}


CLAIM = Claim(
    name="msd",
    arms={"five": "subject", "one": "control", "null": "null",
          **dict.fromkeys(("one-long", "five-unmatched", "truth"), "reported")},
    measure=measure,
    checks=[Check.at_most(KEY, 0.8, "one", KEY, "at most 0.8 times that of `one`")],
    budget="500 steps of matching and 500 updates of 128 samples for each student; one-long five times both; the "
           "origin 1500 steps of 256",
    quick="250 updates after the matching, the origin 1000 steps",
)

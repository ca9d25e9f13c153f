"""SwiftBrush keeps the spread within a class that the SDS form loses, with one set of weights for both scores.

The teacher is a small class-conditional flow of eight Gaussians on a ring (radius 1, standard deviation 0.15, each a
class), the student starts from it and takes 800 updates of 256 samples, and so do the adapters of rank 8 on the
teacher's weights, without guidance. Claimed:

- the standard deviation within the classes is at least 60 % of the truth's;
- the control `sds`, which is the same with the injected noise in the place of the adapters' answer, comes to at most a
  quarter of that;
- the energy distance to the ring is at most half that of `sds`, so that the spread is not that of samples gone astray;
- the adapters are less than 15 % of the numbers that a fake score with weights of its own would train.

A step asks the student once; for the gap the teacher and the fake score, and for its loss the fake score once more:
four evaluations, three of them of one set of weights. `sds` asks the student and the teacher; its adapters learn and
are not asked. Reported, and judged by nothing: a fake score with weights of its own (`full`), the teacher at 18 steps
of Heun's method and at one. The arm `null` is SwiftBrush whose gap is multiplied by zero: the teacher at one step.

Not claimed: anything about pictures, text or guidance, or that adapters follow the student as closely as a whole
network does. The rates, 1e-3 and 2e-3, were chosen on seed 1.
"""

from typing import Any

import torch
from torch import Tensor

from stillroom import train
from stillroom.claims._mixtures import far, flow_on, mixture, spread
from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import EVALUATIONS, idle, learned
from stillroom.recipes.swiftbrush import SwiftBrush
from stillroom.settings import Optimizer
from stillroom.train import Role

RING, N, STEPS = "ring:8:0.15", 4000, 800
WIDE, FAR, SHARE = "spread / truth's", "energy distance x 1000", "fake's share"
RATES: dict[str, Any] = {"student": Optimizer(lr=1e-3, clip=1.0, warmup=50, decay="cosine"),
                         "score": Optimizer(lr=2e-3, clip=1.0)}


class Injected(SwiftBrush):
    """The SDS form: of the injected noise, x0 is x itself."""

    def own(self, x: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return x.detach()


class Whole(SwiftBrush):
    """A fake score with weights of its own."""

    def begun_on_teacher(self, rank: int):
        return self.begun_whole()

    def roles(self):
        return {**super().roles(), "fake": Role(self.fake, self.settings.score)}


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    teacher = flow_on(RING, seed, 1000 if quick else 2000)
    if arm.startswith("teacher"):
        return seen(train.load(teacher).sample(N, seed, steps=1 if arm == "teacher-1" else None))
    recipe = {"swiftbrush": SwiftBrush, "sds": Injected, "full": Whole, "null": idle(SwiftBrush, "student")}[arm]
    steps = 20 if arm == "null" else 400 if quick else STEPS
    run = learned(recipe, teacher=teacher, steps=steps, batch=256, average=0.995, seed=seed, log_every=100, **RATES)
    numbers = run.record["parameters"]
    return seen(run.model.sample(N, seed)) | {SHARE: numbers["fake"] / numbers["student"],
                                              EVALUATIONS: run.evaluations / 1e6}


def seen(x: Tensor) -> dict[str, float]:
    truth = float(mixture(RING).stds[0])
    return {WIDE: spread(x, torch.arange(N) % 8) / truth, FAR: 1000 * far(x, RING)}


CLAIM = Claim(
    name="swiftbrush",
    arms={"swiftbrush": "subject", "sds": "control", "null": "null",
          **dict.fromkeys(("full", "teacher", "teacher-1"), "reported")},
    measure=measure,
    checks=[
        Check(WIDE, "at least 0.6; margin: it less 0.6", lambda mine, arms: mine[WIDE] - 0.6),
        Check(f"{WIDE}, against sds", "that of the SDS form at most a quarter; margin: 0.25 less the ratio",
              lambda mine, arms: 0.25 - arms["sds"][WIDE] / mine[WIDE]),
        Check.at_most(FAR, 0.5, "sds", says="at most half that of the SDS form"),
        Check(SHARE, "less than 0.15 of the teacher's numbers; margin: 0.15 less it",
              lambda mine, arms: 0.15 - mine[SHARE]),
    ],
    budget="800 steps of 256 samples, in each of which student and fake score move once; the teachers 2000 of 256; "
           "null 20 steps",
    quick="400 steps, teachers 1000",
)

"""Drifting beats endpoint regression as a way to one step, in representation latents and in others.

On the digits in four latent spaces of 32 numbers (a classifier's features with a noise-augmented decoder, which is what
a representation autoencoder is; a variational autoencoder; principal components, whitened and raw), a class-conditional
flow is the teacher, and every student starts from its network. All take 800 updates of 320 samples. Samples are
decoded, and judged by features of one classifier that no space was made of: Fréchet distance to the training digits,
and coverage beside it. Claimed of drifting, whose positives are samples of the teacher, and which compares latents as
they are, without a feature net, in the released form:

- its Fréchet distance is below that of endpoint regression in each of the four spaces.

Reported, and judged by nothing: the same with a feature net (`drifting-features`: the latents, and what a classifier of
them, learned with the labels on the same latents, has inside; the judge, a classifier of pixels, may favour it); the
teacher at 50, 8, 2 and 1 steps; consistency distillation; distribution matching (two updates of the fake score for one
of the student); drifting with real positives (`drifting-real`), and without a teacher (`drifting-scratch`), and in the
separate form that the recipe takes by default, with real positives (`drifting-separate`), in as many steps; real digits
of the test set in the place of samples (`real`). Also the seconds of the processor that each took, and of the spaces
the Fisher ratio of the classes, the participation ratio within them, the straightness of the teacher's trajectories and
kappa (the labels as the grouping): what was predicted, beside what came.
The arm `null` is drifting whose loss is multiplied by zero: the teacher at one step.

Not claimed: that curvature or isotropy predict anything here; that a variational autoencoder's space makes drifting
fail (32 numbers are few); that students at their best rates would stand in the same order: the rate, 1e-3, was chosen
once for all, on seed 1.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from stillroom import train
from stillroom.claims._digits import CLASSES, NAMES, feature_net, features, pixels, space
from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import idle, learned, run_in, shared_place
from stillroom.flows import Flow
from stillroom.match.taps import Vectors, identity, placed
from stillroom.measure import geometry, groups, panel, trajectories
from stillroom.paths import uniform_grid
from stillroom.recipes.consistency import Consistency
from stillroom.recipes.dmd import DMD
from stillroom.recipes.drifting import Drifting, Field
from stillroom.recipes.endpoint import Endpoint
from stillroom.recipes.flow import FlowMatching
from stillroom.settings import Optimizer

N, STEPS = 2000, 800
RATE = Optimizer(lr=1e-3, clip=1.0, warmup=50, decay="cosine")
DATA = {"data": "given", "size": 1}
SHARED = {"batch": 320, "student": RATE, "average": 0.99}
DRIFTING = {**SHARED, **DATA, "groups": CLASSES, "support": 64, "bank": 128,
            "field": Field(coupling="joint", x_softmax=True)}


def comparing(maps: Callable[[Tensor], list[Tensor]]) -> type:
    """Drifting that compares a net's maps beside the samples."""

    class Comparing(Drifting):
        def compared(self):
            def phi(x: Tensor, t: Tensor, y: Tensor | None) -> Vectors:
                return {**identity(x), **{f"features {i}": placed(m) for i, m in enumerate(maps(x))}}

            return phi

    return Comparing


@cache
def teacher(name: str, seed: int, quick: bool) -> str:
    here = space(name, seed)
    out, steps = shared_place() / f"{name}-{seed}", 1500 if quick else 3000
    return str(run_in(out, FlowMatching, {"data": (here.z, here.y)}, **DATA, width=256, depth=3, steps=steps, batch=256,
                      model=RATE, average=0.99, seed=seed))


def drawn(arm: str, name: str, seed: int, quick: bool) -> tuple[Tensor, float]:
    """Latents [N, 32], and the seconds that the student took to learn."""
    here, taught = space(name, seed), teacher(name, seed, quick)
    if arm.startswith("teacher-"):
        flow = train.load(taught)
        return flow.sample(N, seed, steps=int(arm.removeprefix("teacher-"))), 0.0
    subject = {**DRIFTING, "teacher": taught, "positives": "teacher", "teacher_samples": 3000}
    recipe, settings = {
        "drifting": (Drifting, subject),
        "drifting-features": (comparing(feature_net(name, seed)), subject),
        "drifting-real": (Drifting, {**DRIFTING, "teacher": taught}),
        "drifting-separate": (Drifting, {**DRIFTING, "teacher": taught, "field": Field()}),
        "drifting-scratch": (Drifting, {**DRIFTING, "width": 256, "depth": 3}),
        "endpoint": (Endpoint, {**SHARED, "teacher": taught, "pairs": 3000}),
        "consistency": (Consistency, {**SHARED, **DATA, "teacher": taught}),
        "dmd": (DMD, {**SHARED, "teacher": taught, "score": RATE}),
        "null": (idle(Drifting, "student"), {**DRIFTING, "teacher": taught}),
    }[arm]
    steps = (20 if arm == "null" else 200 if quick else STEPS) * (2 if arm == "dmd" else 1)
    given = {"data": (here.z, here.y)} if recipe.inputs else None
    start = time.process_time()
    student = learned(recipe, given, steps=steps, seed=seed, **settings).model
    return student.sample(N, seed), time.process_time() - start


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in NAMES:
        z, seconds = (None, 0.0) if arm == "real" else drawn(arm, name, seed, quick)
        x = pixels("test")[0] if z is None else space(name, seed).decode(z)
        seen = panel(features(x), features(pixels("train")[0]), seed)
        found |= {f"FD, {name}": seen["frechet"], f"coverage, {name}": seen["coverage"]}
        if seconds:
            found[f"seconds, {name}"] = seconds
        if arm == "teacher-50":
            found |= geometry_of(name, seed, quick)
    return found


def geometry_of(name: str, seed: int, quick: bool) -> dict[str, float]:
    """What should tell beforehand."""
    here, flow = space(name, seed), train.load(teacher(name, seed, quick))
    assert isinstance(flow, Flow)
    cloud = geometry.cloud_of(here.z, here.y, "element", "after", limit=len(here.z))
    grouping = groups.by_labels(cloud)
    y = flow.labels(0, 512)
    noise = torch.randn(512, *flow.shape, generator=torch.Generator().manual_seed(seed))
    bends = trajectories(lambda x, t: flow.denoiser.v(x, t, y), noise, uniform_grid(50))
    return {
        f"kappa at 0.02, {name}": groups.kappa(grouping.eta, 0.02),
        f"Fisher ratio, {name}": geometry.classes(cloud).fisher,
        f"participation within classes, {name}": geometry.spectrum(cloud, "within class").participation,
        f"straightness, {name}": bends.straightness,
    }


CLAIM = Claim(
    name="drift-rae",
    recipe="drifting",
    arms={"drifting": "subject", "endpoint": "control", "null": "null",
          **dict.fromkeys(("drifting-features", "drifting-real", "drifting-separate", "drifting-scratch", "dmd",
                           "consistency", "teacher-50", "teacher-8", "teacher-2", "teacher-1", "real"), "reported")},
    measure=measure,
    checks=[Check.at_most(key := f"FD, {name}", 1, "endpoint", key, "below that of endpoint regression")
            for name in NAMES],
    budget="800 updates of 320 samples each; the teachers 3000 of 256",
    quick="200 updates, teachers 1500",
)

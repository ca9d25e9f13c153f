"""VSD keeps the spread that SDS loses: on mixtures of 5 and of 8 modes, the modes keep their width.

512 particles follow the exact score of a ring of Gaussians (radius 1, standard deviation 0.15) from a standard normal
start, once by SDS and once by VSD, each as its recipe does it by default. Claimed of VSD, with a fake score network of
its own (`vsd`) and with one made of LoRA adapters (`vsd-lora`), and on both mixtures:

- its squared MMD to the target is at least 5 times below that of SDS, at the recipe's noise levels (`sds`, t up to
  0.98) and at low ones only (`sds-near`, t up to 0.3);
- the standard deviation within the modes is within 15 % of the truth.

MMD is taken with a Gaussian kernel as wide as the median distance within the target, without bias, so that it can fall
a little below zero; reference is one fixed set of 4000 draws, and one of 20000 for the standard deviation. Besides
these, the total variation between the shares of the modes and theirs in the target, and the energy distance, are shown.
The arm `truth` is 512 fresh draws of the target: what no method need beat. The arm `null` is VSD whose gap is
multiplied by zero.

How to read it: with the noise levels of its recipe, SDS gathers all particles at the centre of the ring, the one mode
of what is left of the density under much noise. That lump is farther from the target than the start is, so that being
closer than `sds` tells little: `null`, which stays at the start, passes that check on 5 modes. The stronger control is
`sds-near`, which comes near the modes. It was added after a first run of these seeds had shown this; its times were
chosen on seed 1, for SDS's good.

Not claimed: anything about images, about guidance above 1 or about teachers that were learned; that VSD is fast (it
trains a second network, and its particles move on every second step); or that its particles are independent draws:
they push each other apart, so that they lie more evenly than chance would have them, and their MMD and shares come out
below those of `truth`.
"""

from typing import Any

import torch
from torch import Tensor

from stillroom.claims.claim import Check, Claim
from stillroom.claims.run import idle, learned
from stillroom.flows import Mixture
from stillroom.measure import energy_distance, median_bandwidth, mmd2, modes, total_variation
from stillroom.recipes.sds import SDS
from stillroom.recipes.vsd import VSD
from stillroom.report import scatter
from stillroom.settings import seed_of

MODES, PARTICLES, STD = (5, 8), 512, 0.15


def ring(k: int) -> Mixture:
    return Mixture.ring(k, std=STD)


def draw(k: int, n: int, *seed: int | str) -> Tensor:
    return ring(k).draw(n, torch.Generator().manual_seed(seed_of(*seed)))[0]


def cloud(arm: str, k: int, seed: int, quick: bool) -> Tensor:
    """[512, 2]"""
    common: dict[str, Any] = {"teacher": f"ring:{k}:{STD}", "batch": PARTICLES, "seed": seed}
    common |= {"steps": 1500} if quick else {}
    match arm:
        case "truth":
            return draw(k, PARTICLES, "truth", seed)
        case "sds":
            return learned(SDS, **common).model
        case "sds-near":
            return learned(SDS, times=(0.02, 0.3), **common).model
        case "null":  # without a gradient Adam does not move at all, so that few steps show what many would
            return learned(idle(VSD, "particles"), **common | dict[str, Any](steps=100)).model
        case "vsd":
            return learned(VSD, **common).model
        case "vsd-lora":
            return learned(VSD, fake="lora", **common).model
    raise ValueError(arm)


def measures(x: Tensor, k: int) -> dict[str, float]:
    reference, means = draw(k, 4000, "reference"), ring(k).means
    mine, truth = modes(x, means), modes(draw(k, 20_000, "modes"), means)
    return {
        f"MMD², {k} modes": float(mmd2(x, reference, median_bandwidth(reference))),
        f"spread / truth's, {k} modes": float(mine.spread / truth.spread),
        f"shares off by, {k} modes": float(total_variation(mine.share, truth.share)),
        f"energy distance, {k} modes": float(energy_distance(x, reference)),
    }


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    return {name: value for k in MODES for name, value in measures(cloud(arm, k, seed, quick), k).items()}


def closer(k: int, control: str) -> Check:
    key = f"MMD², {k} modes"
    says = f"MMD² at most a fifth of that of {control}; margin: 0.2 less the ratio"

    def margin(mine, arms):
        sds = arms[control][key]
        return (sds / 5 - mine[key]) / abs(sds)  # not 0.2 - ratio: below zero, as noise may put it, the sign would turn

    return Check(f"{key}, against {control}", says, margin)


def as_wide(k: int) -> Check:
    key = f"spread / truth's, {k} modes"
    says = "standard deviation within the modes within 15 % of the truth; margin: 0.15 less how far the ratio is from 1"
    return Check(key, says, lambda mine, arms: 0.15 - abs(mine[key] - 1))


def pictures(seed: int):
    k = MODES[-1]

    def density(points):
        return ring(k).log_density(torch.as_tensor(points), torch.zeros(len(points))).exp()

    return scatter({arm.upper(): cloud(arm, k, seed, quick=False) for arm in ("sds", "vsd")}, density)


CLAIM = Claim(
    name="vsd",
    arms={"vsd": "subject", "vsd-lora": "subject", "sds": "control", "sds-near": "control", "null": "null",
          "truth": "reported"},
    measure=measure,
    checks=[check for k in MODES for check in (closer(k, "sds"), closer(k, "sds-near"), as_wide(k))],
    budget="3000 steps of 512 particles, the recipes' defaults; vsd-lora first trains the small network its adapters "
           "stand on, 2000 steps; null 100 steps",
    quick="1500 steps instead of 3000, the particles' decay with them; too few for `vsd`, whose modes are then still "
          "1.2 times too wide (seed 1), so that the quick claim tries the machinery and does not hold",
    pictures=pictures,
)

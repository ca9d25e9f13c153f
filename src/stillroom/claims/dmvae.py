"""Latents of a plain autoencoder, brought to references of several kinds; and how well a small prior then models them.

On the digits, codecs of 32 numbers (2 x 2 latents of 8 channels). `plain`: convolutions, no constraint. From one that
has learned half as long `dmvae` brings the latents to a reference by the gap, and goes on reconstructing: to what a
flow learned of the `ssl` tokenizer's latents (an encoder trained by masking alone, frozen, with a bottleneck learned
for reconstruction), to ten Gaussians (one for each class), to a Gaussian, and to its own latents at noise level 0.3.
Every codec has had as many updates in the end; the last 500 of dmvae's are of the decoder alone. The same small prior,
a flow, then learns each space, and is looked at after a quarter, a half and all of its steps. Claimed:

- the gap reduces the distance to the ssl-type reference and to the mixture (sliced Wasserstein between as many latents
  and samples, less its floor; before is the codec that it begins with, whose channels have mean 0 and deviation 1, so
  that rescaling alone gains nothing);
- over the three looks the prior on the latents that were brought to the ssl-type reference has lower Fréchet distances
  (mean of their logarithms) than the prior on those of the arm `null`, and than the prior on those of a KL autoencoder
  (weight 0.25) that reconstructs as well: of 0.1, 0.2, 0.25 and 0.3 the weight whose held-out training digits of seed 1
  came nearest to those of the codec that was brought to the reference (19.9 dB, and 20.1).

`null` is the gap with weight 0: it goes on reconstructing, as long, and knows no reference. Of its one run the distance
to each of them is taken, so it stands before both checks of distance, and nothing makes it pass them. It cannot pass
`better modelled than null`, whose margin is 0 there. `better modelled than KL` it may pass: a plain autoencoder's
latents are easier to model than those of a KL one already. So that check says that dmvae gains on the ordinary VAE,
and not that the pull is what gains.

Reported, and judged by nothing: the other references; `ssl` itself, `vavae` (plain with VA-VAE's alignment to the same
encoder) and `rae` (that encoder's own wide tokens). Fréchet distances are in features of a classifier, to the training
digits; `real` are test digits.

Not claimed: an order of references, or of any of them against VA-VAE; that digits say anything of photographs.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom import train
from stillroom.claims._digits import features, pixels
from stillroom.claims.claim import Check, Claim, Metrics
from stillroom.claims.run import run_in, shared_place
from stillroom.codecs import Codec
from stillroom.codecs.store import write_store
from stillroom.data import open_source
from stillroom.judge.priors import flow_after, marks
from stillroom.measure import panel, psnr
from stillroom.recipes._masking import Own
from stillroom.recipes.dmvae import DMVAE, ScoreNet, Settings
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.rae import RAE
from stillroom.recipes.tokenizer import Tokenizer
from stillroom.settings import Images, Optimizer

N, BEGUN, PRIOR, MATCHING, EVERY, TUNED = 1500, 1500, 1200, 3000, 3, 500
STEPS = BEGUN + MATCHING // EVERY + TUNED
"""Updates of every codec; those of dmvae begin with one that has had BEGUN of them."""
DATA = {"data": "digits", "size": 8}
RATE = Optimizer(lr=2e-3, clip=1.0, warmup=50, decay="cosine")
OWN = Own(width=64, depth=3, heads=2, painter_width=48, painter_depth=1)
SHAPE = {"patch": 4, "latent": 8, "params": 60_000, "decoder_params": 60_000, "perceptual": 0.0}
KL = 0.25
SHARES = ("a quarter", "a half", "all")
WEIGHT = 2.0
REFERENCES = {"dmvae-ssl": "ssl", "dmvae-gmm": "gmm:10:0.5", "dmvae-gaussian": "gaussian", "dmvae-noised": "noised:0.3"}


def once(name: str, seed: int, make: Callable[[Path], Path]) -> Path:
    out = shared_place() / f"{name}-{seed}"
    return out if out.exists() else make(out)


def steps(quick: bool, count: int) -> int:
    return count // 5 if quick else count


def codec_of(arm: str, seed: int, quick: bool) -> Path:
    """Of an arm; of `begun`, what dmvae begins with."""
    count = steps(quick, BEGUN if arm == "begun" else STEPS)
    learned = {**DATA, "steps": count, "seed": seed, "average": 0.99}
    tokens = {**learned, **SHAPE, "model": RATE}

    def rae(out: Path) -> Path:
        return run_in(out, RAE, **learned, encoder_steps=steps(quick, BEGUN), patch=4, own=OWN, perceptual=0.0, tau=0.3,
                      pretraining=RATE, decoder=RATE)

    def encoder() -> str:
        return str(codec_of("rae", seed, quick))

    if arm in REFERENCES or arm == "null":
        return once(arm, seed, lambda out: run_in(out, DMVAE, **matching(arm, seed, quick)))
    made: dict[str, Callable[[Path], Path]] = {
        "rae": rae,
        "ssl": lambda out: run_in(out, Tokenizer, **tokens, encoder=encoder()),
        **dict.fromkeys(("plain", "begun"), lambda out: run_in(out, Tokenizer, **tokens, encoder="conv")),
        "kl": lambda out: run_in(out, Tokenizer, **tokens, encoder="conv", kl=KL),
        "vavae": lambda out: run_in(out, Tokenizer, **tokens, encoder="conv", align=encoder()),
    }
    return once(arm, seed, made[arm])


def flow_of(arm: str, seed: int, quick: bool) -> Path:
    """The small prior on a codec's latents; that of `ssl` is the reference too."""
    def make(out: Path) -> Path:
        codec = train.load(codec_of(arm, seed, quick))
        store = write_store(out.with_suffix(".latents"), codec, open_source(images := Images(**DATA)), images)
        budget = steps(quick, PRIOR)
        return run_in(out, FlowMatching, data=str(store), size=8, net="dit", width=64, depth=3, patch=1, steps=budget,
                      batch=64, seed=seed, average=0.99, checkpoint_every=budget // 4, keep=4, log_every=budget // 4,
                      model=Optimizer(lr=2e-3, clip=1.0, warmup=50))

    return once(f"flow-{arm}", seed, make)


def matching(arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """Settings that bring the latents of `begun` to the arm's reference."""
    name = REFERENCES.get(arm, "ssl")
    reference = str(flow_of("ssl", seed, quick)) if name == "ssl" else name
    return {**DATA, "codec": str(codec_of("begun", seed, quick)), "reference": reference, "foreign": True,
            "steps": steps(quick, MATCHING), "fake_steps": steps(quick, 500), "decoder_steps": steps(quick, TUNED),
            "every": EVERY, "weight": 0.0 if arm == "null" else WEIGHT, "perceptual": 0.0, "average": 0.99,
            "seed": seed, "score_net": ScoreNet(width=64, depth=3), "model": Optimizer(lr=5e-4, clip=1.0, warmup=50),
            "decoder": RATE, "score": Optimizer(lr=1e-3, clip=1.0, warmup=50)}


def left(told: Mapping[str, Mapping[str, float]]) -> float:
    """Share of the distance that is left, less its floor."""
    before, after, floor = (told[name]["sliced_w2"] for name in ("before", "after", "reference to itself"))
    return (after - floor) / (before - floor)


def left_of_null(arm: str, seed: int, quick: bool) -> float:
    """To the reference of another arm, of latents that no reference has pulled at."""
    settings = Settings(**matching(arm, seed, quick), out=shared_place() / "none", device="cpu")
    data = DMVAE.prepare(settings, {"data": open_source(Images(**DATA))}, print)["data"]
    codec = train.load(codec_of("null", seed, quick))
    return left(DMVAE(settings, data).told(codec))


def seen(x: Tensor, seed: int) -> dict[str, float]:
    found = panel(features(x.flatten(1)), features(pixels("train")[0]), seed)
    return {"FD": found["frechet"], "precision": found["precision"], "recall": found["recall"]}


def as_grey(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True).clamp(-1, 1)


@torch.no_grad()
def modelled(codec: Codec, flow: Path, seed: int, quick: bool) -> dict[str, float]:
    """Reconstruction, and the prior on its way."""
    test = pixels("test")[0].unflatten(1, (1, 8, 8))
    found = {"PSNR": float(psnr(as_grey(codec.reconstruct(test)), test).mean())}
    for share, step in zip(SHARES, marks(steps(quick, PRIOR)), strict=True):
        x = codec.decode(flow_after(flow, step).sample(N, seed))
        found |= {f"{name} after {share}": value for name, value in seen(as_grey(x), seed).items()}
    return found


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    if arm == "real":
        return seen(pixels("test")[0], seed)
    run = codec_of(arm, seed, quick)
    found = modelled(train.load(run), flow_of(arm, seed, quick), seed, quick)
    if arm in REFERENCES or arm == "null":
        card = train.load_product(run).card["distance"]
        found |= {f"distance {when}": card[when]["sliced_w2"] for when in ("before", "after")}
        found |= {"floor": card["reference to itself"]["sliced_w2"], "distance left": left(card)}
    if arm == "null":
        found |= {f"left to {other}": left_of_null(other, seed, quick) for other in REFERENCES}
    return found


def curve(found: Mapping[str, float]) -> float:
    """Mean logarithm of the prior's distances on its way."""
    return sum(math.log(found[f"FD after {share}"]) for share in SHARES) / len(SHARES)


def nearer(arm: str) -> Check:
    """To an arm's reference: of the arm that was brought to it, or of the null arm's own latents."""
    def margin(mine: Metrics, arms: Mapping[str, Metrics]) -> float:
        return 0.5 - (mine[f"left to {arm}"] if f"left to {arm}" in mine else arms[arm]["distance left"])

    return Check(f"nearer to {'ssl' if arm == 'dmvae-ssl' else 'the mixture'}",
                 "less than half of the distance is left; margin: a half less it", margin)


CLAIM = Claim(
    name="dmvae",
    arms={"dmvae-ssl": "subject", "kl": "control", "null": "null", "dmvae-gmm": "reported",
          **dict.fromkeys(("dmvae-gaussian", "dmvae-noised", "plain", "vavae", "ssl", "rae", "real"), "reported")},
    measure=measure,
    checks=[
        nearer("dmvae-ssl"), nearer("dmvae-gmm"),
        Check("better modelled than null", "the prior's Fréchet distances are below those without the pull; margin: "
              "mean logarithm of the ratio over three looks", lambda mine, arms: curve(arms["null"]) - curve(mine)),
        Check("better modelled than KL", "the prior's Fréchet distances are below those on KL latents; margin: mean "
              "logarithm of the ratio over three looks", lambda mine, arms: curve(arms["kl"]) - curve(mine)),
    ],
    budget="3000 updates a codec (dmvae: 1500, 1000 and 500 of the decoder), 1200 steps of each prior",
    quick="a fifth of all steps",
)

"""The same small prior on any codec's latents, and what its samples are like on the way: a flow of fixed size and
budget, looked at after a quarter, a half and all of its steps. One run; its checkpoints hold the averaged weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom import train
from stillroom.codecs import Codec
from stillroom.flows import Flow, check
from stillroom.flows.gate import BINS
from stillroom.measure.coverage import overlap
from stillroom.measure.frechet import Moments, distance_between
from stillroom.measure.images import as_8bit
from stillroom.measure.metrics import NEIGHBOURS, WITH_BALLS
from stillroom.recipes import find
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.flow import Settings as FlowSettings
from stillroom.settings import Optimizer, Refusal
from stillroom.settings.files import read_json
from stillroom.train import checkpoint

LEAST = 4               # steps, of which a quarter is one
AT_ONCE = 256           # samples drawn together
RESAMPLES = 12          # of a bootstrap
COSTLY = 600            # features, above which a Fréchet distance takes seconds and is resampled less often


@dataclass(frozen=True)
class Budget:
    """What the priors of all codecs share."""

    steps: int
    batch: int
    width: int
    depth: int
    tokens: int
    rate: float
    seed: int


def patch_for(budget: Budget, side: int) -> int:
    """Latents a side of one token, the least with which there are no more tokens a side than the budget has: so that
    codecs of any factor get networks of equal cost."""
    return next(p for p in range(1, side + 1) if side % p == 0 and side // p <= budget.tokens)


def prior_settings(budget: Budget, store: Path, side: int, out: Path, device: str) -> FlowSettings:
    quarter = budget.steps // 4
    return FlowSettings(
        out=out, data=str(store), size=side, steps=budget.steps, batch=budget.batch, seed=budget.seed, net="dit",
        width=budget.width, depth=budget.depth, patch=patch_for(budget, side), precision="float32",
        device=device, checkpoint_every=quarter, keep=-(-budget.steps // quarter), log_every=max(1, budget.steps // 10),
        model=Optimizer(lr=budget.rate, clip=1.0, warmup=min(100, quarter)))


def trained(settings: FlowSettings, watch: train.Watch) -> Path:
    """The run's folder: begun, gone on with, or found finished."""
    if (settings.out / "product" / "product.json").is_file():
        return settings.out
    if (settings.out / "settings.toml").is_file():
        return train.resume(settings.out, find, watch=watch)
    return train.start(FlowMatching, settings, "flow", watch=watch)


def marks(steps: int) -> tuple[int, int, int]:
    return steps // 4, 2 * (steps // 4), steps


def flow_after(folder: Path, step: int) -> Flow:
    """The averaged weights as they were after so many steps."""
    flow: Flow = train.load(folder)
    place = folder / "checkpoints" / f"step-{step:08d}"
    if wrong := checkpoint.damage(place):
        raise Refusal(f"{place}: {wrong}; delete {folder} and run the comparison again")
    part = "model/module."
    saved = {k.removeprefix(part): v for k, v in checkpoint.load_tensors(place / "averages.safetensors").items()
             if k.startswith(part)}
    checkpoint.match_names(flow.denoiser.state_dict(), saved, str(place))
    flow.denoiser.load_state_dict(saved)
    return flow


def seconds_of(folder: Path) -> float:
    return float(read_json(folder / "run.json")["seconds"])


@torch.no_grad()
def risks(flow: Flow, z: Tensor, y: Tensor | None) -> dict[str, Any]:
    """On held-out latents, per time: the error in x0 over that of the mean latent, and the loss in v over that of the
    mean velocity. The two differ by what is known of each: v = (x_t - x0) / t on the linear path."""
    ratios = check(flow.denoiser, z, y).ratios
    variance = float((z - z.mean(0)).square().mean())
    v = [r * variance / t**2 / (1 + variance) for r, t in zip(ratios, BINS, strict=True)]
    return {"times": list(BINS), "x0": list(ratios), "v": v, "mean": sum(v) / len(v), "n": len(z)}


# ---- samples ----

Features = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] -> vectors [B, D]."""


@torch.no_grad()
def drawn(flow: Flow, codec: Codec, features: Features, n: int, seed: int, y: Tensor | None, guidance: float,
          steps: int, shown: int) -> tuple[Tensor, Tensor]:
    """Features [n, D] of decoded samples, rounded as a file would, and the first pictures. `y`: labels to draw by."""
    vectors, pictures = list[Tensor](), list[Tensor]()
    for first in range(0, n, AT_ONCE):
        count = min(AT_ONCE, n - first)
        labels = None if y is None or flow.classes is None else y[torch.arange(first, first + count) % len(y)]
        z = flow.sample(count, seed, labels, guidance, steps, AT_ONCE, first).to(codec.device)
        for part in z.split(64):
            x = as_8bit(codec.decode(part)).cpu()
            vectors.append(features(x))
            if sum(map(len, pictures)) < shown:
                pictures.append(x)
    return torch.cat(vectors), torch.cat(pictures)[:shown]


def against(x: Tensor, real: Tensor, seed: int) -> dict[str, float]:
    """Samples' features [n, D] against real ones'. The deviation is a bootstrap's over the samples: it says how much
    other samples of the same prior would move the distance, and nothing of another prior."""
    moments = Moments(real.shape[1]).add(real)
    draws = torch.Generator().manual_seed(seed)
    again = [frechet(x[torch.randint(len(x), (len(x),), generator=draws)], moments)
             for _ in range(RESAMPLES if x.shape[1] <= COSTLY else 4)]
    n = min(len(x), len(real), WITH_BALLS)
    if n <= NEIGHBOURS:
        raise Refusal(f"{n} samples: precision and recall by {NEIGHBOURS} neighbours need more")
    shared = overlap(real[torch.randperm(len(real), generator=draws)[:n]], x[:n], NEIGHBOURS)
    return {"frechet": frechet(x, moments), "deviation": float(torch.tensor(again).std()),
            "precision": shared.precision, "recall": shared.recall, "n": len(x)}


def frechet(x: Tensor, moments: Moments) -> float:
    return distance_between(Moments(x.shape[1]).add(x), moments)


def generation(folder: Path, steps: int, codec: Codec, features: Features, real: Tensor, n: int, seed: int,
               y: Tensor | None, guidance: float, sampler_steps: int, shown: int,
               tell: Callable[[str], None]) -> tuple[list[dict[str, Any]], Mapping[str, Tensor]]:
    """A row for each checkpoint, without guidance and, where there are classes, with it; the last ones' pictures."""
    rows, pictures = list[dict[str, Any]](), dict[str, Tensor]()
    for step in marks(steps):
        flow = flow_after(folder, step).to(codec.device)
        for scale in dict.fromkeys((1.0, guidance) if flow.classes else (1.0,)):
            x, some = drawn(flow, codec, features, n, seed, y, scale, sampler_steps, shown)
            rows.append({"step": step, "guidance": scale, **against(x, real, seed)})
            pictures["samples" if scale == 1 else "guided"] = some
            tell(f"after {step} steps, guidance {scale:g}: Fréchet distance {rows[-1]['frechet']:.4g}")
    return rows, pictures

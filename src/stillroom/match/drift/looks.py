"""What to look at beside the loss, which does not tell: how many samples a kernel hears, how large the field of real
samples among real ones is. It costs two more fields: for steps that are logged."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.match.drift.affinity import LOG2_E, Kernel, log2_kernel, slopes
from stillroom.match.drift.field import LEAST_SCALE, LEAST_SQUARE, MASK, RELEASED, drift
from stillroom.match.drift.problems import Weights, posed, without_autocast
from stillroom.settings import Refusal

SHARES = (0.05, 0.25, 0.8)
COLDEST, HOTTEST = 0.005, 1.0
"""Below, logits of a few hundred leave every sample its nearest target; above, the kernel is flat."""


def diagnose(
    x: Tensor, positives: Tensor, negatives: Tensor | None = None, *, temperatures: Sequence[float] = RELEASED,
    kernel: Kernel = "laplace", weights: Weights | None = None, self_mask: bool = True, seed: int = 0, **form: Any,
) -> dict[str, Tensor]:
    """Of the field that `drift` gives for the same arguments: [K], one for each temperature, unless said otherwise.

    rms: of the raw forces, in units of scale. floor, with four positives or more: the same of real samples among real
    ones, `real_floor`. positives, negatives: how many of each a sample hears, 1 / sum p^2 of the softmax over that
    side, mean over samples. gate: mean of D (1 - D), D the share of positives in the softmax over all targets; the
    joint form's force vanishes with it. cosine, []: of the whole field with the difference of the means of positives
    and negatives, mean over samples; near 1, the field moves means and nothing else. scale, []: s.
    """
    form = {"temperatures": temperatures, "kernel": kernel, "self_mask": self_mask, **form}
    found = drift(x, positives, negatives, weights=weights, **form)
    with torch.no_grad(), without_autocast(x):
        problems = posed(x, positives, negatives, weights, 0, LEAST_SQUARE)
        targets, split = problems.targets, problems.split
        if self_mask:
            problems.own().fill_(LEAST_SQUARE**0.5)
        unit = max(problems.mean_distance(), LEAST_SCALE)
        if self_mask:
            problems.own().add_(MASK * unit)
        w = targets.new_ones(targets.shape[:2]) if problems.weights is None else problems.weights
        gates, heard = [], ([], [])
        for slope in slopes(targets, [r * unit for r in temperatures]):
            logits = log2_kernel(problems.distance, slope, kernel) / LOG2_E + w.log()[:, None]      # [B, N, M]
            sides = logits.tensor_split([split], 2)
            odds = sides[1].logsumexp(2) - sides[0].logsumexp(2)                                    # [B, N]
            gates.append((odds.sigmoid() * (-odds).sigmoid()).mean())
            for side, counts in zip(sides, heard, strict=True):
                counts.append(effective(side.softmax(2).nan_to_num()).mean())
        push, pull = (weighted_mean(v, u) for v, u in zip(targets.tensor_split([split], 1), w.tensor_split([split], 1),
                                                          strict=True))
        cosine = F.cosine_similarity(found.vector, pull - push, dim=2).mean()
    looks = {"gate": torch.stack(gates), "negatives": torch.stack(heard[0]), "positives": torch.stack(heard[1])}
    if positives.shape[1] >= 4:
        looks["floor"] = real_floor(positives, seed=seed, **form)
    return {**found.stats, **looks, "cosine": cosine, "scale": found.scale}


def effective(p: Tensor) -> Tensor:
    """1 / sum p^2 of what sums to one, 0 of zeros."""
    return p.sum(2) / p.square().sum(2).clamp(min=torch.finfo(p.dtype).tiny)


def weighted_mean(v: Tensor, w: Tensor) -> Tensor:
    """[B, m, C], [B, m] -> [B, 1, C]."""
    return (w[:, None] @ v) / w.sum(1).clamp(min=torch.finfo(w.dtype).tiny)[:, None, None]


def real_floor(positives: Tensor, *, seed: int = 0, **form: Any) -> Tensor:
    """[K]: rms of the raw forces on one random half of the positives, P / 2 samples, that the other half exerts.

    It is what sampling alone leaves of a field. Its square falls as 1 / N + 1 / P: halves of a set of P samples give
    sqrt(2) times what N = P generated ones would at their best; give 2 P real ones to see that. A generator whose field
    is smaller than this has contracted.
    """
    if positives.ndim != 3 or positives.shape[1] < 4:
        raise Refusal("drifting: a floor needs two halves of two samples or more, not positives "
                      f"{list(positives.shape)}")
    order = torch.randperm(positives.shape[1], generator=torch.Generator().manual_seed(seed)).to(positives.device)
    half = positives.shape[1] // 2
    return drift(positives[:, order[:half]], positives[:, order[half:2 * half]], **form).stats["rms"]


def temperature_for(pr: float, n: int, heard: float) -> float:
    """R = 1 / sqrt(2 pr ln(n / n*)), at which about n* of n targets are heard, where they spread in `pr` dimensions
    (their participation ratio). Ours: logits of Gaussian data are about Gaussian themselves, of deviation
    1 / (R sqrt(2 pr)). A quarter of that variance is the sample's own, the same for all its targets, so that rather
    (n* / n)^(3/4) of them are heard."""
    if not 0 < heard < n:
        raise Refusal(f"{heard:g} of {n} samples cannot be what a kernel sees: ask for more than 0 and fewer than all")
    return 1 / math.sqrt(2 * pr * math.log(n / heard))


def auto_temperatures(pr: float, n: int, share: Sequence[float] = SHARES) -> tuple[float, ...]:
    """Temperatures at which about these shares of n targets are heard, at least 2 of them and at most n - 1; each is
    kept within 0.005 and 1."""
    if not 1 <= pr < math.inf or n < 4:
        raise Refusal(f"drifting: temperatures of {n} samples that spread in {pr:g} dimensions: four samples or more, "
                      "and one dimension or more, are needed")
    if not share or not all(0 < one < 1 for one in share):
        raise Refusal(f"drifting: shares {list(share)}: numbers between 0 and 1 are needed")
    heard = [min(max(one * n, 2), n - 1) for one in share]
    return tuple(min(max(temperature_for(pr, n, one), COLDEST), HOTTEST) for one in heard)

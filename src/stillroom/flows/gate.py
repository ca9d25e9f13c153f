"""A teacher must earn its place: its risk in x0, per time, against that of the best constant, and of an untrained net.

The second matters where a zero answer already denoises: alpha x_t ("angular") is the posterior mean for white data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.flows.denoiser import Denoises
from stillroom.paths import convert
from stillroom.settings import Refusal

BINS = tuple((i + 0.5) / 10 for i in range(10))
"""Centres of ten time bins of the linear path; other paths are asked at the same noise ratio sigma/alpha."""
MEAN_LIMIT, BIN_LIMIT, MEAN_UNTIL = 0.9, 1.02, 0.7


@dataclass(frozen=True)
class Verdict:
    ratios: tuple[float, ...]  # risk of the denoiser over risk of the data mean, one per bin
    untrained: tuple[float, ...]  # the same of a network that answers 0

    @property
    def mean(self) -> float:
        """Over the bins up to MEAN_UNTIL."""
        return sum(self._kept(self.ratios)) / len(self._kept(self.ratios))

    @property
    def over_untrained(self) -> float:
        """The mean, over the same bins, of the risk over that of the network that answers 0."""
        both = list(zip(self._kept(self.ratios), self._kept(self.untrained), strict=True))
        return sum(a / b for a, b in both) / len(both)

    @property
    def passed(self) -> bool:
        return self.mean < MEAN_LIMIT and max(self.ratios) < BIN_LIMIT and self.over_untrained < MEAN_LIMIT

    @staticmethod
    def _kept(ratios: tuple[float, ...]) -> list[float]:
        return [r for t, r in zip(BINS, ratios, strict=True) if t <= MEAN_UNTIL]


@torch.no_grad()
def check(denoiser: Denoises, x0: Tensor, y: Tensor | None = None, seed: int = 0) -> Verdict:
    """The ratio of risks in every bin. An untrained network answers about as well as the data mean, or worse."""
    generator = torch.Generator(x0.device).manual_seed(seed)
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    best_constant = (x0 - x0.mean(0)).square().mean()
    ratios, untrained = [], []
    for centre in BINS:
        ratio = torch.full((len(x0),), centre / (1 - centre), device=x0.device)
        t = denoiser.path.time(ratio).clamp(max=1.0)  # a path may end before this much noise
        x_t = denoiser.path.noise(x0, t, eps)
        zero = convert(torch.zeros_like(x_t), x_t, denoiser.path.over(t, x_t), denoiser.prediction, "x0")
        for answer, into in ((denoiser.x0(x_t, t, y), ratios), (zero, untrained)):
            into.append(float((answer - x0).square().mean() / best_constant))
    return Verdict(tuple(ratios), tuple(untrained))


def require(denoiser: Denoises, x0: Tensor, y: Tensor | None, name: str) -> Verdict:
    """`check`, refusing a teacher that fails it."""
    verdict = check(denoiser, x0, y)
    if not verdict.passed:
        worst = max(range(len(BINS)), key=lambda i: verdict.ratios[i])
        raise Refusal(
            f"{name} fails the teacher gate: its error in x0 is {verdict.mean:.2f} times that of the data mean "
            f"for t <= {MEAN_UNTIL} (must be below {MEAN_LIMIT}) and {verdict.ratios[worst]:.2f} times at "
            f"t = {BINS[worst]:.2f} (below {BIN_LIMIT}), and {verdict.over_untrained:.2f} times that of an untrained "
            f"network (below {MEAN_LIMIT}); train it longer, or give the data it was trained on"
        )
    return verdict

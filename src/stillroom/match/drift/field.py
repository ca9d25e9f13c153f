"""The drifting field, its loss, and the raw field at one temperature."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm

from stillroom.match.drift.affinity import Coupling, Form, Kernel, checked_form, stacks, times
from stillroom.match.drift.problems import NotFinite, Problems, Weights, joined, posed, quadratic, without_autocast
from stillroom.paths import at_least_float32
from stillroom.settings import Refusal

RELEASED = (0.02, 0.05, 0.2)
LEAST_AFFINITY = 1e-3
"""The released code clamps the product of the softmaxes at 1e-6: every pair keeps a little, a weak pull to the mean."""
LEAST_SQUARE = 1e-8     # of squared distances, and of the mean square of a force
LEAST_SCALE = 1e-3      # of the mean distance, and of s
MASK = 100.0            # what a sample's distance from itself gains, in mean distances
CANCELLED = 1e3         # roundings: a force no larger, beside the pull that it is the rest of, is none
UNSURE = 1e-2           # of a force beside its pull: below it a Gram matrix would round too much


class Drift(NamedTuple):
    vector: Tensor              # [problems, N, C], in units of scale
    scale: Tensor               # []: s
    stats: dict[str, Tensor]    # "rms" [temperatures]: of every V_R before it is divided by it, in units of scale


def drift(
    x: Tensor, positives: Tensor, negatives: Tensor | None = None, *, temperatures: Sequence[float] = RELEASED,
    kernel: Kernel = "laplace", coupling: Coupling = "joint", x_softmax: bool = True, weights: Weights | None = None,
    affinity_floor: float | None = LEAST_AFFINITY, self_mask: bool = True, normalise: bool = True,
) -> Drift:
    """x [problems, N, C] among positives [problems, P, C] and further negatives [problems, U, C].

    The defaults are the released algorithm, which multiplies weights into A after both softmaxes; the paper's text adds
    their logarithms before. Problems share s and the rms of the forces, nothing else. `normalise=False` adds the V_R up
    as they are, in units of s. Two departures, where the released code would follow its floor or its rounding:
    - a sample that nothing drives away (N = 1, itself masked, no negatives) stays where it is;
    - a force whose pull and push cancel to within rounding is zero.
    """
    form = checked_form(kernel, coupling, x_softmax, affinity_floor, temperatures)
    with torch.no_grad(), without_autocast(x):
        problems = posed(x, positives, negatives, weights, len(temperatures), LEAST_SQUARE)
        own = problems.own()
        if self_mask:
            own.fill_(LEAST_SQUARE**0.5)
        mean = problems.mean_distance()
        unit, scale = max(mean, LEAST_SCALE), max(mean / x.shape[2]**0.5, LEAST_SCALE)
        if self_mask:
            own.add_(MASK * unit)
        if self_mask and problems.split == 1:
            vector, rms = torch.zeros_like(problems.targets[:, :1]), [0.0] * len(temperatures)
        else:
            vector, rms = superposed(problems, [r * unit for r in temperatures], form, scale, normalise)
        return Drift(vector, vector.new_full((), scale), {"rms": vector.new_tensor(rms)})


def drift_or_nan(x: Tensor, positives: Tensor, negatives: Tensor | None = None, **form: Any) -> Drift:
    """`drift` of samples that something learns to make. Where they are not finite, or too large for distances, it is
    NaN, and so is their loss, at which a loop stops as at any other; positives and negatives are refused still."""
    try:
        return drift(x, positives, negatives, **form)
    except NotFinite:
        with torch.no_grad(), without_autocast(x):
            posed(positives, positives, negatives, None, 0, LEAST_SQUARE).mean_distance()
        vector = torch.full_like(at_least_float32(x.detach()), math.nan)
        temperatures = form.get("temperatures", RELEASED)
        return Drift(vector, vector.new_tensor(math.nan), {"rms": vector.new_full((len(temperatures),), math.nan)})


def field(
    x: Tensor, positives: Tensor, negatives: Tensor | None = None, *, tau: float, kernel: Kernel = "laplace",
    coupling: Coupling = "joint", x_softmax: bool = False, weights: Weights | None = None,
    affinity_floor: float | None = None, self_mask: bool = False,
) -> Tensor:
    """[problems, N, C]: the one force of temperature tau, both in the units of x, as theory has it: nothing is scaled,
    normalised, masked or kept above a floor unless asked for. gauss: `separate` is tau^2 times the difference of the
    scores of the two sets' kernel densities, `joint` tau^2 times the gradient of the share p / (p + q) of positives."""
    form = checked_form(kernel, coupling, x_softmax, affinity_floor, [tau])
    with torch.no_grad(), without_autocast(x):
        problems = posed(x, positives, negatives, weights, 0, 0.0)
        problems.mean_distance()        # finite
        problems.own().fill_(1e3 * tau if self_mask else 0)
        if self_mask and problems.split == 1:
            return torch.zeros_like(problems.targets[:, :1])
        return joined([v[:, 0] for part in problems.parts() for v, _ in stacks(part, [tau], form)], 0)


def superposed(problems: Problems, taus: Sequence[float], form: Form, scale: float,
               normalise: bool) -> tuple[Tensor, list[float]]:
    """Sum of the forces V_R, each over its rms, in units of `scale`; and those rms.

    V_R = D T is measured as it is or, where that saves multiplications, by |V_R|^2 = tr D (T T^t) D^t. Then
    coefficients are added up before they meet the targets: one product makes the field, not one for each temperature.
    """
    (b, n, _), c, parts = problems.distance.shape, problems.targets.shape[2], problems.parts()
    made = [list(stacks(part, taus, form)) for part in parts]
    kept = [[d for d, _ in stack] for stack in made]                # of every part: D or V, [b, K', N, M or C]
    pull = rms_of([[norm for _, norm in stack] for stack in made], b * n)
    elements, rms = b * n * c * scale**2, []
    if by_gram := problems.gram is not None:
        norms = [[quadratic(d, part.gram) for d in stack]           # pyright: ignore[reportArgumentType]
                 for part, stack in zip(parts, kept, strict=True)]
        rms = rms_of(norms, elements)
        by_gram = all(f > UNSURE * p for f, p in zip(rms, pull, strict=True))
        if not by_gram:
            kept = [[times(d, part.targets) for d in stack] for part, stack in zip(parts, kept, strict=True)]
    if not by_gram:
        rms = rms_of([[vector_norm(vector_norm(v, dim=3), dim=(0, 2)) for v in stack] for stack in kept], elements)
    least = CANCELLED * torch.finfo(problems.targets.dtype).eps
    by = [0.0 if f <= least * p else 1 / (scale * (max(f, LEAST_SQUARE**0.5) if normalise else 1))
          for f, p in zip(rms, pull, strict=True)]
    vectors = []
    for part, stack in zip(parts, kept, strict=True):
        first, *others = (v for group in stack for v in group.unbind(1))
        v = first * by[0]
        for other, factor in zip(others, by[1:], strict=True):
            v.add_(other, alpha=factor)
        vectors.append(v @ part.targets if by_gram else v)
    return joined(vectors, 0), rms


def rms_of(norms: list[list[Tensor]], count: float) -> list[float]:
    """[K], of each part's groups' [K']: root of the sum of squares over parts, over `count`."""
    parts = [joined(groups, 0).tolist() for groups in norms]
    return [math.sqrt(sum(norm**2 for norm in one) / count) for one in zip(*parts, strict=True)]


def drift_loss(x: Tensor, d: Drift) -> Tensor:
    """[problems]: mean over samples and channels of |x/s - sg(x/s + V)|^2. The normalisers keep it where it is while a
    generator learns: how far that has come is told by the rms of the forces, beside `real_floor`."""
    if x.shape != d.vector.shape:
        raise Refusal(f"drifting: samples {list(x.shape)} with the field of others, {list(d.vector.shape)}")
    return PseudoTarget.apply(x, d.vector, d.scale)     # pyright: ignore[reportReturnType]


class PseudoTarget(torch.autograd.Function):
    """Its value is mean V^2 and its gradient -2 V / (s N C) whatever x is: nothing need be computed of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:      # pyright: ignore
        ctx.save_for_backward(vector)
        size = vector.shape[1] * vector.shape[2]
        ctx.factor, ctx.dtype = -2 / (float(scale) * size), x.dtype
        return vector_norm(vector, dim=(1, 2)).square_().div_(size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:          # pyright: ignore
        vector, = ctx.saved_tensors
        return (vector * (gradient * ctx.factor)[:, None, None]).to(ctx.dtype), None, None

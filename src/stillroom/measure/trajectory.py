"""How straight a flow's trajectories are: what they cost in steps, and what one step of them is worth.

`velocity(x, t)` is dx/dt, t = 1 noise, t = 0 data, t of shape [B]. On the linear path a velocity that never changes is
x1 - x0, and one Euler step is exact.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stillroom.settings import Refusal

TINY = 1e-300       # under what is divided by, where both are 0


class Trajectories(NamedTuple):
    n: int
    steps: int
    straightness: float     # E int |v - (x1 - x0)|^2 dt / E |x1 - x0|^2: 0 is straight, at even speed
    path_ratio: float       # E int |v| dt / E |x1 - x0|: 1 is straight, at any speed
    turning: float          # E sum |v_{k+1} - v_k| / mean |v|: 0 for one direction and speed, about the angle turned
    curvature: float        # E |(I - v v^T / |v|^2) dv/dt| / |v|^2: one over the radius, in the space's own units
    one_step_gap: float     # E |one step - many|^2 / E |many - mean|^2: 1 is what the mean of the data would do
    times: Tensor           # [steps - 1] between the steps, from noise to data
    bends: Tensor           # [steps - 1] E |dv/dt| / mean |v|: turning per unit of time


@torch.no_grad()
def trajectories(velocity: Callable[[Tensor, Tensor], Tensor], x1: Tensor, times: Tensor) -> Trajectories:
    """From x1 at times[0] along falling times, by midpoint steps: second order, two evaluations each, none at the end.

    The chord is the sum of the velocities used, so that on every grid a straight flow has exactly 0 and 1, and no flow
    has less. Straightness is in units of the time that the grid spans.
    """
    times = times.double().cpu()
    if len(times) < 3 or bool((times.diff() >= 0).any()) or len(x1) < 2:
        raise Refusal("trajectories need two samples or more, and two falling steps or more")
    steps, middle = times[:-1] - times[1:], (times[:-1] + times[1:]) / 2
    span, gaps = float(steps.sum()), middle[:-1] - middle[1:]
    zero = x1.new_zeros(len(x1), dtype=torch.float64)
    energy, length, turning, curvature, chord = zero, zero, zero, zero, zero[:, None]
    bends, x, before = [], x1, None
    for k, h in enumerate(steps.tolist()):
        x, v = midpoint_step(velocity, x, float(times[k]), h)
        energy, length, chord = energy + h * v.square().sum(1), length + h * v.norm(dim=1), chord + h * v
        if before is not None:
            change, mean, gap = before - v, (before + v) / 2, float(gaps[k - 1])
            turning = turning + change.norm(dim=1)
            curvature = curvature + across(change / gap, mean) / mean.square().sum(1).clamp(min=TINY)
            bends.append(change.norm(dim=1) / gap)                              # [B]
        before = v
    many, once = x.flatten(1).double(), (x1 - span * velocity(x1, at(float(times[0]), x1))).flatten(1).double()
    moved, spread = chord.square().sum(1), (many - many.mean(0)).square().sum(1).mean()
    require_movement(many, moved, spread)
    speed = (length / span).clamp(min=TINY)
    return Trajectories(
        n=len(x1), steps=len(steps),
        straightness=float((span * energy - moved).mean().clamp(min=0) / moved.mean()),
        path_ratio=float(length.mean() / moved.sqrt().mean()),
        turning=float((turning / speed).mean()),
        curvature=float(curvature.mean() / len(gaps)),
        one_step_gap=float((once - many).square().sum(1).mean() / spread),
        times=(middle[:-1] + middle[1:]) / 2,
        bends=(torch.stack(bends) / speed).mean(1).cpu(),
    )


def midpoint_step(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: float, h: float) -> tuple[Tensor, Tensor]:
    """The next state, and the velocity that led there, [B, D] in float64."""
    halfway = x - h / 2 * velocity(x, at(t, x))
    v = velocity(halfway, at(t - h / 2, x))
    return x - h * v, v.flatten(1).double()


def across(change: Tensor, v: Tensor) -> Tensor:
    """Length of what is at right angles to v: (I - v v^T / |v|^2) change."""
    along = (change * v).sum(1, keepdim=True) / v.square().sum(1, keepdim=True).clamp(min=TINY)
    return (change - along * v).norm(dim=1)


def at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def require_movement(many: Tensor, moved: Tensor, spread: Tensor) -> None:
    if not bool(many.isfinite().all()):
        raise Refusal("the flow's trajectories are not finite; give it more steps, or look at its weights")
    if not float(moved.mean()) > 0:
        raise Refusal("the flow moves nothing: its trajectories end where they began")
    if not float(spread) > 1e-20 * float(moved.mean()):
        raise Refusal("all trajectories of the flow end in one point")

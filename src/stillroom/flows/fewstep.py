"""Generators of a few steps, and one step of them: an answer at time t, and the state that goes on at time s."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.flows.denoiser import Denoiser, Denoises
from stillroom.flows.generator import Draws, Generator, Noise
from stillroom.nets.build import buildable
from stillroom.paths import at_least_float32, convert
from stillroom.settings import Refusal

Move = Literal["renoise", "ode", "jump"]
Gradient = Literal["none", "last", "exit", "all"]


def step(denoiser: Denoises, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor | None, move: Move,
         eps: Tensor | None = None) -> Tensor:
    """x_s from x_t, s < t, in one evaluation of the denoiser.

    renoise: x0 as it is answered, noised anew with eps (consistency models, DMD2). ode: with the noise that the answer
    implies, the DDIM step. jump: a two-time network's own answer at s.
    """
    if move == "jump":
        assert isinstance(denoiser, Denoiser)
        return denoiser.jump(x_t, t, s, y)
    native, x_t = denoiser(x_t, t, y), at_least_float32(x_t)
    now, then = denoiser.path.over(t, x_t), denoiser.path.over(s, x_t)
    x0 = convert(native, x_t, now, denoiser.prediction, "x0")
    if move == "ode":
        eps = convert(native, x_t, now, denoiser.prediction, "eps")
    assert eps is not None
    return then.alpha * x0 + then.sigma * eps


def rollout(denoisers: Sequence[Denoises], z: Tensor, times: Sequence[float], y: Tensor | None, move: Move,
            eps: Callable[[int], Tensor], gradient: Gradient, leave: int | None = None) -> Tensor:
    """From noise z at times[0] to times[-1]; of several denoisers each takes as many steps, one after another. eps(k):
    noise of the k-th state.

    gradient: which steps carry one: none, the last, all, or the `exit`, step `leave`, which goes straight to the end.
    """
    if gradient == "exit":
        assert leave is not None
        times = (*times[: leave + 1], times[-1])
    steps = list(pairwise(times))
    first = {"none": len(steps), "last": len(steps) - 1, "exit": len(steps) - 1, "all": 0}[gradient]
    x = denoisers[0].path.over(torch.full((len(z),), times[0], device=z.device), z).sigma * z
    for k, (t, s) in enumerate(steps):
        each = denoisers[k * len(denoisers) // len(steps)]
        now, then = (torch.full((len(x),), u, device=x.device) for u in (t, s))
        noise = eps(k + 1) if move == "renoise" and s > 0 else torch.zeros_like(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and k >= first):
            x = step(each, x, now, then, y, move, noise)
    return x


@buildable
class FewStep(Generator):
    """Denoisers along a plan of times from noise to 0: one for all of its steps, or experts, each for as many of them.

    plans: by their number of steps; the first is taken unless told otherwise. Guidance is what they learned.
    """

    def __init__(self, denoisers: Sequence[Denoiser], shape: tuple[int, ...], plans: Sequence[Sequence[float]],
                 move: Move):
        super().__init__()
        self.denoisers, self.shape = nn.ModuleList(denoisers), tuple(shape)
        self.move: Move = move
        self.plans: Mapping[int, tuple[float, ...]] = {len(plan) - 1: tuple(plan) for plan in plans}
        self.classes = denoisers[0].classes

    def drawing(self, guidance: float, steps: int | None, weak: nn.Module | None) -> Draws:
        if guidance != 1 or weak is not None:
            raise Refusal("this generator has its guidance built in: leave out --guidance and --weak")
        known = list(self.plans)
        if steps is not None and steps not in self.plans:
            raise Refusal(f"this generator takes {' or '.join(map(str, known))} steps, not {steps}")
        times = self.plans[known[0] if steps is None else steps]
        denoisers = [d for d in self.denoisers if isinstance(d, Denoiser)]

        def draw(noise: Noise, y: Tensor | None) -> Tensor:
            return rollout(denoisers, noise(0), times, y, self.move, noise, "all")

        return draw


@buildable
class Routed(Generator):
    """Students of disjoint classes: each label is answered by one of them (multi-student distillation)."""

    def __init__(self, students: Sequence[Generator], routes: Sequence[int]):
        super().__init__()
        self.students, self.routes = nn.ModuleList(students), tuple(routes)
        self.shape, self.classes = students[0].shape, students[0].classes

    def drawing(self, guidance: float, steps: int | None, weak: nn.Module | None) -> Draws:
        draws = [each.drawing(guidance, steps, weak) for each in self.students if isinstance(each, Generator)]

        def draw(noise: Noise, y: Tensor | None) -> Tensor:
            if y is None:
                raise Refusal("this generator chooses its student by the label: give labels")
            out, route = torch.zeros_like(noise(0)), torch.tensor(self.routes, device=y.device)[y]
            for k, each in enumerate(draws):
                if bool((mine := route == k).any()):
                    out[mine] = each(lambda i, mine=mine: noise(i)[mine], y[mine])
            return out

        return draw

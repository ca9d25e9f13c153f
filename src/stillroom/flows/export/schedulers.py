"""The scheduler of diffusers under which a pipeline draws as a generator does: its times, moves and first noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stillroom.flows.denoiser import Denoiser
from stillroom.flows.fewstep import FewStep, Move
from stillroom.flows.flow import Flow
from stillroom.flows.folders import PREDICTIONS
from stillroom.flows.generator import Draws, Generator
from stillroom.flows.onestep import OneStep
from stillroom.flows.samplers import samplers
from stillroom.paths import Kind, Linear, Path, Tabulated, shift, uniform_grid
from stillroom.settings import Refusal

NAMES: Mapping[Kind, str] = {ours: theirs for theirs, ours in PREDICTIONS.items()}
LARGE = 1e6
"""Of LCM's boundary scalings, c_skip = 0.25 / ((k LARGE)^2 + 0.25): from timestep 1 on they are 0 and 1."""
TRIED = 4
"""Steps at which a flow of many is compared."""


@dataclass(frozen=True)
class Trial:
    """Along these times it draws as the pipeline shall."""

    times: tuple[float, ...]
    draw: Draws

    @property
    def steps(self) -> int:
        return len(self.times) - 1


@dataclass(frozen=True)
class Student:
    """A generator or flow as a pipeline could have it: one network along plans of times."""

    net: nn.Module
    path: Path
    prediction: Kind
    shape: tuple[int, ...]
    plans: Sequence[tuple[float, ...]]
    move: Move
    shift: float
    trials: Sequence[Trial]         # of all plans; of a flow's many steps, of a few


def student_in(model: nn.Module, name: str) -> Student:
    """Refused where a pipeline knows nothing of the kind."""
    if isinstance(model, OneStep):
        if model.asked != 1:
            raise Refusal(f"{name}: its network is asked at time {model.asked:g} and answers for time 1, which no "
                          "scheduler does; it cannot be exported")
        one = Trial((1.0, 0.0), model.drawing(1.0, None, None))
        return Student(model.net, model.path, model.prediction, model.shape, [one.times], "ode", 1.0, [one])
    if isinstance(model, FewStep):
        if len(model.denoisers) > 1:
            raise Refusal(f"{name}: it has {len(model.denoisers)} experts, and a pipeline has one network; it "
                          "cannot be exported")
        if model.move == "jump":
            raise Refusal(f"{name}: its network is told two times, and those of pipelines one; it cannot be exported")
        one = plain(model.denoisers[0], name)
        trials = [Trial(times, model.drawing(1.0, steps, None)) for steps, times in model.plans.items()]
        return Student(one.net, one.path, one.prediction, model.shape, [trial.times for trial in trials], model.move,
                       1.0, trials)
    if isinstance(model, Flow):
        one = plain(model.denoiser, name)
        times, few = (model.times(model.denoiser, k) for k in (model.steps, min(model.steps, TRIED)))

        def draw(noise, y):
            start = one.path.at(few[0]).sigma * noise(0)
            return samplers[model.sampler](one, start, few, y)

        return Student(one.net, one.path, one.prediction, model.shape, [tuple(times.tolist())], "ode", model.shift,
                       [Trial(tuple(few.tolist()), draw)])
    what = type(model).__name__ if isinstance(model, Generator) else f"product of {type(model).__name__}"
    raise Refusal(f"{name}: a {what} is no one network along a plan of times, as pipelines are; it cannot be "
                  "exported")


def plain(denoiser: nn.Module, name: str) -> Denoiser:
    if not isinstance(denoiser, Denoiser) or denoiser.scale_input:
        raise Refusal(f"{name}: a {type(denoiser).__name__} {'that scales its input ' * hasattr(denoiser, 'net')}is "
                      "not asked as networks of pipelines are; it cannot be exported")
    return denoiser


# ---- its scheduler ----


@dataclass(frozen=True)
class Steps:
    scheduler: Any
    calls: Sequence[Mapping[str, Any]]      # what a pipeline is called with, plan by plan
    trials: Sequence[Mapping[str, Any]]     # and trial by trial
    start: float                            # deviation of the noise that it starts from
    rounded: float                          # largest distance between a time of a plan and what the scheduler takes


def steps_of(student: Student, scale: float, takes_times: bool, name: str) -> Steps:
    """`scale`: the network's timestep at time 1. A pipeline that takes no times of its own takes a number of steps."""
    if isinstance(student.path, Linear) and student.prediction == "v":
        return of_flow(student, scale, takes_times, name)
    if isinstance(student.path, Tabulated) and student.prediction in NAMES:
        return of_chain(student, takes_times, name)
    raise Refusal(f"{name}: a network that predicts {student.prediction} on {type(student.path).__name__} has no "
                  "scheduler in diffusers; it cannot be exported")


def of_flow(student: Student, scale: float, takes_times: bool, name: str) -> Steps:
    """Its shift stays with the scheduler, so that an even plan is what the pipeline takes of itself."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if not takes_times:
        raise Refusal(f"{name}: its pipeline takes no times, and those that the scheduler chooses of itself are "
                      "others; it cannot be exported")
    s = best_shift(student)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=round(scale), shift=s, stochastic_sampling=student.move == "renoise")
    calls = []
    for times in every_plan(student):
        sigmas = shift(torch.tensor(times[:-1], dtype=torch.float64), 1 / s).tolist()
        calls.append({"num_inference_steps": len(sigmas), "sigmas": [round(u, 9) for u in sigmas]})
    return Steps(scheduler, calls[: len(student.plans)], calls[len(student.plans) :], 1.0, 0.0)


def every_plan(student: Student) -> list[tuple[float, ...]]:
    return [*student.plans, *(trial.times for trial in student.trials)]


def best_shift(student: Student) -> float:
    """The one under which the first plan is even: that of the teacher, as recipes make plans; 1 of other plans."""
    times = student.plans[0]
    if len(times) < 3 or student.shift != 1:
        return student.shift
    t, u = times[1], 1 - 1 / (len(times) - 1)
    s = t * (1 - u) / (u * (1 - t))
    even = uniform_grid(len(times) - 1, s=s)
    return s if torch.allclose(even, torch.tensor(times, dtype=torch.float64), atol=1e-6) else 1.0


def of_chain(student: Student, takes_times: bool, name: str) -> Steps:
    """Consistency's steps for noise drawn anew, DDIM's for the noise that the answer implies. Both ask at whole
    timesteps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    path = student.path
    assert isinstance(path, Tabulated)
    count = len(path.betas) or path.steps
    same: dict[str, Any] = {
        "num_train_timesteps": count, "beta_start": path.start, "beta_end": path.end, "beta_schedule": path.schedule,
        "trained_betas": list(path.betas) or None, "prediction_type": NAMES[student.prediction], "clip_sample": False,
        "set_alpha_to_one": True, "steps_offset": 1}
    # one step is the same in both, and only the first can be asked for it by its timestep
    consistent = student.move == "renoise" or all(len(times) == 2 for times in every_plan(student))
    scheduler: Any
    if consistent:
        scheduler = LCMScheduler(**same, original_inference_steps=count, timestep_scaling=LARGE)
    else:
        scheduler = DDIMScheduler(**same, timestep_spacing="trailing")
    calls, rounded = [], 0.0
    for times in every_plan(student):
        wanted, call = [count * t - 1 for t in times[:-1]], {"num_inference_steps": len(times) - 1}
        scheduler.set_timesteps(len(wanted))
        asked = [round(k) for k in wanted]
        if asked[-1] < 1:
            raise Refusal(f"{name}: a step at time {times[-2]:g} is before the first that its scheduler knows; it "
                          "cannot be exported")
        if consistent and takes_times:
            call = {"timesteps": asked}
        elif max(abs(a - b) for a, b in zip(scheduler.timesteps.tolist(), wanted, strict=True)) > 1:
            raise Refusal(f"{name}: its times {', '.join(f'{t:.3g}' for t in times)} are not evenly spaced, and its "
                          "scheduler takes no others; it cannot be exported")
        else:
            asked = scheduler.timesteps.tolist()
        rounded = max(rounded, *(abs(a - k) / count for a, k in zip(asked, wanted, strict=True)))
        calls.append(call)
    start = float(path.at(torch.tensor(student.plans[0][0], dtype=torch.float64)).sigma)
    return Steps(scheduler, calls[: len(student.plans)], calls[len(student.plans) :], start, rounded)

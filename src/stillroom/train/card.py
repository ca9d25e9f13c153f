"""The README.md of a product that draws: what it is, at which times it is asked, and code that runs beside it as it
stands."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stillroom.flows import DiffusersNet, FewStep, Flow, Generator, OneStep, Routed
from stillroom.flows.prompted import PromptedNet, prompted
from stillroom.settings import Refusal
from stillroom.train.recipe import Product

SNIPPET = """import stillroom

model = stillroom.load(".")       # this folder
x = model.sample(4, seed=0, {how})       # [4, {shape}], the same at any batch size"""
EXPORT = """For people without stillroom, where the run was made:

```bash
stillroom export {run} --to diffusers --out {run}-diffusers
```

Its pipeline is then called with """


def readme(product: Product, recipe: str, run: Path) -> str:
    """"" of a product that draws nothing."""
    model: Any = product.parts.get(product.kind)
    if not isinstance(model, Flow | Generator):
        return ""
    card, times = product.card, times_of(model)
    strength = card.get("guidance", 1.0) if takes_strength(model) else 1.0
    how = [*([f"steps={next(iter(times))}"] if times else []), f"guidance={float(strength)!r}"]
    facts = [
        f"- recipe: {recipe}",
        f"- makes: {'latents ' * (bool(card.get('encoding')) or prompted(model) is not None)}"
        f"{list(model.shape)}{of_labels(model)}",
        *([f"- teacher: {card['teacher']}"] if card.get("teacher") else []),
        *([f"- guidance: {card['guidance']:g}{'' if takes_strength(model) else ', in the weights'}"]
          if "guidance" in card else []),
        *([f"- adapters on: {product.base.path}, which must be there"] if product.base else []),
        *(f"- {told}" for told in times.values()),
    ]
    snippet = SNIPPET.format(how=", ".join(how), shape=", ".join(map(str, model.shape)))
    parts = [f"# A {product.kind} by `{recipe}`", "\n".join(facts), f"## Use\n\n```python\n{snippet}\n```",
             *exported(model, run), f"Written by stillroom {importlib.metadata.version('stillroom')}."]
    return "\n\n".join(parts) + "\n"


def of_labels(model: Flow | Generator) -> str:
    if (net := prompted(model)) is not None:
        return f", of {len(net.prompts.texts)} prompts: label 0 is {net.prompts.texts[0]!r}"
    return f", of {model.classes} classes" if model.classes else ""


def takes_strength(model: nn.Module) -> bool:
    """Guidance is told when drawing; else it is in the weights."""
    return bool(getattr(model.denoiser if isinstance(model, Flow) else model, "takes_strength", False))


def times_of(model: nn.Module) -> dict[int, str]:
    """By numbers of steps, what is said of each; the first is taken unless told otherwise."""
    if isinstance(model, Routed):
        return times_of(model.students[0])
    if isinstance(model, OneStep):
        return {1: f"one step, asked at time {model.asked:g}"}
    if isinstance(model, FewStep):
        return {k: f"{k} step{'s' * (k > 1)}, at times {listed(plan[:-1])}" for k, plan in model.plans.items()}
    if isinstance(model, Flow):
        return {model.steps: f"{model.steps} steps of {model.sampler} unless told otherwise, times shifted by "
                             f"{model.shift:g}"}
    return {}


def listed(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.6g}" for t in times)


def exported(model: nn.Module, run: Path) -> list[str]:
    """Of a student of other people's models: how its pipeline gets it, and the times that it is then called with."""
    if not any(isinstance(m, DiffusersNet | PromptedNet) for m in model.modules()):
        return []
    from stillroom.flows.export.card import arguments
    from stillroom.flows.export.pipelines import kind_of, network
    from stillroom.flows.export.schedulers import steps_of, student_in

    try:
        student = student_in(model, "this student")
        net, _ = network(student, "this student")
        kind = kind_of(net, "this student")
        calls = steps_of(student, net.scale, kind.takes_times, "this student").calls
    except Refusal as refusal:
        return [f"No pipeline of diffusers draws from it: {refusal}."]
    return ["## In its pipeline\n\n" + EXPORT.format(run=run) + ", or ".join(
        f"`{arguments({**call, **kind.fixed})}`" for call in calls) + "."]

"""The card of an exported student: what it is, how a pipeline is called for it, and how near that comes."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.codecs.export.card import UNLICENSED
from stillroom.flows.export.pipelines import Kind
from stillroom.flows.export.schedulers import Steps
from stillroom.flows.folders import DiffusersNet
from stillroom.flows.prompted import PromptedNet

# Parts of a folder in half precision come in that of transformers', and in float32 of diffusers', unless one is named.
LOAD_ALL = """# this folder, or its name on the hub
pipe = {pipeline}.from_pretrained(".", torch_dtype=torch.float32)"""
LOAD_LORA = """pipe = {pipeline}.from_pretrained({teacher!r}, torch_dtype=torch.float32)       # the teacher
pipe.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")       # this folder, or its name on the hub
pipe.load_lora_weights(".")"""
START = """pipe.scheduler.init_noise_sigma = {start:.6f}       # the noise that it was trained from"""
ALL = "A diffusers `{pipeline}` whose {part} makes its pictures in {steps}."
LORA = ("Low-rank adapters for the {part} of a diffusers `{pipeline}`, with which it makes its pictures in {steps}: "
        "`pytorch_lora_weights.safetensors`, and the scheduler that goes with them.")
TITLES = ("title", "teacher", "guidance", "licence", "shape", "classes", "encoding")     # told elsewhere, or no line


@dataclass(frozen=True)
class Told:
    """Distances between the pipeline's latents and the student's, over the norm of the latter, by the number of
    steps."""

    called: Mapping[int, float]             # as the card says
    plainly: Mapping[int, float] | None     # without the line for the first noise, where there is one


def write_card(new: Path, net: PromptedNet | DiffusersNet, kind: Kind, steps: Steps, told: Told, teacher: str,
               alone: bool, card: Mapping[str, Any]) -> None:
    call = steps.calls[0]
    form = (LORA if alone else ALL).format(part=kind.part, pipeline=kind.pipeline, steps=in_steps(count_of(call)))
    facts = [
        f"- teacher: {card.get('teacher', teacher)}",
        *([f"- guidance of the teacher: {card['guidance']:g}; it is in the weights, and the pipeline adds none"]
          if "guidance" in card else []),
        *([f"- guidance that the model is told: {net.prompts.guidance:g}"]
          if isinstance(net, PromptedNet) and net.prompts.guidance else []),
        *([f"- pictures of {net.prompts.size} x {net.prompts.size} pixels"] if isinstance(net, PromptedNet) else []),
        *(f"- {in_steps(count_of(more))}: `{arguments(more)}`" for more in steps.calls),
        f"- licence: {card.get('licence', UNLICENSED)}",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in card.items() if name not in TITLES),
    ]
    parts = [
        "---\nlibrary_name: diffusers\ntags: [text-to-image, distillation]\n---",
        f"# {card.get('title', 'A distilled student')}", form, "\n".join(facts),
        f"## Use\n\n```python\n{snippet(net, kind, steps, call, teacher, alone)}\n```",
        f"## Against the student\n\n{against(steps, told)}",
        f"Written by stillroom {importlib.metadata.version('stillroom')}.",
    ]
    (new / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def count_of(call: Mapping[str, Any]) -> int:
    return len(call["timesteps"]) if "timesteps" in call else call["num_inference_steps"]


def in_steps(count: int) -> str:
    return "one step" if count == 1 else f"{count} steps"


def arguments(call: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in call.items())


def snippet(net: PromptedNet | DiffusersNet, kind: Kind, steps: Steps, call: Mapping[str, Any], teacher: str,
            alone: bool) -> str:
    scheduler = type(steps.scheduler).__name__
    names = [kind.pipeline, *([scheduler] if alone else [])]
    asked = f"{net.prompts.texts[0]!r}, " if isinstance(net, PromptedNet) else "[0], " if net.classes else ""
    start = [START.format(start=steps.start)] if kind.scales_start and steps.start != 1 else []
    return "\n".join([
        "import torch",
        f"from diffusers import {', '.join(sorted(names))}",
        "",
        (LOAD_LORA if alone else LOAD_ALL).format(pipeline=kind.pipeline, teacher=teacher, scheduler=scheduler),
        *start,
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "",
        "torch.manual_seed(0)       # of the first noise, and of that between steps",
        f"picture = pipe({asked}{arguments({**call, **kind.fixed})}).images[0]",
        'picture.save("picture.png")',
    ])


def against(steps: Steps, told: Told) -> str:
    lines = ["From one noise, the pipeline's latents differ from those of stillroom's own sampler by "
             f"{by_steps(told.called)}, measured when this was written."]
    if told.plainly is not None:
        lines.append("Without the line that sets `init_noise_sigma`, which pipelines have at 1, they differ by "
                     f"{by_steps(told.plainly)}.")
    if steps.rounded > 1e-9:
        lines.append(f"The scheduler takes whole timesteps: a time is up to {steps.rounded:.1e} from the student's.")
    return "\n".join(lines)


def by_steps(found: Mapping[int, float]) -> str:
    far = [f"{value:.1e} of their norm in {in_steps(count)}" for count, value in found.items()]
    return ", ".join(far)

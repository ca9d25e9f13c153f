"""Folders that diffusers' ordinary pipelines load: a whole pipeline with the student's model, or a LoRA file; with
either the scheduler that draws as the student does. It is loaded again and compared before the folder gets its name."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.flows.export.card import Told, in_steps, write_card
from stillroom.flows.export.pipelines import Kind, bare_pipeline, difference, hushed, kind_of, network
from stillroom.flows.export.schedulers import Steps, Student, steps_of, student_in
from stillroom.flows.families import pipeline_class
from stillroom.flows.folders import DiffusersNet
from stillroom.flows.prompted import PromptedNet
from stillroom.nets import Lora
from stillroom.nets.folders import built, folder_weights, local_folder, read_json, understood
from stillroom.nets.lora import adapters
from stillroom.settings import Refusal
from stillroom.settings.files import new_folder

MOST = 0.05
"""Of a sample's norm: a pipeline that draws farther from the student is not the student."""


def to_pipeline(model: nn.Module, folder: Path | str, teacher: str, card: Mapping[str, Any] | None = None,
                name: str = "this student") -> Path:
    """A LoRA file, where the student is adapters on the teacher's own weights and its pipeline loads such files;
    otherwise the teacher's pipeline with the student in the place of its model."""
    student = student_in(model.eval(), name)
    net, lora = network(student, name)
    kind = kind_of(net, name)
    steps = steps_of(student, net.scale, kind.takes_times, name)
    root = local_folder(teacher, ("*.json", "*/*"))
    home = home_of(root, kind, net)
    with hushed(), new_folder(folder) as new:
        alone = lora is not None and kind.adapters and same_weights(base_weights(lora), home)
        steps.scheduler.save_pretrained(new / "scheduler")
        if lora is not None and alone:
            pipe = write_adapters(new, net, lora, kind, steps)
        else:
            pipe = write_model(new, root, home, net, lora, kind, steps)
        told = measured(student, net, pipe, kind, steps, name)
        write_card(new, net, kind, steps, told, str(teacher), alone, card or {})
    return Path(folder)


def measured(student: Student, net: PromptedNet | DiffusersNet, pipe: Any, kind: Kind, steps: Steps,
             name: str) -> Told:
    """How far the pipeline is from the student, called as the card says; and without the line for its first noise."""
    def differences() -> dict[int, float]:
        return {trial.steps: difference(student, trial, net, pipe, kind, call)
                for trial, call in zip(student.trials, steps.trials, strict=True)}

    plainly = differences() if steps.start != 1 else None
    if kind.scales_start:
        pipe.scheduler.init_noise_sigma = steps.start
        found = differences()
    else:
        found = differences() if plainly is None else plainly
    for count, far in found.items():
        if not far <= MOST:
            raise Refusal(f"{name}: a {kind.pipeline} with its {type(pipe.scheduler).__name__} would draw other "
                          f"samples, {100 * far:.2g} % of their norm apart in {in_steps(count)}; it cannot be exported")
    return Told(found, plainly if kind.scales_start else None)


# ---- a whole pipeline ----


def home_of(root: Path, kind: Kind, net: PromptedNet | DiffusersNet) -> Path:
    """Where the teacher's model lies, which must be of the student's make."""
    allowed = (kind.pipeline, *(("", "DDIMPipeline") if kind.pipeline == "DDPMPipeline" else ()))
    if (name := pipeline_class(root)) not in allowed:
        raise Refusal(f"{root}: a {name or 'folder without model_index.json'}, and the student is for a "
                      f"{kind.pipeline}; give its teacher's folder with --teacher")
    home = next((h for h in (root / kind.part, root) if (h / "config.json").is_file()), root / kind.part)
    config = {k: v for k, v in read_json(home / "config.json").items() if not k.startswith("_")}
    make = type(net.model).__name__
    with torch.device("meta"):
        theirs = settings_of(built(make, understood(make, config)))
    if theirs != (mine := settings_of(net.model)):
        other = sorted(k for k in mine if mine[k] != theirs.get(k))
        raise Refusal(f"{home}: not the model that the student is of, which has another {', '.join(other[:3])}; give "
                      "its teacher's folder with --teacher")
    return home


def settings_of(model: Any) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}))


def write_model(new: Path, root: Path, home: Path, net: PromptedNet | DiffusersNet, lora: Lora | None, kind: Kind,
                steps: Steps) -> Any:
    import diffusers

    model = net.model if lora is None else clean(net, merged_weights(lora))
    model.save_pretrained(new / kind.part)
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {
        "_diffusers_version": diffusers.__version__}
    for part, what in index.items():
        if isinstance(what, list) and what[0] and part not in (kind.part, "scheduler"):
            if not (root / part).is_dir():
                raise Refusal(f"{root / part} is missing, and the pipeline needs it; download the folder whole")
            shutil.copytree(root / part, new / part)
    index |= {"_class_name": kind.pipeline, kind.part: ["diffusers", type(model).__name__],
              "scheduler": ["diffusers", type(steps.scheduler).__name__]}
    (new / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    read: Any = type(model).from_pretrained(new / kind.part).eval()      # save_pretrained wrote every weight
    scheduler = type(steps.scheduler).from_pretrained(new / "scheduler")
    if isinstance(net, PromptedNet):
        return bare_pipeline(kind, read, scheduler)
    parts: dict[str, Any] = {kind.part: read, "scheduler": scheduler}
    if kind.pipeline == "DiTPipeline":
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        parts["vae"] = AutoencoderKL.from_pretrained(new / "vae")
    return getattr(diffusers, kind.pipeline)(**parts)


def clean(net: PromptedNet | DiffusersNet, weights: Mapping[str, Tensor]) -> Any:
    """A model of the same make with these weights."""
    make = type(net.model).__name__
    model = built(make, understood(make, {k: v for k, v in net.model.config.items() if not k.startswith("_")}))
    model.load_state_dict(weights)
    return model.eval()


# ---- adapters ----


def write_adapters(new: Path, net: PromptedNet | DiffusersNet, lora: Lora, kind: Kind, steps: Steps) -> Any:
    import diffusers

    getattr(diffusers, kind.pipeline).save_lora_weights(new, **{f"{kind.part}_lora_layers": adapter_weights(lora)})
    scheduler = type(steps.scheduler).from_pretrained(new / "scheduler")
    pipe = bare_pipeline(kind, clean(net, base_weights(lora)), scheduler)
    pipe.load_lora_weights(new)
    return pipe


def adapter_weights(lora: Lora) -> dict[str, Tensor]:
    """Under the names of standard LoRA files, of scale 1: alpha = rank."""
    found = {}
    for name, layer in named_adapters(lora):
        a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        found |= {f"{name}.lora_A.weight": a.contiguous(),
                  f"{name}.lora_B.weight": (layer.scaling["default"] * b).contiguous()}
    return found


def named_adapters(lora: Lora) -> list[tuple[str, Any]]:
    layers, model = set(adapters(lora)), lora.net.model
    assert isinstance(model, nn.Module)
    return [(name, layer) for name, layer in model.named_modules() if layer in layers]


def base_weights(lora: Lora) -> dict[str, Tensor]:
    assert isinstance(lora.net.model, nn.Module)
    state = lora.net.model.state_dict()
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if "lora_" not in k}


def merged_weights(lora: Lora) -> dict[str, Tensor]:
    weights = base_weights(lora)
    for name, layer in named_adapters(lora):
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight("default")
    return weights


def same_weights(mine: Mapping[str, Tensor], home: Path) -> bool:
    """Are they the teacher's own? Of another origin they are not, and a LoRA file would be put on the wrong ones."""
    theirs = folder_weights(home)
    return mine.keys() == theirs.keys() and all(
        torch.equal(w, theirs[name].to(w.dtype)) for name, w in mine.items())

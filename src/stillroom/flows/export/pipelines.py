"""Pipelines of diffusers, called as an export's card says, and what they then draw beside what the student draws."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.flows.export.schedulers import Student, Trial
from stillroom.flows.families import FAMILIES
from stillroom.flows.folders import DiffusersNet
from stillroom.flows.prompted import PromptedNet
from stillroom.nets import Lora
from stillroom.nets.dit import patchify, unpatchify
from stillroom.settings import Refusal

CLASSED = {"DiTPipeline": ("DiTTransformer2DModel", "transformer"), "DDPMPipeline": ("UNet2DModel", "unet")}
"""Pipelines without prompts: their model, and its name in them."""


@dataclass(frozen=True)
class Kind:
    pipeline: str
    part: str                       # the model's name in the pipeline
    takes_times: bool               # times of the caller's own
    scales_start: bool              # multiplies its noise by the scheduler's init_noise_sigma
    adapters: bool                  # loads LoRA files
    fixed: Mapping[str, Any]        # what it is always called with


def network(student: Student, name: str) -> tuple[PromptedNet | DiffusersNet, Lora | None]:
    """The network of diffusers in the student, with or without adapters on it."""
    lora = student.net if isinstance(student.net, Lora) else None
    net = lora.net if lora else student.net
    if not isinstance(net, PromptedNet | DiffusersNet):
        raise Refusal(f"{name}: its network is a {type(net).__name__}, for which diffusers has no pipeline; only "
                      "students of diffusers' own models are exported")
    return net, lora


def kind_of(net: PromptedNet | DiffusersNet, name: str) -> Kind:
    if isinstance(net, PromptedNet):
        p, family = net.prompts, FAMILIES[net.family]
        chains = family.part == "unet"
        fixed = {"guidance_scale": p.guidance or 1.0, "height": p.size, "width": p.size}
        return Kind(p.pipeline, family.part, True, chains, True,
                    fixed | ({"max_sequence_length": p.length} if p.length else {}))
    model = type(net.model).__name__
    pipeline = next((name for name, (known, _) in CLASSED.items() if known == model), None)
    if pipeline is None or (pipeline == "DDPMPipeline" and net.classes is not None):
        raise Refusal(f"{name}: no pipeline of diffusers draws from a {model} of {net.classes} classes; it cannot be "
                      "exported")
    guidance = {"guidance_scale": 1.0} if pipeline == "DiTPipeline" else {}
    return Kind(pipeline, CLASSED[pipeline][1], False, False, False, guidance)


@contextmanager
def hushed() -> Iterator[None]:
    """diffusers draws bars, and warns of text encoders that a LoRA file says nothing of."""
    import logging as levels

    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(levels.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


# ---- what it draws ----


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def difference(student: Student, trial: Trial, net: PromptedNet | DiffusersNet, pipe: Any, kind: Kind,
               call: Mapping[str, Any], count: int = 2, seed: int = 0) -> float:
    """Norm of the difference between the pipeline's latents and the student's, of one noise, over that of these."""
    y = None if net.classes is None else torch.arange(count) % net.classes
    given = isinstance(net, PromptedNet)        # pipelines of prompts are handed their first noise, others draw it
    packed = kind.pipeline == "FluxPipeline"
    z = torch.randn(count, *student.shape, generator=torch.Generator().manual_seed(seed + 1))
    with seeded(seed):
        drawn: list[Tensor] = [z] if given else []

        def noise(k: int) -> Tensor:
            while len(drawn) <= k:              # in the order in which a scheduler draws it, and in its layout
                fresh = torch.randn(patchify(z, 2).shape if packed else z.shape)
                drawn.append(unpatchify(fresh, 2, *z.shape[-2:]) if packed else fresh)
            return drawn[k]

        noise(0)
        own = trial.draw(noise, y)
    with seeded(seed), last_state(pipe.scheduler) as states:
        asked(pipe, net, kind, call, z, y)
    theirs = unpatchify(states[-1], 2, *z.shape[-2:]) if packed else states[-1]
    return float((theirs - own).norm() / own.norm().clamp(min=1e-12))


def asked(pipe: Any, net: PromptedNet | DiffusersNet, kind: Kind, call: Mapping[str, Any], z: Tensor,
          y: Tensor | None) -> None:
    """One call of the pipeline, of prompts y from the noise z where it takes them."""
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {**call, **kind.fixed}
    if isinstance(net, PromptedNet):
        assert y is not None
        rows = net.rows(y, z.dtype)
        how |= {"prompt_embeds": rows["embeddings"], "output_type": "latent"}
        how |= {"pooled_prompt_embeds": rows["pooled"]} if "pooled" in rows else {}
        how["latents"] = patchify(z, 2) if kind.pipeline == "FluxPipeline" else z
        if kind.pipeline == "StableDiffusionXLPipeline":
            how |= dict.fromkeys(("original_size", "target_size"), (net.prompts.size, net.prompts.size))
        how |= {"height": z.shape[-2] * pipe.vae_scale_factor, "width": z.shape[-1] * pipe.vae_scale_factor}
        pipe(**how)
    elif y is None:
        pipe(batch_size=len(z), output_type="pt", **how)
    else:
        pipe(y.tolist(), output_type="pt", **how)


@contextmanager
def last_state(scheduler: Any) -> Iterator[list[Tensor]]:
    """The states that its steps lead to."""
    plain, states = scheduler.step, []

    def step(*args, **kwargs):
        found = plain(*args, **kwargs)
        states.append(found[0])
        return found

    scheduler.step = step
    try:
        yield states
    finally:
        del scheduler.step


def bare_pipeline(kind: Kind, model: nn.Module, scheduler: Any) -> Any:
    """A pipeline of prompts without its text encoders and codec."""
    import diffusers

    family = FAMILIES[kind.pipeline]
    tokenizers = (encoder.replace("text_encoder", "tokenizer") for encoder in family.encoders)
    parts: dict[str, Any] = dict.fromkeys((*family.encoders, *tokenizers, *family.unused))
    parts |= {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return getattr(diffusers, kind.pipeline)(**(parts | {kind.part: model, "scheduler": scheduler}))

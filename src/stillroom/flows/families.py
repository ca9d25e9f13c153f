"""Families of text-to-image pipelines: which model stands where, how prompts are encoded, and how the model is asked.

Pipelines differ in little else. diffusers is not imported here: the functions are handed its pipelines and models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.nets.dit import patchify, unpatchify
from stillroom.nets.folders import read_json
from stillroom.settings import Refusal, nearest

Rows = dict[str, Tensor]                                    # embeddings [B, L, D], and pooled [B, E]
Encode = Callable[[Any, list[str], str, int, bool], tuple[Rows, Rows | None]]
"""(pipeline, texts, device, length, whether the null row is wanted) -> rows of the texts, and rows of the null."""
Ask = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None, int, float], Tensor]
"""(model, x_t, timestep, embeddings, pooled, size in pixels, guidance that it is told) -> its native prediction."""


@dataclass(frozen=True)
class Family:
    pipeline: str
    model: str
    part: str                   # the model's folder, and its name in the pipeline
    encoders: tuple[str, ...]
    encode: Encode
    ask: Ask
    lengths: int = 0            # tokens of T5 unless told otherwise; 0 where there is no T5
    unused: tuple[str, ...] = ()


# ---- prompts, by the pipeline's own encode_prompt ----


def encode_sd(pipe, texts, device, length, null):
    some, none = pipe.encode_prompt(texts, device, 1, null)
    return {"embeddings": some}, {"embeddings": none} if null else None


def encode_sdxl(pipe, texts, device, length, null):
    return split(pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=null), null)


def encode_sd3(pipe, texts, device, length, null):
    return split(pipe.encode_prompt(texts, None, None, device=device, do_classifier_free_guidance=null,
                                    max_sequence_length=length), null)


def encode_flux(pipe, texts, device, length, null):
    """It knows no empty prompt of its own: that of a true guidance is given by the user."""
    def rows(texts: list[str]) -> Rows:
        embeddings, pooled, _ = pipe.encode_prompt(texts, None, device=device, max_sequence_length=length)
        return {"embeddings": embeddings, "pooled": pooled}

    return rows(texts), rows([""]) if null else None


def split(four, null) -> tuple[Rows, Rows | None]:
    some, none, pooled, pooled_none = four
    return {"embeddings": some, "pooled": pooled}, {"embeddings": none, "pooled": pooled_none} if null else None


# ---- the model's answer ----


def ask_unet(model, x_t, k, told, pooled, size, guidance):
    added = None
    if pooled is not None:      # SDXL: original size, corner of the crop and target size, as its pipeline has them
        ids = x_t.new_tensor([size, size, 0, 0, size, size]).expand(len(x_t), -1)
        added = {"text_embeds": pooled, "time_ids": ids}
    return model(x_t, k, encoder_hidden_states=told, added_cond_kwargs=added, return_dict=False)[0]


def ask_sd3(model, x_t, k, told, pooled, size, guidance):
    return model(hidden_states=x_t, timestep=k, encoder_hidden_states=told, pooled_projections=pooled,
                 return_dict=False)[0]


def ask_flux(model, x_t, k, told, pooled, size, guidance):
    """In tokens of 2 x 2; the model multiplies times and guidance by 1000 itself."""
    high, wide = x_t.shape[-2:]
    rows, columns = torch.arange(high // 2, device=x_t.device), torch.arange(wide // 2, device=x_t.device)
    places = torch.cartesian_prod(rows, columns).to(x_t.dtype)                      # [N, 2]
    strength = x_t.new_full((len(x_t),), guidance) if model.config["guidance_embeds"] else None
    answer = model(
        hidden_states=patchify(x_t, 2), timestep=k / 1000, guidance=strength, encoder_hidden_states=told,
        pooled_projections=pooled, txt_ids=x_t.new_zeros(told.shape[1], 3),
        img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], 1), return_dict=False)[0]
    return unpatchify(answer, 2, high, wide)


FAMILIES: Mapping[str, Family] = {family.pipeline: family for family in (
    Family("StableDiffusionPipeline", "UNet2DConditionModel", "unet", ("text_encoder",), encode_sd, ask_unet,
           unused=("vae", "scheduler", "safety_checker", "feature_extractor")),
    Family("StableDiffusionXLPipeline", "UNet2DConditionModel", "unet", ("text_encoder", "text_encoder_2"), encode_sdxl,
           ask_unet, unused=("vae", "scheduler")),
    Family("StableDiffusion3Pipeline", "SD3Transformer2DModel", "transformer",
           ("text_encoder", "text_encoder_2", "text_encoder_3"), encode_sd3, ask_sd3, 256, ("vae", "scheduler")),
    Family("FluxPipeline", "FluxTransformer2DModel", "transformer", ("text_encoder", "text_encoder_2"), encode_flux,
           ask_flux, 512, ("vae", "scheduler")),
)}


# ---- what a pipeline's folder says ----


def pipeline_class(root: Path) -> str:
    """The name in model_index.json; "" where there is none."""
    index = root / "model_index.json"
    return str(read_json(index).get("_class_name", "")) if index.is_file() else ""


def family_of(root: Path) -> Family:
    if (name := pipeline_class(root)) not in FAMILIES:
        raise Refusal(f"{root}: a {name or 'folder without model_index.json'} makes no pictures of prompts that "
                      f"stillroom knows of{nearest(name, FAMILIES)}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_config(root: Path, family: Family) -> dict[str, Any]:
    config = read_json(root / family.part / "config.json")
    if (name := config.get("_class_name")) != family.model:
        raise Refusal(f"{root / family.part}: a {name or 'model without _class_name'}, where a {family.pipeline} has a "
                      f"{family.model}; only that can be a teacher")
    return config


def latents_of(root: Path, family: Family, size: int) -> tuple[int, int, int]:
    """[channels, h, w] for pictures of `size` pixels a side."""
    config = model_config(root, family)
    factor = 2 ** (len(read_json(root / "vae" / "config.json").get("block_out_channels", (64,))) - 1)
    step = factor * patch_of(family, config)
    if size % step or size % 8:
        raise Refusal(f"size {size}: {root} makes pictures of multiples of {max(step, 8)} pixels")
    side, most = size // factor, config.get("pos_embed_max_size")
    if most and side // patch_of(family, config) > most:
        raise Refusal(f"size {size}: {root} knows positions up to {most * step} pixels a side")
    channels = config.get("in_channels", 4)
    return (channels // 4 if family.pipeline == "FluxPipeline" else channels, side, side)


def patch_of(family: Family, config: Mapping[str, Any]) -> int:
    """Latents along a side of what the pipeline counts as a token."""
    return {"SD3Transformer2DModel": config.get("patch_size", 2), "FluxTransformer2DModel": 2}.get(family.model, 1)

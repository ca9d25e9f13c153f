"""Text-to-image teachers: a pipeline's model with a table of its prompts, in which a label is a prompt.

So guidance by the null label, class-balanced labels, samples by number and every recipe work as for classes.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.flows.families import FAMILIES, family_of, latents_of, model_config, patch_of, pipeline_class
from stillroom.flows.flow import Flow
from stillroom.flows.folders import flow_of, load_weights, scheduler_of
from stillroom.flows.prompts import WANTED, Prompts, encoders_digest, open_prompts
from stillroom.nets.build import buildable
from stillroom.nets.embed import one_time_per_sample
from stillroom.nets.folders import built, local_folder, understood
from stillroom.nets.last import LAST, in_float32
from stillroom.settings import Refusal


@buildable
class PromptedNet(nn.Module):
    """A pipeline's model under the contract net(x_t, t, y, r): y are numbers of prompts, the last that of none."""

    two_times = False

    def __init__(self, model_class: str, config: Mapping[str, Any], prompts: Prompts, scale: float = 1000.0,
                 offset: float = -1.0):
        super().__init__()
        self.family = FAMILIES[prompts.pipeline].pipeline
        self.model, self.prompts, self.scale, self.offset = conditional(model_class, config), prompts, scale, offset
        self.last = LAST[model_class]
        require_fit(self.model.config, prompts)
        self.shape, self.classes = tuple(prompts.shape), len(prompts.texts)
        for name, shape in prompts.shapes().items():
            self.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, prompts.dtype)))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        if r is not None:
            raise ValueError("a diffusers model takes one time: r was given")
        one_time_per_sample(x_t, t)
        y = torch.full((len(x_t),), self.classes, device=x_t.device) if y is None else y
        told = self.rows(y, x_t.dtype)
        k = (t * self.scale + self.offset).clamp(min=0)
        with in_float32(self.model, self.last):
            return FAMILIES[self.family].ask(self.model, x_t, k, told["embeddings"], told.get("pooled"),
                                             self.prompts.size, self.prompts.guidance)

    def rows(self, y: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the table holds of these prompts."""
        return {name: table[y].to(dtype) for name, table in self.named_buffers(recurse=False)}

    def fill(self, table: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, mine in self.named_buffers(recurse=False):
                mine.copy_(table[name])

    def __deepcopy__(self, memo):
        """Students, fakes and averages have weights of their own, and one table between them."""
        memo |= {id(table): table for table in self.buffers(recurse=False)}
        memo[id(self)] = twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


def prompted(module: nn.Module) -> PromptedNet | None:
    """The network in a denoiser, a flow or a generator that knows prompts."""
    return next((m for m in module.modules() if isinstance(m, PromptedNet)), None)


def makes_pictures_of_prompts(folder: str | Path) -> bool:
    """Is it the folder, or the hub's name, of a text-to-image pipeline?"""
    return pipeline_class(local_folder(folder, WANTED[:1])) in FAMILIES


def from_pipeline(folder: str | Path, prompts: str | Path) -> Flow:
    """The flow of a text-to-image pipeline's folder, asked with these prompts."""
    if not str(prompts):
        raise Refusal(f"teacher {folder}: makes pictures of prompts, and has none; write them with: stillroom cache "
                      f"--prompts FILE --teacher {folder} --size PIXELS --out DIR, and give --prompts DIR")
    told, table = open_prompts(prompts)
    root = local_folder(folder, (*WANTED, "unet/*", "transformer/*"))
    family = family_of(root)
    if told.pipeline != family.pipeline:
        raise Refusal(f"prompts {prompts}: of a {told.pipeline}, and {folder} is a {family.pipeline}; cache them for "
                      "this teacher")
    if told.encoders != encoders_digest(root, family):
        raise Refusal(f"prompts {prompts}: encoded by another teacher than {folder}, which has other text encoders; "
                      "cache them for this one")
    if (shape := latents_of(root, family, told.size)) != tuple(told.shape):
        raise Refusal(f"prompts {prompts}: for latents of {list(told.shape)}, and {folder} makes {list(shape)} of "
                      f"{told.size} pixels; cache them for this teacher")
    config = {k: v for k, v in model_config(root, family).items() if not k.startswith("_")}
    home = root / family.part
    path, prediction, scale, offset, shift = scheduler_of(root, home, (shape[1] // patch_of(family, config)) ** 2)
    net = PromptedNet(family.model, config, told, scale, offset)
    net.fill(table)
    load_weights(net.model, home)
    return flow_of(net, net.shape, path, prediction, shift)


PLAIN = {"time_embedding_type": ("positional",), "class_embed_type": (None,), "num_class_embeds": (None,),
         "encoder_hid_dim_type": (None,), "time_cond_proj_dim": (None,), "attention_type": ("default",),
         "addition_embed_type": (None, "text_time"), "dual_cross_attention": (False,)}
"""What a U-Net may be told besides its text: nothing, or SDXL's sizes."""


def conditional(model_class: str, config: Mapping[str, Any]) -> Any:
    """The model with fresh weights, its configuration understood to the last key."""
    model = built(model_class, understood(model_class, config))
    settings = model.config
    for key, allowed in PLAIN.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise Refusal(f"{model_class}: {key} {settings[key]!r} is an input that its pipeline gives and stillroom "
                          "does not; such a model cannot be a teacher")
    into, out = settings["in_channels"], settings["out_channels"]
    if out not in (None, into):
        raise Refusal(f"{model_class}: it answers {out} channels for {into}; a teacher answers as many as it is given "
                      "(models of inpainting, depth and control are given more)")
    return model


def require_fit(settings: Mapping[str, Any], prompts: Prompts) -> None:
    """The model takes what the table holds."""
    width = settings.get("cross_attention_dim", settings.get("joint_attention_dim"))
    pooled = settings.get("pooled_projection_dim", 0)
    if settings.get("addition_embed_type") == "text_time":
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    have = prompts.pooled[1] if prompts.pooled else 0
    if (width, pooled) != (prompts.embeddings[2], have):
        raise Refusal(f"prompts: embeddings of width {prompts.embeddings[2]} and pooled ones of {have}, and the model "
                      f"takes {width} and {pooled}; cache them for this teacher")

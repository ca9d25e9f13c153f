"""Codecs as diffusers folders that load where stillroom is not installed: as an AutoencoderTiny where both halves are
one, otherwise with the module that they need in the folder. Read back and compared before the folder gets its name."""

import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stillroom.codecs.codec import Codec
from stillroom.codecs.export.card import write_card
from stillroom.codecs.export.equal import require_equal
from stillroom.codecs.export.layout import fits_tiny, tiny_config, tiny_weights
from stillroom.codecs.export.source import standalone
from stillroom.codecs.tiles import margins
from stillroom.nets.build import describe
from stillroom.settings import Refusal
from stillroom.settings.files import new_folder

Card = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

TINY = """A diffusers `AutoencoderTiny`. Its latents are the diffusion side's: pipelines neither scale nor shift them.
diffusers only warns about weights that are missing from a folder and draws them at random: the code below refuses."""
TINY_SNIPPET = """
import torch
from diffusers import AutoencoderTiny

folder = "."        # this folder, or its name on the hub
vae, info = AutoencoderTiny.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info

pictures = torch.rand(1, 3, 256, 256) * 2 - 1       # in [-1, 1]
with torch.no_grad():
    latents = vae.encode(pictures).latents
    again = vae.decode(latents).sample
print(tuple(latents.shape), tuple(again.shape))
# In a pipeline: FluxPipeline.from_pretrained(..., vae=vae), or pipe.vae = vae.
"""
MODULE_FORM = """A diffusers model that brings its own module file, `{module}.py` (read it before you trust it). It
stands in for the pipeline's `vae`; a folder with a missing weight is refused. Pictures of any size go in, and are
padded to multiples of {factor}. {side} {tiles}"""
MODULE_SNIPPET = """
import torch
from diffusers import AutoModel

folder = "."        # this folder, or its name on the hub
vae = AutoModel.from_pretrained(folder, trust_remote_code=True)

pictures = torch.rand(1, 3, 256, 256) * 2 - 1       # in [-1, 1]
with torch.no_grad():
    latents = vae.encode(pictures).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor       # the diffusion side
    again = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
print(tuple(latents.shape), tuple(again.shape))
# In a pipeline: FluxPipeline.from_pretrained(..., vae=vae), or pipe.vae = vae. Saved with a pipeline, it goes along:
# load that with trust_remote_code=True.
"""


def to_diffusers(codec: Codec, folder: Path | str, card: Card | None = None, figures: Rows = ()) -> Path:
    """The plainest form that answers as the codec does."""
    from stillroom.codecs.rae import fits_rae, to_diffusers_rae

    write = to_diffusers_rae if fits_rae(codec) else to_tiny if fits_tiny(codec) else to_module
    return write(codec, folder, card, figures)


def to_tiny(codec: Codec, folder: Path | str, card: Card | None = None, figures: Rows = ()) -> Path:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    with new_folder(folder) as new:
        model = AutoencoderTiny(**tiny_config(codec))
        model.load_state_dict(tiny_weights(codec))
        model.save_pretrained(new)
        read: Any = AutoencoderTiny.from_pretrained(new)     # save_pretrained wrote every weight
        require_equal(codec, lambda x: read.encode(x).latents, lambda z: read.decode(z).sample)
        write_card(new, codec, card, figures, TINY, TINY_SNIPPET, "diffusers")
    return Path(folder)


def to_module(codec: Codec, folder: Path | str, card: Card | None = None, figures: Rows = ()) -> Path:
    from stillroom.codecs.export import autoencoder

    names = sorted(classes_of(describe([codec.encoder, codec.decoder])))
    with new_folder(folder) as new, tempfile.TemporaryDirectory() as place:
        name, text = module_file(autoencoder, names)
        (Path(place) / f"{name}.py").write_text(text, encoding="utf-8")
        loaded = run_file(Path(place) / f"{name}.py")
        config = module_config(codec, name)
        model = loaded.StillroomAutoencoder(**config)
        model.load_state_dict(codec.state_dict())
        model.save_pretrained(new)
        read = loaded.StillroomAutoencoder.from_pretrained(new)
        scaling, shift = config["scaling_factor"], config["shift_factor"]
        require_equal(codec, lambda x: (read.encode(x).latent_dist.mode() - shift) * scaling,
                      lambda z: read.decode(z / scaling + shift).sample)
        write_card(new, codec, card, figures, told(config, name, codec), MODULE_SNIPPET, "diffusers")
    return Path(folder)


def module_file(autoencoder: ModuleType, names: list[str]) -> tuple[str, str]:
    """Name and text. Named after its content: diffusers copies all local module files into one folder, where two of one
    name would take each other's place."""
    table = ", ".join(f'"{name}": {name.split(":")[1]}' for name in names)
    text = "\n".join([
        '"""An image codec distilled with stillroom, as a diffusers model. Written by its export: this is the code of',
        'stillroom (Apache-2.0) that the model needs, and it needs nothing else of it."""',
        "",
        standalone([*names, f"{autoencoder.__name__}:StillroomAutoencoder"]),
        "",
        f"CLASSES.update({{{table}}})",
        'SOURCE[:] = [Path(__file__).read_text(encoding="utf-8")]',
        "# Pipelines write this name beside the component's, and look for a file of that name in its folder.",
        "StillroomAutoencoder.__module__ = Path(__file__).stem",
        "",
    ])
    return f"stillroom_autoencoder_{hashlib.sha256(text.encode()).hexdigest()[:8]}", text


def module_config(codec: Codec, module: str) -> dict[str, Any]:
    """On the codec's own side where one factor and one shift lead to the diffusion side, because pipelines know no
    more; otherwise on the diffusion side."""
    space, levels = codec.space, codec.space.factor.bit_length()
    if space.factor != 2 ** (levels - 1):
        raise Refusal(f"a latent spans {space.factor} pixels, and pipelines know powers of 2 only; export it to onnx")
    shift, scale = set(space.shift), set(space.scale)
    if len(shift) == len(scale) == 1:
        side = {"scaling_factor": 1 / scale.pop(), "shift_factor": shift.pop()}
    else:
        side = {"mean": space.shift, "std": space.scale, "scaling_factor": 1.0, "shift_factor": 0.0}
    return {
        "encoder_half": describe(codec.encoder), "decoder_half": describe(codec.decoder),
        "latent_channels": space.channels, "block_out_channels": [64] * levels, "image_range": space.image_range,
        "auto_map": {"AutoModel": f"{module}.StillroomAutoencoder"}, **side,
        "reach": [margins(codec)[half]() for half in ("encoder", "decoder")],
    }


def told(config: Mapping[str, Any], module: str, codec: Codec) -> str:
    side = ("Its latents are the diffusion side's: pipelines neither scale nor shift them." if config.get("std") else
            "Its latents are the teacher's own, and scaling_factor and shift_factor lead to the diffusion side.")
    tiles = ("Tiling (`enable_tiling`) changes nothing but memory." if None not in config["reach"] else
             "Tiles (`enable_tiling`) are blended, since a part of the net sees the whole picture.")
    return MODULE_FORM.format(module=module, factor=codec.space.factor, side=side, tiles=tiles)


def classes_of(description: Any) -> set[str]:
    """Names of all classes that a description builds."""
    if isinstance(description, list):
        return set().union(*map(classes_of, description))
    if not isinstance(description, dict):
        return set()
    own = {description["class"]} if "class" in description else set()
    return own.union(*(classes_of(part) for part in description.values()))


def run_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module         # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[file.stem]
    return module

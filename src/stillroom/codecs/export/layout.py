"""TAESD's layout: pictures in [0, 1], latents on the diffusion side, layers by number. Weight files in the reference's
naming, which ComfyUI and others read, and what diffusers calls AutoencoderTiny.

What follows the last convolution of a half is folded into it. What comes before the first one cannot be: zeros that pad
pictures in [-1, 1] are grey, and black in [0, 1]; and the decoder clamps latents of the diffusion side first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom.codecs.codec import Codec
from stillroom.codecs.export.card import write_card
from stillroom.codecs.export.equal import require_equal
from stillroom.data import LatentSpace
from stillroom.nets.coding import Decoder, Encoder
from stillroom.settings import Refusal
from stillroom.settings.files import new_folder

COMFY = {"taesd": (4, 0.18215), "taesdxl": (4, 0.13025), "taesd3": (16, 1.5305), "taef1": (16, 0.3611)}
"""Names of ComfyUI's pairs: the latents' channels, and the scaling that gives them a deviation of about 1."""
FORM = """`{name}_encoder.safetensors` and `{name}_decoder.safetensors`, in the naming of madebyollin/taesd: pictures in
[0, 1], latents on the diffusion side. {reader}

ComfyUI looks in `models/vae_approx` for pairs called `taesd` (SD 1 and 2), `taesdxl`, `taesd3` (SD 3) and `taef1`
(Flux 1), and lists a pair only when both its files are there: name yours for the model whose latents it has."""
REFERENCE = "Widths and blocks are the reference's, so it and what is built on it (ComfyUI) load them."
OTHER = """The reference, and ComfyUI with it, has width 64 and blocks (1, 3, 3, 3), and refuses these files: {}
They are for readers that infer both, as stillroom does."""
SNIPPET = """
from safetensors.torch import load_file

encoder, decoder = (load_file(f"NAME_{half}.safetensors") for half in ("encoder", "decoder"))
print("latent channels:", decoder["1.weight"].shape[1], "width:", encoder["0.weight"].shape[0])
"""


def to_taesd(codec: Codec, folder: Path | str, card: Mapping[str, Any] | None = None,
             figures: Sequence[Mapping[str, Any]] = (), name: str = "") -> Path:
    """A pair of weight files, read back and compared; named for the model whose latents they are, where it is known."""
    if told := obstacle(codec):
        raise Refusal(f"no TAESD file can hold this codec: {told}")
    (encoder, decoder), name = halves(codec), name or named(codec)
    with new_folder(folder) as new:
        for half, net in (("encoder", encoder), ("decoder", decoder)):
            weights = {k: v.contiguous() for k, v in net.layers.state_dict().items()}
            save_file(weights, new / f"{name}_{half}.safetensors", metadata={"format": "pt"})
            net.layers.load_state_dict(load_file(new / f"{name}_{half}.safetensors"))
        require_equal(codec, lambda x: encoder.layers((x + 1) / 2), lambda z: 2 * decoder.layers(z) - 1)
        form = FORM.format(name=name, reader=OTHER.format(odd) if (odd := unusual(encoder, decoder)) else REFERENCE)
        write_card(new, codec, card, figures, form, SNIPPET.replace("NAME", name))
    return Path(folder)


def obstacle(codec: Codec) -> str:
    """What keeps the codec out of the layout, and what to do; nothing when it is in it."""
    encoder, decoder, space = codec.encoder, codec.decoder, codec.space
    if not isinstance(decoder, Decoder):
        return f"its decoder is a {type(decoder).__name__}; distil the decoder too: stillroom distill decoder"
    if not isinstance(encoder, Encoder):
        return f"its encoder is a {type(encoder).__name__}; distil it too: stillroom distill encoder"
    module = "export it to diffusers, whose form takes any net"
    if encoder.stem == "unshuffle" or decoder.stem != "conv":
        return f"it has {encoder.stem} and {decoder.stem} stems, and the layout has conv; {module}"
    if encoder.padding != "symmetric":
        return f"its encoder's padding is {encoder.padding}, and the layout's symmetric; {module}"
    if seen(encoder, space) != (0, 1):
        return f"its encoder's layers see pictures in {list(seen(encoder, space))}, and the layout's [0, 1]; {module}"
    z = torch.linspace(-4, 4, 9)[:, None, None].expand(-1, space.channels, 1)[..., None]
    if not decoder.soft_clamp or not torch.allclose(decoder.normalised(space.denormalise(z)), z, atol=1e-5):
        return f"its decoder does not clamp latents of the diffusion side, as the layout's does first; {module}"
    return ""


def seen(half: Encoder | Decoder, space: LatentSpace) -> tuple[float, float]:
    """Black and white, as the half's layers take or give them; a half of unit range halves [-1, 1] itself."""
    low, high = space.image_range
    return ((low + 1) / 2, (high + 1) / 2) if half.unit_range else (low, high)


def named(codec: Codec) -> str:
    """For ComfyUI, where the latents' channels and deviation say whose they are."""
    channels, deviation = codec.space.channels, codec.space.scale[0]
    return next((name for name, (c, scaling) in COMFY.items() if c == channels and abs(deviation * scaling - 1) < 1e-4),
                "taesd")


def halves(codec: Codec) -> tuple[Encoder, Decoder]:
    """The nets between pictures in [0, 1] and the diffusion side; without variances, for which there is no place."""
    encoder, decoder, space = codec.encoder, codec.decoder, codec.space
    assert isinstance(encoder, Encoder) and isinstance(decoder, Decoder)
    c, (low, high) = space.channels, seen(decoder, space)
    shift, scale = torch.tensor(space.shift), torch.tensor(space.scale)
    means = Encoder(c, encoder.width, encoder.blocks, encoder.stem, encoder.padding, encoder.pool)
    weights = encoder.folded().state_dict()
    weight, bias = (f"layers.{len(encoder.layers) - 1}.{kind}" for kind in ("weight", "bias"))
    weights[weight] = weights[weight][:c] / scale.view(-1, 1, 1, 1)
    weights[bias] = (weights[bias][:c] - shift) / scale
    means.load_state_dict(weights)

    drawn = Decoder(c, decoder.width, decoder.blocks, decoder.soft_clamp, decoder.stem, decoder.pool)
    weights = {k: v for k, v in decoder.state_dict().items() if k not in ("shift", "scale")}
    weight, bias = (f"layers.{len(decoder.layers) - 1}.{kind}" for kind in ("weight", "bias"))
    weights[weight], weights[bias] = weights[weight] / (high - low), (weights[bias] - low) / (high - low)
    drawn.load_state_dict(weights)
    return means.eval().requires_grad_(False), drawn.eval().requires_grad_(False)


def unusual(encoder: Encoder, decoder: Decoder) -> str:
    """How the nets differ from the reference's f8 ones."""
    found = (encoder.width, decoder.width, encoder.blocks, decoder.blocks)
    same = found == (64, 64, (1, 3, 3, 3), (3, 3, 3, 1)) and not encoder.pool and not decoder.pool
    return "" if same else (f"widths here are {encoder.width} and {decoder.width}, blocks {encoder.blocks} and "
                            f"{decoder.blocks}{', with pooled statistics' * (encoder.pool or decoder.pool)}.")


def fits_tiny(codec: Codec) -> bool:
    """diffusers' form has no variances, no pooled statistics, and one width."""
    encoder, decoder = codec.encoder, codec.decoder
    return not obstacle(codec) and isinstance(encoder, Encoder) and isinstance(decoder, Decoder) and (
        encoder.stem == "conv" and not (encoder.moments or encoder.pool or decoder.pool)
        and all(isinstance(half.width, int) for half in (encoder, decoder)))


def tiny_config(codec: Codec) -> dict[str, Any]:
    encoder, decoder = halves(codec)
    return {
        "latent_channels": codec.space.channels, "scaling_factor": 1.0, "shift_factor": 0.0,
        "encoder_block_out_channels": [encoder.width] * len(encoder.blocks), "num_encoder_blocks": encoder.blocks,
        "decoder_block_out_channels": [decoder.width] * len(decoder.blocks), "num_decoder_blocks": decoder.blocks,
    }


def tiny_weights(codec: Codec) -> dict[str, Tensor]:
    """diffusers counts the decoder's layers without the clamp."""
    encoder, decoder = halves(codec)
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    for k, v in decoder.layers.state_dict().items():
        number, rest = k.split(".", 1)
        weights[f"decoder.layers.{int(number) - 1}.{rest}"] = v
    return weights

"""Representation autoencoders (Zheng et al. 2025, arXiv 2510.11690): a frozen encoder's tokens as latents, normalised,
and a transformer that decodes them. Reads and writes diffusers' `AutoencoderRAE`.

Statistics are mean and deviation of every channel, or of every element [C, h, w] as in released models. Ours are stored
as the divisor itself, sqrt(variance + EPSILON), and nothing is added at use; diffusers adds 1e-5 to a stored deviation
at use, so that much is added when its folders are read, and taken off again when they are written.

`LatentSpace` knows one shift and one scale per channel. Statistics per element are split: their means over the places
are the space's, and what is left lies in both halves. So codecs with other statistics have other spaces.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.codecs.codec import Codec
from stillroom.codecs.tokens import FAMILIES, TokenEncoder, fill, own_fields, quiet, transformers
from stillroom.data import LatentSpace
from stillroom.nets.build import buildable
from stillroom.nets.folders import UNBUILDABLE, folder_weights, read_json, understood
from stillroom.nets.vit import ViTDecoder
from stillroom.nets.weights import require_same
from stillroom.settings import Refusal
from stillroom.settings.files import new_folder

EPSILON = 1e-5
"""Added to a measured variance: a channel that never moves is divided by 0.003 and not by 0."""
ADDED = 1e-5
"""What diffusers adds to the deviations that it has stored."""
TYPES = {"dinov2": ("dinov2_with_registers", 518), "siglip2": ("siglip_vision_model", 256), "mae": ("vit_mae", 224)}
"""diffusers' encoder types, and the size of picture that it builds each one's positions for."""
KINDS = {family: kind for kind, (family, _) in TYPES.items()} | {"siglip": "siglip2"}
HEAD = 64       # channels of an attention head in every encoder that diffusers builds
CURE = f"AutoencoderRAE holds encoders with heads of {HEAD} channels, and otherwise of transformers' default form"
PREFIX = "decoder."


class Elements(nn.Module):
    """A half with what statistics per element have beyond those per channel: u = gain raw + bias."""

    gain: Tensor
    bias: Tensor

    def __init__(self, net: nn.Module, shape: tuple[int, int, int]):
        super().__init__()
        self.net, self.shape = net, tuple(shape)
        self.register_buffer("gain", torch.ones(self.shape))
        self.register_buffer("bias", torch.zeros(self.shape))

    @property
    def places(self) -> tuple[int, int]:
        """Height and width of the latents that it takes, and no others."""
        return self.shape[1], self.shape[2]

    def require_grid(self, z: Tensor) -> None:
        if tuple(z.shape[1:]) != self.shape:
            raise Refusal(f"these latents' statistics are of {self.shape[1]} x {self.shape[2]} places with "
                          f"{self.shape[0]} channels, not of {list(z.shape[1:])}; give pictures of the size that they "
                          "were measured at")


@buildable
class ElementsEncoder(Elements):
    def forward(self, x: Tensor) -> Tensor:
        raw = self.net(x)
        self.require_grid(raw)
        return raw * self.gain + self.bias


@buildable
class ElementsDecoder(Elements):
    def forward(self, z: Tensor) -> Tensor:
        self.require_grid(z)
        return self.net((z - self.bias) / self.gain)


def token_codec(encoder: nn.Module, decoder: ViTDecoder, mean: Tensor, std: Tensor, patch: int,
                image_range: tuple[float, float]) -> Codec:
    """Latents (tokens - mean) / std, with statistics [C, 1, 1] or [C, h, w]."""
    shift, scale = (s.double().flatten(1).mean(1) for s in (mean, std))
    if mean.shape[1:].numel() > 1 or std.shape[1:].numel() > 1:
        shape = torch.broadcast_shapes(mean.shape, std.shape)
        halves = ElementsEncoder(encoder, shape), ElementsDecoder(decoder, shape)       # pyright: ignore
        for half in halves:
            half.to(mean.device)
            half.gain.copy_(scale.view(-1, 1, 1) / std.double())
            half.bias.copy_(shift.view(-1, 1, 1) - scale.view(-1, 1, 1) / std.double() * mean.double())
        encoder, decoder = halves                                                       # pyright: ignore
    space = LatentSpace(len(shift), patch, tuple(shift.tolist()), tuple(scale.tolist()), (patch - 1) / 2, image_range)
    return Codec(encoder, decoder, space)


def same_elements(decoder: ViTDecoder, encoder: nn.Module) -> nn.Module:
    """The decoder of raw tokens as the other half to this one."""
    if not isinstance(encoder, Elements):
        return decoder
    half = ElementsDecoder(decoder, encoder.shape).to(encoder.gain.device)              # pyright: ignore
    half.gain.copy_(encoder.gain)
    half.bias.copy_(encoder.bias)
    return half


def statistics_of(codec: Codec) -> tuple[Tensor, Tensor]:
    """Mean and divisor of the tokens, [C, 1, 1] or [C, h, w], as `token_codec` takes them."""
    shift, scale = (torch.tensor(s, dtype=torch.float64).view(-1, 1, 1) for s in (codec.space.shift, codec.space.scale))
    if not isinstance(codec.encoder, Elements):
        return shift, scale
    gain, bias = codec.encoder.gain.double().cpu(), codec.encoder.bias.double().cpu()
    return (shift - bias) / gain, scale / gain


def is_rae(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == "AutoencoderRAE"


def from_diffusers_rae(folder: str | Path) -> Codec:
    """The codec of a folder of diffusers' AutoencoderRAE. The encoder's weights may have the names of any version of
    transformers; diffusers itself reads only those of the one it was saved with."""
    with torch.device("cpu"):       # recipes are built under the run's device, and files are read to this one
        return _read(Path(folder))


def _read(home: Path) -> Codec:
    s = _settings({k: v for k, v in read_json(home / "config.json").items() if not k.startswith("_")}, home)
    weights = folder_weights(home)
    weights.pop(f"{PREFIX}decoder_pos_embed", None)                     # fixed; diffusers passes over it too
    encoder, decoder = _encoder(s), _decoder(s)
    for name in ("encoder_mean", "encoder_std"):                        # buffers that repeat the config
        _require(name in weights, home, f"the weights lack {name}")
        told = torch.tensor(s[name.replace("encoder", "encoder_norm")]).flatten()
        _require(torch.allclose(weights.pop(name).float().flatten(), told), home, f"{name} of the weights is another "
                 "than that of config.json")
    mean, std = (_statistic(weights, name, s, home) for name in ("_latents_mean", "_latents_std"))
    fill(encoder, {k.removeprefix("encoder."): w for k, w in weights.items() if k.startswith("encoder.")}, home)
    rest = {k: w.float() for k, w in weights.items() if not k.startswith("encoder.")}
    require_same(_theirs(decoder.state_dict()), rest, "AutoencoderRAE", home)
    _loaded(decoder, rest)
    std = (std + ADDED) / s["scaling_factor"]
    return token_codec(encoder, decoder, mean, std, decoder.patch, (0.0, 1.0)).eval()


def _settings(config: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """Everything that the class takes, its defaults filled in and its own rules kept."""
    try:
        from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE
    except ImportError:
        raise Refusal(f"{home}: an AutoencoderRAE needs diffusers 0.40 or later") from None
    parameters = inspect.signature(AutoencoderRAE.__init__).parameters
    s = {n: p.default for n, p in parameters.items() if n != "self"} | understood("AutoencoderRAE", config)
    s["encoder_norm_mean"] = s["encoder_norm_mean"] or [0.485, 0.456, 0.406]
    s["encoder_norm_std"] = s["encoder_norm_std"] or [0.229, 0.224, 0.225]
    kind, size, own = s["encoder_type"], s["encoder_input_size"], s["encoder_patch_size"]
    _require(kind in TYPES, home, f"encoder_type {kind!r} is none of {', '.join(TYPES)}")
    _require(s["reshape_to_2d"], home, "reshape_to_2d is false: latents must be maps, not rows of tokens")
    _require(s["num_channels"] == 3, home, f"pictures have 3 channels, not {s['num_channels']}")
    _require(size % own == 0, home, f"encoder_input_size {size} is no multiple of its patches of {own}")
    _require(s["image_size"] in (None, s["patch_size"] * size // own), home,
             f"image_size {s['image_size']} is not its {size // own} patches of {s['patch_size']}")
    _require(s["encoder_hidden_size"] % HEAD == 0, home, f"encoder_hidden_size is no multiple of {HEAD}")
    _require(s["scaling_factor"] > 0, home, f"scaling_factor {s['scaling_factor']} must be above 0")
    return s


def _require(true: Any, home: Path, why: str) -> None:
    if not true:
        raise Refusal(f"{home}: {why}")


def _statistic(weights: dict[str, Tensor], name: str, s: Mapping[str, Any], home: Path) -> Tensor:
    """[C, 1, 1] or [C, h, w]. Released DINOv2 statistics have no mean: it is one 0."""
    _require(name in weights, home, f"the weights lack {name}")
    x, side, channels = weights.pop(name).float(), s["encoder_input_size"] // s["encoder_patch_size"], s[
        "encoder_hidden_size"]
    shape = tuple(x.shape)
    _require(shape in ((), (1,), (channels, 1, 1), (channels, side, side), (1, channels, 1, 1),
                       (1, channels, side, side)), home, f"{name} has shape {list(shape)}, not [{channels}, {side}, "
             f"{side}] or [{channels}, 1, 1]")
    _require(x.isfinite().all() and (name == "_latents_mean" or x.min() >= 0), home, f"{name} is not finite, or is "
             "below 0")
    return x.reshape(shape[-3:] if len(shape) > 2 else (1, 1, 1)).expand(channels, -1, -1)


def _encoder(s: Mapping[str, Any]) -> TokenEncoder:
    """As diffusers builds it: what its settings do not say is transformers' default."""
    family, size = TYPES[s["encoder_type"]]
    config = getattr(transformers(), FAMILIES[family].model).config_class(
        hidden_size=s["encoder_hidden_size"], patch_size=s["encoder_patch_size"], image_size=size,
        num_attention_heads=s["encoder_hidden_size"] // HEAD, num_hidden_layers=s["encoder_num_hidden_layers"],
        **({"mask_ratio": 0.0} if family == "vit_mae" else {}))
    return TokenEncoder(family, own_fields(config), s["patch_size"], tuple(s["encoder_norm_mean"]),
                        tuple(s["encoder_norm_std"]))


def _decoder(s: Mapping[str, Any]) -> ViTDecoder:
    return ViTDecoder(s["encoder_hidden_size"], s["patch_size"], s["encoder_input_size"] // s["encoder_patch_size"],
                      s["decoder_hidden_size"], s["decoder_num_hidden_layers"], s["decoder_num_attention_heads"],
                      s["decoder_intermediate_size"], tuple(s["encoder_norm_mean"]), tuple(s["encoder_norm_std"]))


NAMES = (       # ours, theirs
    ("^extra$", "trainable_cls_token"), ("^enter", "decoder_embed"), ("^norm", "decoder_norm"),
    ("^predict", "decoder_pred"), ("^blocks", "decoder_layers"), (".attention.out.", ".attention.to_out.0."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".mlp.0.", ".intermediate.dense."),
    (".mlp.2.", ".output.dense."),
)


def _theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our decoder's weights under diffusers' names."""
    out = {}
    for name, w in weights.items():
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if name == "trainable_cls_token":
            w = w.view(1, 1, -1)
        if ".attention.qkv." in name:
            out |= {PREFIX + name.replace("qkv", f"to_{k}"): part for k, part in zip("qkv", w.chunk(3), strict=True)}
        else:
            out[PREFIX + name] = w
    return out


def _loaded(decoder: ViTDecoder, weights: Mapping[str, Tensor]) -> None:
    """The inverse of `_theirs`, in place: what is a part of our tensor under that naming is written there."""
    state = decoder.state_dict()
    for name, part in _theirs(state).items():
        part.copy_(weights[name].view_as(part))


FORM = """A diffusers `AutoencoderRAE`: the tokens of a frozen encoder as latents, normalised, and a decoder of them.
Pictures are in [0, 1], and of one size. diffusers only warns about weights that are missing from a folder, or named
otherwise by another version of transformers, and draws them at random: the code below refuses."""
SNIPPET = """
import torch
from diffusers import AutoencoderRAE

folder = "."        # this folder, or its name on the hub
rae, info = AutoencoderRAE.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info

pictures = torch.rand(1, 3, {size}, {size})         # in [0, 1]
with torch.no_grad():
    latents = rae.eval().encode(pictures).latent
    again = rae.decode(latents).sample
print(tuple(latents.shape), tuple(again.shape))
"""


def to_diffusers_rae(codec: Codec, folder: Path | str, card: Mapping[str, Any] | None = None,
                     figures: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Writes the codec as diffusers' AutoencoderRAE, reads it back and compares."""
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    from stillroom.codecs.export.card import write_card

    (encoder, decoder), config = _nets(codec), _config(codec)
    try:
        with quiet():
            model = AutoencoderRAE(**config)
    except (*UNBUILDABLE, AttributeError) as error:
        raise Refusal(f"this diffusers cannot build an AutoencoderRAE of the type {config['encoder_type']} with this "
                      f"transformers ({type(error).__name__}: {error})") from error
    weights = {f"encoder.{k}": w for k, w in encoder.model.state_dict().items()} | _theirs(decoder.state_dict())
    buffers = {k: b for k, b in model.state_dict().items() if not k.startswith(("encoder.", PREFIX))}
    require_same(model.state_dict(), weights | buffers, "AutoencoderRAE", Path(folder), CURE)
    model.load_state_dict(weights | buffers)
    with new_folder(folder) as new:
        model.eval().save_pretrained(new)
        read = AutoencoderRAE.from_pretrained(new).eval()
        _require_equal(codec, read, size := config["patch_size"] * decoder.side)
        write_card(new, codec, card, figures, FORM, SNIPPET.format(size=size), "diffusers")
    return Path(folder)


def fits_rae(codec: Codec) -> bool:
    """Is it of the form that `to_diffusers_rae` writes? Whether diffusers can hold it is seen there."""
    encoder, decoder = _nets(codec)
    return isinstance(encoder, TokenEncoder) and encoder.kind in KINDS and isinstance(decoder, ViTDecoder)


def _nets(codec: Codec) -> list[Any]:
    return [half.net if isinstance(half, Elements) else half for half in (codec.encoder, codec.decoder)]


def _config(codec: Codec) -> dict[str, Any]:
    encoder, decoder = _nets(codec)
    if not fits_rae(codec):
        what = encoder.kind if isinstance(encoder, TokenEncoder) else type(encoder).__name__
        raise Refusal(f"AutoencoderRAE holds encoders of the kinds {', '.join(TYPES)}, and this codec's is a {what}; "
                      "export it with its own module")
    mean, std = statistics_of(codec)
    own = encoder.model.config
    if own.hidden_size != HEAD * own.num_attention_heads:
        raise Refusal(f"{CURE}; this one has {own.num_attention_heads} for {own.hidden_size} channels")
    return {
        "encoder_type": KINDS[encoder.kind], "encoder_hidden_size": own.hidden_size,
        "encoder_patch_size": own.patch_size, "encoder_num_hidden_layers": own.num_hidden_layers,
        "encoder_input_size": own.patch_size * decoder.side, "patch_size": decoder.patch,
        "decoder_hidden_size": len(decoder.extra),
        "decoder_num_hidden_layers": len(decoder.blocks), "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.hidden, "encoder_norm_mean": list(encoder.pixels[0]),
        "encoder_norm_std": list(encoder.pixels[1]), "latents_mean": mean.tolist(),
        "latents_std": (std - ADDED).tolist(),
    }


@torch.no_grad()
def _require_equal(codec: Codec, read: Any, size: int) -> None:
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    z, theirs = codec.encode(2 * x - 1), read.encode(x).latent
    for name, mine, its in (("latents", z, theirs), ("pictures", (codec.decode(z) + 1) / 2, read.decode(z).sample)):
        error = float((mine - its).abs().max() / (mine.max() - mine.min()).clamp(min=1e-12))
        if not error <= 1e-4:
            raise Refusal(f"AutoencoderRAE would answer with other {name}, by {error:.2g} of their range: {CURE}")

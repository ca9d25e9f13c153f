"""Teachers from diffusers' folders of image autoencoders, each in two halves that live apart: an encoder without its
decoder's memory, a decoder for a student to stand on. What a pipeline does to the latents (scaling, shift, patches, the
BatchNorm of FLUX.2) is the codec's `LatentSpace`; the VAE itself never does it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.codecs.codec import Codec
from stillroom.data import LatentSpace
from stillroom.nets.build import buildable
from stillroom.nets.folders import PICKLES, built, folder_weights, local_folder, read_json, understood
from stillroom.nets.weights import require_same
from stillroom.settings import Refusal, nearest

MODELS = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny", "AutoencoderDC")
READ = (*MODELS, "AutoencoderRAE")                   # the last by codecs/rae.py: its halves are other nets
VIDEO = re.compile("Video|Wan|LTX|Mochi|Allegro|CogVideoX|Cosmos|Hunyuan|Temporal|Magvit|QwenImage|VidTok")
WANTED = ("model_index.json", "config.json", "diffusion_pytorch_model*", "vae/*")
SILENT = ("force_upcast", "block_out_channels")      # of pipelines: a warning about float16, the factor once more
SCALINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@buildable
class DiffusersEncoder(nn.Module):
    """Means, or means and log variances, before any scaling; FLUX.2's in patches of 2x2, as its pipeline makes them."""

    def __init__(self, model_class: str, config: Mapping[str, Any]):
        super().__init__()
        model = _empty(model_class, config)
        self.encoder, self.quant_conv = model.encoder, getattr(model, "quant_conv", None)
        self.settings, self.patch = model.config, _patch(model_class)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        h = h if self.quant_conv is None else self.quant_conv(h)
        return functional.pixel_unshuffle(h, self.patch)        # [B, C, h, w] -> [B, C p p, h / p, w / p]

    def grid(self) -> tuple[int, float]:
        """Pixels per latent, and the pixel on which latent 0 is centred. A strided convolution with kernel k and p
        zeros on the left puts output i on input stride * i + (k - 1) / 2 - p; folding 2x2 into channels, on 2 i + 1/2.
        """
        factor, offset = 1, 0.0
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv2d) and module.stride[0] > 1:
                offset += factor * ((module.kernel_size[0] - 1) / 2 - int(module.padding[0]))
                factor *= module.stride[0]
            elif getattr(module, "downsample", False) is True:
                factor, offset = 2 * factor, offset + factor / 2
        return factor * self.patch, offset + factor * (self.patch - 1) / 2


@buildable
class DiffusersDecoder(nn.Module):
    def __init__(self, model_class: str, config: Mapping[str, Any]):
        super().__init__()
        model = _empty(model_class, config)
        self.post_quant_conv, self.decoder = getattr(model, "post_quant_conv", None), model.decoder
        self.patch = _patch(model_class)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self._unpatched(z))

    def features(self, z: Tensor) -> list[Tensor]:
        """The first stages' maps, all at the latents' resolution, before the decoder first enlarges them."""
        z, net = self._unpatched(z), self.decoder
        if hasattr(net, "mid_block"):                           # AutoencoderKL and FLUX.2
            first = net.conv_in(z)
            return [first, net.mid_block(first)]
        if hasattr(net, "layers"):                              # AutoencoderTiny
            maps, h = [], 3 * torch.tanh(z / 3)
            for layer in net.layers:
                if isinstance(layer, nn.Upsample):
                    break
                h = layer(h)
                maps.append(h)
            return maps[1:]                                     # the first is what the second rectifies
        first = net.conv_in(z)                                  # AutoencoderDC
        if net.in_shortcut:
            first = first + z.repeat_interleave(net.in_shortcut_repeats, dim=1)
        return [first, net.up_blocks[-1](first)]

    def _unpatched(self, z: Tensor) -> Tensor:
        z = functional.pixel_shuffle(z, self.patch)
        return z if self.post_quant_conv is None else self.post_quant_conv(z)


def from_diffusers(folder: str | File) -> Codec:
    """The codec of a VAE's folder, or of a pipeline's folder with the VAE in vae/."""
    _refuse_files(folder)
    root = local_folder(folder, WANTED)
    home = next((h for h in (root / "vae", root) if (h / "config.json").is_file()), None)
    if home is None:
        raise Refusal(f"{root} holds no codec: neither vae/config.json nor config.json is there")
    config = read_json(home / "config.json")
    model_class = _model_class(config, home)
    if model_class == "AutoencoderRAE":
        from stillroom.codecs.rae import from_diffusers_rae

        return from_diffusers_rae(home)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    _refuse_contradictions(model_class, config, home)
    encoder, decoder = DiffusersEncoder(model_class, config), DiffusersDecoder(model_class, config)
    norm = _norm(encoder)
    own = [half.state_dict() for half in (encoder, decoder, norm)]
    weights = _renamed(folder_weights(home), encoder, decoder)
    require_same(own[0] | own[1] | own[2], weights, model_class, home)
    for half, names in zip((encoder, decoder, norm), own, strict=True):
        half.load_state_dict({name: weights[name] for name in names})
    return Codec(encoder, decoder, _space(model_class, encoder, norm)).eval()


def _refuse_files(path: str | File) -> None:
    suffix = File(path).suffix.lower().removeprefix(".")
    if suffix == "onnx":
        raise Refusal(f"{path}: an ONNX graph cannot be a teacher, nothing can be learned through it; give the "
                      "diffusers folder or the TAESD weight file that it was exported from")
    if suffix in PICKLES and not File(path).is_dir():
        raise Refusal(f"{path}: a pickle is never opened; give a folder written by save_pretrained with safetensors"
                      + ("; a single-file checkpoint becomes one with diffusers' from_single_file"
                         if suffix == "ckpt" else ""))
    if File(path).is_file():
        raise Refusal(f"{path} is a file: give the folder of the VAE, with its config.json")


def _model_class(config: Mapping[str, Any], home: File) -> str:
    name = config.get("_class_name", "")
    if name in READ:
        return name
    if VIDEO.search(name):
        raise Refusal(f"{home / 'config.json'}: {name} has a time axis, as video VAEs have; only image codecs can be "
                      f"teachers: {', '.join(READ)}")
    if name == "StillroomAutoencoder":
        raise Refusal(f"{home}: was exported from a codec of ours; give that codec's run or product")
    raise Refusal(f"{home / 'config.json'}: a {name or 'model without _class_name'} is no image codec that is known "
                  f"here{nearest(name, READ)}")


def _empty(model_class: str, config: Mapping[str, Any]) -> Any:
    """The whole model with fresh weights. It costs both halves for a moment; the one that nobody takes is freed."""
    if model_class not in MODELS:
        raise Refusal(f"no codec is made from a {model_class!r}{nearest(model_class, MODELS)}")
    model = built(model_class, understood(model_class, config, SILENT))
    s = model.config
    if s["in_channels"] != 3 or s.get("out_channels", 3) != 3:
        raise Refusal(f"{model_class}: pictures have 3 channels, and its config.json says {s['in_channels']} in, "
                      f"{s.get('out_channels', 3)} out")
    if model_class == "AutoencoderTiny":
        up = s["upsampling_scaling_factor"] ** (len(s["num_decoder_blocks"]) - 1)
        down = 2 ** (len(s["num_encoder_blocks"]) - 1)
        if up != down:
            raise Refusal(f"AutoencoderTiny: its encoder shrinks by {down}, its decoder enlarges by {up}")
        if len(set(s["encoder_block_out_channels"])) > 1:
            raise Refusal("AutoencoderTiny: encoder_block_out_channels must be equal; diffusers builds a net that "
                          f"cannot run from {list(s['encoder_block_out_channels'])}")
    if model_class == "AutoencoderKLFlux2" and tuple(s["patch_size"]) != (2, 2):
        raise Refusal(f"AutoencoderKLFlux2: patch_size {list(s['patch_size'])} is not [2, 2], which its pipeline uses")
    return model


def _patch(model_class: str) -> int:
    return 2 if model_class == "AutoencoderKLFlux2" else 1


def _norm(encoder: DiffusersEncoder) -> nn.Module:
    """FLUX.2's normaliser, under the names it has in the file; nothing for the others."""
    if encoder.patch == 1:
        return nn.Module()
    s = encoder.settings
    return nn.ModuleDict({"bn": nn.BatchNorm2d(4 * s["latent_channels"], eps=s["batch_norm_eps"], affine=False)})


def _renamed(weights: dict[str, Tensor], *halves: nn.Module) -> dict[str, Tensor]:
    """By diffusers' own table of the attention names it has since changed."""
    from diffusers.models.modeling_utils import ModelMixin

    for half in halves:
        ModelMixin._fix_state_dict_keys_on_load(half, weights)  # pyright: ignore[reportArgumentType]
    return weights


def _refuse_contradictions(model_class: str, config: Mapping[str, Any], home: File) -> None:
    """Two normalisers, or half a one: diffusers' pipelines differ in which they then believe."""
    scaling, shift, mean, std = (config.get(name) for name in SCALINGS)
    where = f"{home / 'config.json'}: scaling contradicts the normaliser"
    if model_class == "AutoencoderKLFlux2" and any(config.get(name) is not None for name in SCALINGS):
        raise Refusal(f"{where}: the BatchNorm of its weights is one, and {_set(config)} would be a second; remove it")
    if (mean is None) != (std is None):
        raise Refusal(f"{where}: latents_mean and latents_std come together, and only {_set(config, SCALINGS[2:])} "
                      "is set")
    if shift and mean is not None:
        raise Refusal(f"{where}: shift_factor {shift} and latents_mean both shift; remove one")
    if mean is not None and std is not None:
        channels = config.get("latent_channels", 4)
        if not len(mean) == len(std) == channels:
            raise Refusal(f"{where}: {channels} latent channels, {len(mean)} latents_mean, {len(std)} latents_std")
        if not all(math.isfinite(v) for v in (*mean, *std)) or min(std) <= 0:
            raise Refusal(f"{where}: latents_mean must be finite, and latents_std finite and above 0")
    if scaling is not None and not 0 < scaling < math.inf:
        raise Refusal(f"{where}: scaling_factor {scaling} must be above 0; a latent's deviation is about 1 / it")


def _set(config: Mapping[str, Any], names: tuple[str, ...] = SCALINGS) -> str:
    return " and ".join(name for name in names if config.get(name) is not None)


def _space(model_class: str, encoder: DiffusersEncoder, norm: nn.Module) -> LatentSpace:
    """z = (raw - mean) * scaling_factor / std, as pipelines that know all of them do."""
    s, (factor, offset) = encoder.settings, encoder.grid()
    channels = s["latent_channels"] * encoder.patch**2
    if model_class == "AutoencoderKLFlux2":
        bn: Any = norm["bn"]  # pyright: ignore[reportIndexIssue]
        mean, std = bn.running_mean.double(), (bn.running_var.double() + bn.eps).sqrt()
        return LatentSpace(channels, factor, tuple(mean.tolist()), tuple(std.tolist()), offset)
    scaling = s.get("scaling_factor") or 1.0
    mean = s.get("latents_mean") or (s.get("shift_factor") or 0.0,) * channels
    std = s.get("latents_std") or (1.0,) * channels
    return LatentSpace(channels, factor, tuple(mean), tuple(v / scaling for v in std), offset)


@torch.no_grad()
def require_usable(codec: Codec, x: Tensor, name: str) -> None:
    """The gate of codecs: reconstructions better than the mean image, and latents of about unit size on the diffusion
    side."""
    x = x.to(codec.device)
    z = torch.cat([codec.encode(part) for part in x.split(8)])
    again = torch.cat([codec.decode(part, (x.shape[-2], x.shape[-1])) for part in z.split(8)]).clamp(-1, 1)
    error = float((again - x).square().mean())
    bars = {"the mean colour of each picture": float((x - x.mean((2, 3), keepdim=True)).square().mean())}
    if len(x) > 1:
        # against the mean of the others: with few pictures, a mean that holds the picture itself is too good
        bars["the mean of the pictures"] = float((x - x.mean(0)).square().mean()) * (len(x) / (len(x) - 1)) ** 2
    what, bar = min(bars.items(), key=lambda item: item[1])
    if bar < 1e-6:
        raise Refusal(f"{name}: the pictures to try it on are flat or all the same; give photographs")
    if not error < bar:
        raise Refusal(f"{name}: it reconstructs worse than {what} (squared error {error:.3g}, not below {bar:.3g}); "
                      "it is untrained, damaged, or takes other pictures than these")
    std = float(z.float().std())
    if not 1 / 4 <= std <= 4:
        raise Refusal(f"{name}: scaling contradicts the latents: their deviation on the diffusion side is {std:.3g}, "
                      "where about 1 is expected; correct scaling_factor or latents_std in its config.json")

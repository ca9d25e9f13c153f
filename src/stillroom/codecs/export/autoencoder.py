"""The VAE class that an export carries with it: diffusers' interface over a codec's two halves.

An export's module file is this class and all that it needs, written out by `source.standalone`; nothing here may need
stillroom at run time. diffusers is imported with this module, so import it late.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from stillroom.codecs.codec import padded
from stillroom.codecs.tiles import tiled

CLASSES: dict[str, type] = {}       # an export's file ends by filling these two
SOURCE: list[str] = []
NO_VARIANCE = -30.0                 # log variance of an encoder without one; diffusers clamps there


class StillroomAutoencoder(ModelMixin, ConfigMixin):
    """Pictures [B, 3, H, W] in [-1, 1] of any size; latents on the side that `scaling_factor` and `shift_factor` name:
    diffusion side = (z - shift_factor) * scaling_factor, as pipelines do it."""

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, encoder_half: dict, decoder_half: dict, latent_channels: int,
                 block_out_channels: tuple[int, ...], image_range: tuple[float, float] = (-1.0, 1.0),
                 mean: tuple[float, ...] = (), std: tuple[float, ...] = (), scaling_factor: float = 1.0,
                 shift_factor: float = 0.0, reach: tuple[int | None, int | None] = (None, None), sample_size: int = 512,
                 force_upcast: bool = False, in_channels: int = 3, out_channels: int = 3,
                 auto_map: dict[str, str] | None = None):     # where AutoModel finds this class
        super().__init__()
        self.encoder, self.decoder = made(encoder_half), made(decoder_half)
        self.factor = 2 ** (len(block_out_channels) - 1)
        self.use_tiling = self.use_slicing = False
        self.tile_sample_min_size = sample_size

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        reach = self.config["reach"][0]
        parts = [self._in_tiles(self._moments, part, self.factor, reach) for part in self._parts(x)]
        posterior = DiagonalGaussianDistribution(torch.cat(parts))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None,
               ) -> DecoderOutput | tuple[Tensor]:
        reach = self.config["reach"][1]
        x = torch.cat([self._in_tiles(self._pixels, part, 1, reach) for part in self._parts(z)])
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True,
                generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        x = self.decode(z, return_dict=False)[0][..., : sample.shape[-2], : sample.shape[-1]]
        return DecoderOutput(sample=x) if return_dict else (x,)

    def _moments(self, x: Tensor) -> Tensor:
        """[B, 2C, h, w]: means and log variances."""
        low, high = self.config["image_range"]
        x = padded(x, self.factor)
        x = (x + 1) * ((high - low) / 2) + low if (low, high) != (-1, 1) else x
        answer = self.encoder(x)
        if answer.shape[1] == self.config["latent_channels"]:
            z, logvar = answer, torch.full_like(answer, NO_VARIANCE)
        else:
            z, logvar = answer.chunk(2, 1)
        if self.config["std"]:
            mean, std = self._normaliser(z)
            z, logvar = (z - mean) / std, logvar.clamp(-30, 20) - 2 * std.log()
        return torch.cat([z, logvar], 1)

    def _pixels(self, z: Tensor) -> Tensor:
        if self.config["std"]:
            mean, std = self._normaliser(z)
            z = z * std + mean
        low, high = self.config["image_range"]
        x = self.decoder(z)
        return (x - low) * (2 / (high - low)) - 1 if (low, high) != (-1, 1) else x

    def _normaliser(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(self.config[name], device=z.device, dtype=z.dtype).view(-1, 1, 1)
                     for name in ("mean", "std"))

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(1) if self.use_slicing else (x,)

    def _in_tiles(self, net, x: Tensor, step: int, reach: int | None) -> Tensor:
        side = max(1, self.tile_sample_min_size // self.factor)
        return tiled(net, x, step, side, reach) if self.use_tiling else net(x)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Every weight must be in the folder and no other: diffusers alone would draw a missing one at random."""
        wanted = kwargs.pop("output_loading_info", False)
        both: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = both
        wrong = [f"{len(info[kind])} {kind.replace('_', ' ')} ({', '.join(map(str, info[kind][:3]))})"
                 for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
        if wrong:
            raise ValueError(f"{pretrained_model_name_or_path}: the weights do not fit the config: {'; '.join(wrong)}")
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{type(self).__module__}.py").write_text(SOURCE[0], encoding="utf-8")


def made(description: Any) -> Any:
    """A module from its class and arguments, as the config names them. Lists are tuples, which constructors take."""
    if isinstance(description, list | tuple):
        return tuple(made(part) for part in description)
    if not isinstance(description, dict):
        return description
    if "tensor" in description:
        return torch.tensor(description["tensor"], dtype=getattr(torch, description["dtype"]))
    if "mapping" in description:
        return {name: made(part) for name, part in description["mapping"].items()}
    return CLASSES[description["class"]](**{name: made(part) for name, part in description["arguments"].items()})

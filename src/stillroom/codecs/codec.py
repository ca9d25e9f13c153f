"""A codec: pixels in [-1, 1] <-> latents on the diffusion side, with the geometry that travels with them.

`encoder` and `decoder` work on the codec's own side, in its own range of pixels; `LatentSpace` says how to get there.
Any size goes in: pictures are padded to a multiple of the factor by repeating their edges, and come back as they were.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.data import LatentSpace
from stillroom.nets.build import buildable, describe
from stillroom.settings import Refusal

buildable(LatentSpace)


class Posterior(NamedTuple):
    """q(z | x), diagonal, on the diffusion side; a codec without one has logvar None."""

    mean: Tensor
    logvar: Tensor | None


class Encodes(Protocol):
    """What measures and claims ask of a codec, of its remapped form, and of a tiled one."""

    @property
    def space(self) -> LatentSpace: ...
    @property
    def device(self) -> torch.device: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor: ...
    def reconstruct(self, x: Tensor) -> Tensor: ...


@buildable
class Codec(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module, space: LatentSpace, remap: float = 1.0):
        super().__init__()
        # Convolutions on the CPU are 1.2 to 1.4 times faster so in float32, and up to 7 times in bfloat16.
        self.encoder = encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.decoder = decoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.space, self.remap = space, remap

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers()), torch.zeros(())).device

    def answer(self, x: Tensor) -> Tensor:
        """The encoder's own, of pictures of any size: means, or means and log variances, [B, C or 2C, h, w]."""
        return self.encoder(self.into_range(padded(checked(x), self.space.factor)))

    def posterior(self, x: Tensor) -> Posterior:
        return self.normalise(self.answer(x))

    def normalise(self, answer: Tensor) -> Posterior:
        """An encoder's answer on the diffusion side."""
        if answer.shape[1] == self.space.channels:
            return Posterior(self.space.normalise(answer), None)
        mean, logvar = answer.chunk(2, 1)
        scale = torch.tensor(self.space.scale, device=answer.device, dtype=answer.dtype).view(-1, 1, 1)
        return Posterior(self.space.normalise(mean), logvar.clamp(-30, 20) - 2 * scale.log())

    def encode(self, x: Tensor) -> Tensor:
        return self.posterior(x).mean

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures of [-1, 1] (a little beyond it before they are clamped), cut to `size` where it is given."""
        x = self.out_of_range(self.decoder(self.space.denormalise(z).contiguous(memory_format=torch.channels_last)))
        return x if size is None else x[..., : size[0], : size[1]]

    @torch.no_grad()
    def pictures(self, z: Tensor, at_once: int = 16) -> Tensor:
        """Decoded for people and files: in parts, clamped, on the CPU."""
        return torch.cat([self.decode(part.to(self.device)).clamp(-1, 1).cpu() for part in z.split(at_once)])

    def features(self, z: Tensor) -> Sequence[Tensor]:
        """Feature maps of the decoder's first layers: a decoder that offers them answers `features`."""
        if not hasattr(self.decoder, "features"):
            raise Refusal(f"{type(self.decoder).__name__} has no features to match; set weights.features to 0")
        return self.decoder.features(self.space.denormalise(z))     # pyright: ignore[reportCallIssue]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), (x.shape[-2], x.shape[-1])).clamp(-1, 1)

    def remapped(self, scale: float | None = None) -> "Remapped":
        """The codec at another resolution than the picture's; at the scale that it was calibrated to, unless given."""
        return Remapped(self, self.remap if scale is None else scale)

    def into_range(self, x: Tensor) -> Tensor:
        low, high = self.space.image_range
        return (x + 1) * ((high - low) / 2) + low if (low, high) != (-1, 1) else x

    def out_of_range(self, x: Tensor) -> Tensor:
        low, high = self.space.image_range
        return (x - low) * (2 / (high - low)) - 1 if (low, high) != (-1, 1) else x


class Remapped:
    """R_s(x) = down(D(E(up_s(x)))): encode a picture as if it had been taken at another resolution (Definition 4).

    Latents grow by s^2, so a gain at s > 1 is also the gain of a larger budget.
    """

    def __init__(self, codec: Encodes, scale: float):
        if not 0 < scale < float("inf"):
            raise Refusal(f"a picture cannot be remapped by {scale}; give a scale above 0")
        self.codec, self.scale, self.space, self.device = codec, scale, codec.space, codec.device

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What the encoder sees: multiples of the factor, so the two sides' ratios differ a little. As is at scale 1,
        where the codec pads instead."""
        if self.scale == 1:
            return height, width
        f = self.space.factor
        return max(f, round(self.scale * height / f) * f), max(f, round(self.scale * width / f) * f)

    def encode(self, x: Tensor) -> Tensor:
        return self.codec.encode(resized(x, self.size(x.shape[-2], x.shape[-1])))

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            raise Refusal("a remapped codec needs the size that pictures shall have again: decode(z, (height, width))")
        return resized(self.codec.decode(z, self.size(*size)).clamp(-1, 1), size)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), (x.shape[-2], x.shape[-1]))

    def ceiling(self, x: Tensor) -> Tensor:
        """What the two resizings alone leave of the picture: no codec can do better at this scale."""
        return resized(resized(x, self.size(x.shape[-2], x.shape[-1])), (x.shape[-2], x.shape[-1]))


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing, clamped, because bicubic overshoots."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return functional.interpolate(x.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def padded(x: Tensor, factor: int) -> Tensor:
    """To multiples of the factor on the right and below, by repeating edges: reflection needs more pixels than some
    pictures have."""
    below, right = -x.shape[-2] % factor, -x.shape[-1] % factor
    x = functional.pad(x, (0, right, 0, below), mode="replicate") if below or right else x
    return x.contiguous(memory_format=torch.channels_last)


def checked(x: Tensor) -> Tensor:
    """[B, 3, H, W] floats; grey becomes three equal channels."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point() or 0 in x.shape:
        raise Refusal(
            f"a codec takes float pictures [B, 3, H, W] in [-1, 1], not {str(x.dtype).removeprefix('torch.')} "
            f"{list(x.shape)}" + ("; drop the alpha channel" if x.ndim == 4 and x.shape[1] == 4 else "")
        )
    return x.expand(-1, 3, -1, -1)


def require_multiple(what: str, factor: int, *sides: int, of: str = "") -> None:
    """Pictures in use are padded; those that are learned from or measured on are cut to fit. `what` ends in a verb or a
    comma, `of` names the codec."""
    if any(n % factor for n in sides):
        raise Refusal(f"{what} no multiple of {factor}, the pixels that a latent{of and f' of {of}'} spans; choose "
                      "another size")


def require_signed(x: Tensor, name: str) -> None:
    """Refuses pictures in [0, 1] or [0, 255] given for [-1, 1]. A set of pictures without a single dark pixel is in
    [0, 1]; one picture may be."""
    low, high = float(x.min()), float(x.max())
    if high > 1.5 or low < -1.5:
        raise Refusal(f"{name}: pixels lie in [{low:.3g}, {high:.3g}]; give pictures in [-1, 1]")
    if low >= 0:
        raise Refusal(f"{name}: no pixel is below 0, so these pictures seem to lie in [0, 1]; give them as 2 * x - 1")


def require_signed_as_given(data: object, x: Tensor) -> None:
    """Tensors have the range that they were given in; pictures from files are brought to [-1, 1], however bright."""
    if getattr(data, "in_memory", False):
        require_signed(x, getattr(data, "name", "data"))


def fingerprint(codec: Codec) -> str:
    """Names a codec by what it is made of and by its weights, for whatever was made with it. To which scale it was
    calibrated does not matter."""
    digest = hashlib.sha256(json.dumps(describe([codec.encoder, codec.decoder, codec.space]), sort_keys=True).encode())
    for name, x in sorted(codec.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

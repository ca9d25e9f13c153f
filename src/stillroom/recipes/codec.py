"""A small image codec from scratch: the baseline of distilled ones, and a teacher for them.

Problem: turn pictures into few numbers from which a decoder can draw them again.

Equation (Kingma & Welling 2014, with pixel errors as in latent diffusion): q(z | x) = N(mu(x), s(x)^2),

    min  |D(z) - x|_1 + 2 |D(z) - x|^2 + beta KL(q(z | x) || N(0, 1)),    z ~ q(z | x)

and, where asked for, a distance of feature maps (LPIPS).

The product is the moving average of both halves. Its diffusion side has channels of mean 0 and deviation 1: the
normaliser is measured on the training data.

Paper: Auto-Encoding Variational Bayes, arXiv 1312.6114.

Expect: better than the linear code of the same size (a block KLT) after some minutes; soft on fine texture, because no
term here, unless `perceptual` is given, rewards texture that merely looks right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from stillroom.codecs import Codec, require_multiple, require_signed_as_given
from stillroom.data import LatentSpace, sample
from stillroom.match.latents import unit_kl
from stillroom.measure.perceptual import RandomFeatures, feature_distance_of, lpips_in
from stillroom.nets.coding import Decoder, Encoder, sized
from stillroom.recipes._drawing import normalised
from stillroom.settings import Count, Decay, Images, NotNegative, Optimizer, Positive, Refusal, Run, Where
from stillroom.train import Average, Product, Recipe, Role, Stage
from stillroom.train.world import pick_device

FACTORS = {4: (1, 3, 3), 8: (1, 3, 3, 3), 16: (1, 3, 3, 3, 3), 32: (1, 3, 3, 3, 3, 3)}
"""Residual blocks per level of an encoder, by how many pixels a latent spans."""


@dataclass(frozen=True, kw_only=True)
class Cut(Images, Run):
    """What codecs and their students learn from: squares, and from how far away pictures are taken."""

    crop: Literal["centre", "random", "shrink"] = "shrink"
    shrink: tuple[Positive, Positive] = (1.0, 8.0)
    steps: int = 5000
    batch: int = 16
    lpips: Where = ""
    """Folder with the public weight files of LPIPS, for perceptual terms; random features stand in, unless given."""
    average: Decay = 0.999


@dataclass(frozen=True, kw_only=True)
class Squares(Cut):
    size: int = 64


@dataclass(frozen=True, kw_only=True)
class Settings(Squares):
    steps: int = 4000
    channels: Count = 16
    factor: Literal[4, 8, 16, 32] = 8
    """Pixels a side that one latent spans."""
    stem: Literal["conv", "unshuffle"] = "conv"
    """unshuffle folds 4x4 pixels into channels first: several times faster."""
    params: Count = 1_200_000
    """Parameters of the encoder, about."""
    decoder_params: Count = 1_200_000
    l1: NotNegative = 1.0
    mse: NotNegative = 2.0
    kl: NotNegative = 1e-6
    """Weight of the divergence, summed over a picture's latents and divided by its numbers, of a grey
    one its pixels."""
    perceptual: NotNegative = 0.0
    """Distance of feature maps, with `lpips` or random features."""
    model: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, clip=1.0, warmup=100, decay="cosine"))


def perceptual_of(settings: Cut, weight: float) -> tuple[str, Callable[[Tensor, Tensor], Tensor]] | None:
    """A distance of two pictures' feature maps [B], and its name: a stand-in is not called LPIPS. None where it counts
    for nothing."""
    if not weight:
        return None
    device = pick_device(settings.device)
    if not settings.lpips:
        return "random_lpips", feature_distance_of(RandomFeatures().to(device))
    found = lpips_in(Path(settings.lpips))
    net = "vgg" if "vgg" in found else next(iter(found))
    return f"lpips_{net}", found[net].to(device)


def new_codec(settings: Settings) -> Codec:
    """Untrained, with latents as they come: neither shifted nor scaled."""
    channels, blocks, stem = settings.channels, FACTORS[settings.factor], settings.stem
    encoder = sized(settings.params, lambda w: Encoder(channels, w, blocks, stem=stem, moments=True))
    decoder = sized(settings.decoder_params, lambda w: Decoder(channels, w, blocks[::-1], stem=stem, soft_clamp=False))
    space = LatentSpace(channels, settings.factor, (0.0,) * channels, (1.0,) * channels, encoder.offset)
    return Codec(encoder, decoder, space)


def require_whole_latents(data, factor: int) -> None:
    """Padding is for pictures in use: what is learned from is cut to fit."""
    if len(data.shape) != 3 or data.shape[0] not in (1, 3):
        raise Refusal(f"{data.name}: holds items of shape {list(data.shape)}, and codecs learn from pictures of 3 "
                      "channels, or 1; give pictures")
    height, width = data.shape[-2:]
    require_multiple(f"{data.name}: pictures of {width} x {height} pixels,", factor, height, width)


def blocks_of(name: str, factor: int) -> tuple[int, ...]:
    """Of a student in the place of a half of the codec `name`."""
    if factor not in FACTORS:
        raise Refusal(f"{name}: its latents span {factor} pixels; students span {', '.join(map(str, FACTORS))}")
    return FACTORS[factor]


def student_product(settings: Any, teacher_hash: str, codec: Codec, student: nn.Module) -> Product:
    """A codec of which one half is the student."""
    s = settings
    card = {"teacher": s.teacher, "teacher_hash": teacher_hash, "data": s.data, "size": s.size,
            "shrink": list(s.shrink) if s.crop == "shrink" else None,
            "parameters": sum(p.numel() for p in student.parameters())}
    return Product("codec", {"codec": codec}, card)


class FromScratch(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        require_whole_latents(data, settings.factor)
        self.settings, self.data = settings, data
        self.codec = new_codec(settings)
        self.perceptual = perceptual_of(settings, settings.perceptual)
        self.mean = Average(self.codec, settings.average)

    def check(self, batch):
        require_signed_as_given(self.data, batch["data"].x)

    def roles(self):
        return {"model": Role(self.codec, self.settings.model, average=self.mean)}

    def stages(self):
        return [Stage("train", self.settings.steps)]

    def losses(self, batch, turn):
        x, s = batch["data"].x, self.settings
        mean, logvar = (part.float() for part in self.codec.posterior(x) if part is not None)
        drawn = self.codec.decode(mean + (logvar / 2).exp() * turn.randn(mean)).float()
        error = drawn - x
        terms = {
            "l1": s.l1 * error.abs().flatten(1).mean(1),
            "mse": s.mse * error.square().flatten(1).mean(1),
            "kl": s.kl * unit_kl(mean, logvar) / x[0].numel(),
        }
        if self.perceptual is not None:
            name, distance = self.perceptual
            terms[name] = s.perceptual * distance(drawn, x.expand(-1, 3, -1, -1))
        return {"model": terms}

    def preview(self):
        x = self.sample(16)
        return {"pictures": x, "reconstructions": cast(Codec, self.mean.module).reconstruct(x)}

    def sample(self, count: int):
        return sample(self.data, count, self.settings.seed).x.to(next(self.codec.parameters()).device)

    def product(self):
        count = max(32, min(512, 512 * 64**2 // math.prod(self.data.shape[-2:])))       # larger ones hold more latents
        codec, _ = normalised(cast(Codec, self.mean.module), self.data, self.settings.seed, count)
        card = {"data": self.settings.data, "size": self.settings.size}
        return Product("codec", {"codec": codec}, card)

"""A small decoder that draws what a large one draws.

Problem: the decoder of an image codec costs more than its encoder; previews, and small devices, need a cheaper one.

Equation: with the teacher's encoder E_T and decoder D_T, and z = mu_T(x),

    min_D  E_x  a e(D(z), x) + b e(D(z), D_T(z)),    e(u, v) = |u - v|_1 + |u - v|^2

and the other terms of `weights`, each 0 unless given.

Paper: Turbo-VAED: Fast and Stable Transfer of Video-VAEs to Mobile Devices, arXiv 2508.09136. The form is that of TAESD
(https://github.com/madebyollin/taesd), which has no paper.

Expect: reconstructions a decibel or so below the teacher's (28.08 dB for 29.40 was measured, with a fifth of its
parameters); without an adversarial term, softer texture.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stillroom.codecs import Codec, fingerprint, require_signed_as_given, require_usable
from stillroom.data import sample
from stillroom.match import latents as match
from stillroom.nets.coding import Decoder, sized
from stillroom.recipes.codec import Squares, blocks_of, perceptual_of, require_whole_latents, student_product
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Where
from stillroom.train import Average, Recipe, Role, Stage
from stillroom.train.teacher import open_codec
from stillroom.train.world import pick_device


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What each term counts for; those of 0 are not computed."""

    picture: NotNegative = 1.0
    """L1 + MSE to the picture itself."""
    teacher: NotNegative = 1.0
    """L1 + MSE to the teacher's reconstruction."""
    blur: NotNegative = 0.0
    """High-frequency energy that the reconstruction lacks against the picture."""
    perceptual: NotNegative = 0.0
    """Feature maps of the picture and of its reconstruction, with `lpips` or random features."""


@dataclass(frozen=True, kw_only=True)
class Settings(Squares):
    teacher: Where
    """`bundled`, a diffusers folder or hub id, a pair of TAESD weight files, or one of our codec runs."""
    params: Count = 1_200_000
    """Parameters of the student, about: its width is chosen for it."""
    stem: Literal["conv", "unshuffle"] = "conv"
    """conv is TAESD's form, which other programs read; unshuffle unfolds 4x4 pixels out of channels last, faster."""
    weights: Weights = field(default_factory=Weights)
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, clip=1.0, warmup=100, decay="cosine"))


class DecoderDistillation(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        self.settings, self.data = settings, data
        self.teacher = open_codec(settings.teacher).to(pick_device(settings.device))
        space = self.teacher.space
        blocks = blocks_of(f"teacher {settings.teacher}", space.factor)[::-1]
        require_whole_latents(data, space.factor)
        w = settings.weights
        if not (w.picture or w.teacher or w.blur or w.perceptual):
            raise Refusal("weights: all are 0, so there is nothing to learn; set one above 0")
        unit_range = settings.stem == "conv" and space.image_range == (-1, 1)    # a TAESD teacher's is [0, 1] already
        student = sized(settings.params, lambda w: Decoder(space.channels, w, blocks, stem=settings.stem,
                                                           shift=space.shift, scale=space.scale, unit_range=unit_range))
        self.codec = Codec(self.teacher.encoder, student, space)
        self.mean = Average(student, settings.average)
        self.perceptual = perceptual_of(settings, settings.weights.perceptual)

    def check(self, batch):
        require_signed_as_given(self.data, batch["data"].x)
        require_usable(self.teacher, batch["data"].x, f"teacher {self.settings.teacher}")

    def roles(self):
        return {"student": Role(self.codec.decoder, self.settings.student, average=self.mean)}

    def stages(self):
        return [Stage("distil", self.settings.steps)]

    def losses(self, batch, turn):
        x, w = batch["data"].x.expand(-1, 3, -1, -1), self.settings.weights
        with torch.no_grad():
            z = self.teacher.encode(x)
            drawn = self.teacher.decode(z) if w.teacher else x
        mine = self.codec.decode(z)
        terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
            "picture": (w.picture, lambda: match.pixel_error(mine, x)),
            "teacher": (w.teacher, lambda: match.pixel_error(mine, drawn)),
            "blur": (w.blur, lambda: match.blur(mine, x)),
        }
        if self.perceptual is not None:
            name, distance = self.perceptual
            terms[name] = w.perceptual, lambda: distance(mine, x)
        return {"student": {name: weight * term() for name, (weight, term) in terms.items() if weight}}

    def finished(self) -> Codec:
        return Codec(self.teacher.encoder, self.mean.module, self.teacher.space)

    def preview(self):
        x = sample(self.data, 16, self.settings.seed).x.to(pick_device(self.settings.device))
        return {"pictures": x, "teacher": self.teacher.reconstruct(x), "student": self.finished().reconstruct(x)}

    def product(self):
        return student_product(self.settings, fingerprint(self.teacher), self.finished(), self.codec.decoder)

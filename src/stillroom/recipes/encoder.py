"""A small encoder that answers as a large one does, learned at low resolution.

Problem: the encoder of an image codec costs more than it need; replace it without changing the latent space.

Equation: with the teacher's posterior N(mu_T, s_T^2) on the diffusion side and sigma_c its deviation in channel c,

    min_S  E_x h((mu_S(x) - mu_T(x)) / sigma_c)        (and the terms of `weights`, each 0 unless given)

h is Huber's: a square up to 0.15, a line beyond. In our ablation it is a little better than the paper's square.

x are squares of `size` pixels, cut out of pictures and shrunk by a factor log-uniform in `shrink`: that law *is* the
resolution at which the student learns. The teacher's decoder stays as it is.

Paper: Distilling Latent Manifolds: Resolution Extrapolation by Variational Autoencoders, arXiv 2603.14536.

Expect: latents within some thousandths of the teacher's variance, closer still on enlarged pictures; the
reconstruction's error grows by tenths of a decibel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stillroom.codecs import Codec, fingerprint, require_signed_as_given, require_usable
from stillroom.data import Batch, Pairs, sample, write_pairs
from stillroom.match import latents as match
from stillroom.nets.coding import Encoder, sized
from stillroom.recipes.codec import Squares, blocks_of, perceptual_of, require_whole_latents, student_product
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Where
from stillroom.train import Average, Recipe, Role, Stage
from stillroom.train.teacher import open_codec
from stillroom.train.world import pick_device


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What each term counts for; those of 0 are not computed."""

    huber: NotNegative = 1.0
    """Of the latents' error in units of the teacher's deviation: half its square up to 0.15, straight beyond."""
    mse: NotNegative = 0.0
    l1: NotNegative = 0.0
    logvar: NotNegative = 0.005
    """Squared error of the log variances, for a student with moments."""
    kl: NotNegative = 0.0
    """KL(student || teacher) of the posteriors, the teacher's variance floored."""
    wasserstein: NotNegative = 0.0
    statistics: NotNegative = 0.0
    """Mean and deviation of each channel, picture by picture."""
    features: NotNegative = 0.0
    """Feature maps of the first layers of the teacher's decoder."""
    pixels: NotNegative = 0.0
    """L1 + MSE between the picture and its reconstruction by the teacher's decoder."""
    blur: NotNegative = 0.0
    """High-frequency energy that the reconstruction lacks against the teacher's."""
    perceptual: NotNegative = 0.0
    """Feature maps of the picture and of its reconstruction, with `lpips` or random features."""


@dataclass(frozen=True, kw_only=True)
class Settings(Squares):
    teacher: Where
    """`bundled`, a diffusers folder or hub id, a TAESD weight file, or one of our codec runs."""
    params: Count = 2_000_000
    """Parameters of the student, about: its width is chosen for it."""
    stem: Literal["conv", "unshuffle"] = "unshuffle"
    """unshuffle folds 4x4 pixels into channels first; conv is TAESD's form, which other programs read, and slower."""
    pool: bool = False
    """Global statistics in the lowest level, for a teacher whose norms or attention see the whole picture."""
    moments: bool = False
    """Learn the posterior's variance too."""
    padding: Literal["teacher", "symmetric", "asymmetric"] = "teacher"
    """Of strided convolutions: it places the latents' grid. teacher takes what is nearest to the teacher's grid."""
    begin: Where = ""
    """A run of this recipe whose student this one starts from, in the form that it has: a finishing phase at a larger
    size."""
    cache: Path | None = None
    """Folder for the teacher's answers to `cache_crops` fixed crops, asked once; else it is asked in every step. --plan
    fills no cache, and tells the cost without it."""
    cache_crops: Count = 8192
    weights: Weights = field(default_factory=Weights)
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, clip=1.0, warmup=100, decay="cosine"))


def new_student(settings: Settings, teacher: Codec, answers: Tensor) -> Encoder:
    """Sized by its parameters, on the teacher's grid, beginning at the teacher's mean and deviation per channel."""
    space = teacher.space
    channels = 2 * space.channels if settings.moments else space.channels
    blocks = blocks_of(f"teacher {settings.teacher}", space.factor)
    mean, std = (s.tolist() for s in statistics(answers[:, :channels]))

    def make(width: int, padding: str) -> Encoder:
        return Encoder(space.channels, width, blocks, stem=settings.stem, padding=padding,
                       pool=settings.pool, moments=settings.moments, shift=tuple(mean), scale=tuple(std),
                       # as TAESD's layers, which see pictures in [0, 1]; a TAESD teacher's space has made them so
                       unit_range=settings.stem == "conv" and space.image_range == (-1, 1))

    padding = settings.padding
    if padding == "teacher":
        padding = min(("symmetric", "asymmetric"), key=lambda p: abs(make(8, p).offset - space.offset))
    return sized(settings.params, lambda width: make(width, padding))


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """[C] mean and deviation of every channel of [B, C, h, w]; a dead channel is not measured by its rounding."""
    flat = z.float().transpose(0, 1).flatten(1).contiguous()     # or the order of the sum is the memory's
    std = flat.std(1)
    return flat.mean(1), std.clamp(min=1e-3 * float(std.mean()))


class EncoderDistillation(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        self.settings, self.data = settings, data
        teacher, first = opened(settings), sample(data, 64, settings.seed)
        self.teacher_hash = fingerprint(teacher)
        if isinstance(data, Pairs) and data.answers.encoding.codec != self.teacher_hash:
            raise Refusal(f"{data.name}: another codec's answers, not those of teacher {settings.teacher}")
        refuse_what_cannot_be(settings, teacher, data, first.x)
        # A teacher whose answers are kept need not be: of a large one, that is most of the memory.
        self.teacher = None if isinstance(data, Pairs) else teacher
        # Asked in parts, because a finishing phase may see large pictures.
        answers = self.answers(first).to(teacher.device) if self.teacher is None else torch.cat(
            [answering(teacher)(part) for part in first.x.split(8)])
        self.std = statistics(teacher.normalise(answers).mean)[1].view(-1, 1, 1)
        made = begun if settings.begin else new_student
        student = made(settings, teacher, answers)
        self.codec = Codec(student, teacher.decoder, teacher.space)
        self.mean = Average(student, settings.average)
        self.perceptual = perceptual_of(settings, settings.weights.perceptual)

    @classmethod
    def prepare(cls, settings, sources, note):
        if settings.cache is None:
            return sources
        data, teacher, x = sources["data"], opened(settings), sample(sources["data"], 16, settings.seed).x
        refuse_what_cannot_be(settings, teacher, data, x)
        require_signed_as_given(data, x)
        require_usable(teacher, x, f"teacher {settings.teacher}")
        law = f"{settings.crop} {settings.size}" + (f" {settings.shrink}" if settings.crop == "shrink" else "")
        crop = law + (" mirrored" if settings.flip else "")
        return {"data": write_pairs(settings.cache, data, settings.cache_crops, answering(teacher),
                                    fingerprint(teacher), crop, note)}

    def answers(self, batch: Batch) -> Tensor:
        """The teacher's: kept beside the pictures, or asked for. Labels, which pictures may have too, are none."""
        return batch.y if self.teacher is None else answering(self.teacher)(batch.x)    # pyright: ignore

    def check(self, batch):
        require_signed_as_given(self.data, batch["data"].x)
        if self.teacher is not None:
            require_usable(self.teacher, batch["data"].x, f"teacher {self.settings.teacher}")

    def roles(self):
        return {"student": Role(self.codec.encoder, self.settings.student, average=self.mean)}

    def stages(self):
        return [Stage("distil", self.settings.steps)]

    def losses(self, batch, turn):
        x = batch["data"].x.expand(-1, 3, -1, -1)
        t, s = self.codec.normalise(self.answers(batch["data"])), self.codec.posterior(x)
        return {"student": {name: weight * term() for name, (weight, term) in self.terms(x, s, t).items() if weight}}

    def terms(self, x: Tensor, s, t) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        w, std = self.settings.weights, self.std
        drawn = cache(lambda: self.codec.decode(s.mean))
        terms = {
            "huber": (w.huber, lambda: match.latent_huber(s.mean, t.mean, std)),
            "mse": (w.mse, lambda: match.latent_mse(s.mean, t.mean, std)),
            "l1": (w.l1, lambda: match.latent_l1(s.mean, t.mean, std)),
            "statistics": (w.statistics, lambda: match.statistics_distance(s.mean, t.mean)),
            "features": (w.features, lambda: self.feature_term(s.mean, t.mean)),
            "pixels": (w.pixels, lambda: match.pixel_error(drawn(), x)),
            "blur": (w.blur, lambda: match.blur(drawn(), self.decoded(t.mean))),
        }
        if self.perceptual is not None:
            name, distance = self.perceptual
            terms[name] = w.perceptual, lambda: distance(drawn(), x)
        if s.logvar is not None and t.logvar is not None:
            terms |= {
                "logvar": (w.logvar, lambda: match.latent_mse(s.logvar, t.logvar)),
                "kl": (w.kl, lambda: match.posterior_kl(*s, *t)),
                "wasserstein": (w.wasserstein, lambda: match.wasserstein2(*s, *t)),
            }
        return terms

    def feature_term(self, mine: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.codec.features(theirs)
        return match.feature_distance(self.codec.features(mine), target)

    def decoded(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.codec.decode(z)

    def finished(self) -> Codec:
        return Codec(self.mean.module, self.codec.decoder, self.codec.space)

    def preview(self):
        batch = sample(self.data, 16, self.settings.seed)
        x, answers = batch.x.to(self.codec.device), self.answers(batch).to(self.codec.device)
        drawn = self.codec.decode(self.codec.normalise(answers).mean).clamp(-1, 1)
        return {"pictures": x, "teacher": drawn, "student": self.finished().reconstruct(x)}

    def product(self):
        return student_product(self.settings, self.teacher_hash, self.finished(), self.codec.encoder)


def opened(settings: Settings) -> Codec:
    return open_codec(settings.teacher).to(pick_device(settings.device))


def answering(teacher: Codec) -> Callable[[Tensor], Tensor]:
    """The teacher's own answers, means or moments on its own side, without gradient."""
    @torch.no_grad()
    def answer(x: Tensor) -> Tensor:
        return teacher.answer(x.to(teacher.device)).float()

    return answer


def refuse_what_cannot_be(settings: Settings, teacher: Codec, data, x: Tensor) -> None:
    """Before anything is learned, or asked for hours."""
    w, space, name = settings.weights, teacher.space, f"teacher {settings.teacher}"
    blocks_of(name, space.factor)
    require_whole_latents(data, space.factor)
    of_variance = w.logvar or w.kl or w.wasserstein
    if settings.moments and answering(teacher)(x[:1]).shape[1] == space.channels:
        raise Refusal(f"{name}: it answers means alone, so no variance can be learned from it; leave out moments")
    if settings.moments and not of_variance:
        raise Refusal("moments: no term teaches the variance; set weights.logvar, kl or wasserstein above 0")
    if not settings.moments and (w.kl or w.wasserstein):
        raise Refusal("weights.kl and weights.wasserstein compare posteriors: add --moments")
    if not any((w.mse, w.l1, w.huber, w.kl, w.wasserstein, w.statistics, w.features, w.pixels, w.blur, w.perceptual)):
        raise Refusal("weights: no term teaches the mean; set one above 0, weights.huber first")
    if w.features and not hasattr(teacher.decoder, "features"):
        raise Refusal(f"{name}: its {type(teacher.decoder).__name__} has no features to match; set weights.features "
                      "to 0")


def begun(settings: Settings, teacher: Codec, _answers: Tensor) -> Encoder:
    codec, name = open_codec(settings.begin).to(teacher.device), f"begin {settings.begin}"
    if not isinstance(codec.encoder, Encoder):
        raise Refusal(f"{name}: its encoder is a {type(codec.encoder).__name__}, and no student; give a run of "
                      "stillroom distill encoder")
    if codec.space != teacher.space:
        raise Refusal(f"{name}: its latents lie in another space than those of teacher {settings.teacher}")
    if codec.encoder.moments != settings.moments:
        raise Refusal(f"{name}: its student was made with moments = {codec.encoder.moments}; say so here too")
    refuse_another_form(settings, codec.encoder)
    return codec.encoder.requires_grad_(True)


def refuse_another_form(settings: Settings, student: Encoder) -> None:
    """Asked of a student that has one."""
    count, default = sum(p.numel() for p in student.parameters()), Settings.__dataclass_fields__
    about = settings.params if count / 2 < settings.params < 2 * count else count       # sizes are met by whole widths
    form = {"params": about} | {name: getattr(student, name) for name in ("stem", "pool", "padding")}
    for name, has in form.items():
        if (given := getattr(settings, name)) not in (has, default[name].default):
            raise Refusal(f"{name} = {given}: the student of {settings.begin} keeps the form that it has, {has}; leave "
                          "it out")

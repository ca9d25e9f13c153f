"""Codecs over resolutions: pictures of one size, remapped by each scale, through each contender.

Rows are for the report; per-picture values stay, because intervals are taken over pictures. Pictures go through a few
at a time and their latents are not kept: what a large size needs is the squares in bytes, and one chunk.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.codecs.codec import Codec, Remapped, resized
from stillroom.codecs.klt import BlockDecoder, BlockEncoder
from stillroom.codecs.tiles import Tiled
from stillroom.data import LatentSpace
from stillroom.data.images import signed
from stillroom.measure import images as measure
from stillroom.measure.frechet import Moments, distance_between, moments_of
from stillroom.measure.images import as_8bit

CHUNK = 2**21
"""Pixels, as the encoder sees them, that go through a codec at once."""
REPEATS, ENOUGH = 5, 2.0
"""Of a timing: how often at most, and the seconds after which it is not repeated again."""

Metric = Callable[[Tensor, Tensor], Tensor]
METRICS: Mapping[str, Metric] = {
    "psnr": measure.psnr, "mse": measure.mse, "ssim": measure.ssim, "ms_ssim": measure.ms_ssim,
    "gmsd": measure.gmsd, "high_frequency": measure.high_frequency_ratio,
}
SMALLEST = {"ssim": measure.SSIM_SMALLEST, "ms_ssim": measure.MS_SSIM_SMALLEST, "gmsd": 4}
"""Pixels a side below which a metric is not defined."""


class Remaps(Protocol):
    """A contender: the form it takes at a scale, or None where it has none there."""

    def remapped(self, scale: float, /) -> Remapped | None: ...


@dataclass
class Row:
    """One contender at one size and scale."""

    contender: str
    size: int
    scale: float
    latents: int                                            # numbers per picture
    values: dict[str, list[float]] = field(default_factory=dict)        # per picture
    channels: dict[str, list[float]] = field(default_factory=dict)      # mean and std of each latent channel
    scores: dict[str, float] = field(default_factory=dict)              # of all pictures together: Fréchet distances
    encode_ms: float | None = None                                      # of one picture


class Laws(NamedTuple):
    """Features in which the law of the reconstructions is compared with that of the pictures: vectors [B, D]."""

    name: str                                               # "fid", or "rf_fid" in random features
    features: Callable[[Tensor], Tensor]


def applicable(metrics: Mapping[str, Metric], size: int, smallest: Mapping[str, int] = SMALLEST) -> dict[str, Metric]:
    return {name: metric for name, metric in metrics.items() if size >= smallest.get(name, 1)}


def square(picture: Tensor, size: int) -> Tensor | None:
    """uint8 [3, size, size]: the middle square of a picture [3, H, W], shrunk; None where the picture is too small."""
    side = min(picture.shape[-2:])
    if side < size:
        return None
    top, left = (picture.shape[-2] - side) // 2, (picture.shape[-1] - side) // 2
    x = picture[:, top : top + side, left : left + side]
    x = signed(x) if x.dtype == torch.uint8 else x
    return (resized(x[None], (size, size))[0] + 1).mul(127.5).round().to(torch.uint8)


def sweep(contenders: Mapping[str, Remaps], x: Tensor, scales: Sequence[float], reference: str,
          metrics: Mapping[str, Metric] = METRICS, laws: Laws | None = None,
          clock: Callable[[Remapped, Tensor], float] | None = None, tile: int = 0) -> Iterator[Row]:
    """All contenders on pictures [N, 3, S, S], uint8 or in [-1, 1], at every scale; latents are compared with the
    `reference`'s. Last at each scale comes the ceiling: what resizing there and back leaves without any codec."""
    metrics = applicable(metrics, x.shape[-1])
    target = moments_of(laws.features, map(_floats, x.split(8))) if laws and len(x) > 1 else None
    for scale in scales:
        forms = forms_at(contenders, scale, x, tile)
        gauges = _gauged(forms, x, scale, reference, metrics, laws if target else None)
        for name, gauge in gauges.items():
            row = gauge.row(name, x.shape[-1], scale, gauges[reference])
            if target and laws and gauge.law is not None:
                row.scores[laws.name] = distance_between(gauge.law, target)
            if clock is not None and name in forms:
                row.encode_ms = clock(forms[name], _floats(x[:1]))
            yield row


def forms_at(contenders: Mapping[str, Remaps], scale: float, x: Tensor, tile: int = 0) -> dict[str, Remapped]:
    """What the contenders become at a scale; in tiles where the encoder would see more than `tile` pixels a side."""
    def of_size(form: Remapped) -> Remapped:
        small = not tile or max(form.size(x.shape[-2], x.shape[-1])) <= tile
        return form if small or not isinstance(form.codec, Codec) else Remapped(Tiled(form.codec, tile), form.scale)

    return {name: of_size(form) for name, c in contenders.items() if (form := c.remapped(scale)) is not None}


def _floats(x: Tensor) -> Tensor:
    return signed(x) if x.dtype == torch.uint8 else x


@torch.inference_mode()
def _gauged(forms: Mapping[str, Remapped], x: Tensor, scale: float, reference: str, metrics: Mapping[str, Metric],
            laws: Laws | None) -> dict[str, "Gauge"]:
    gauges = {name: Gauge(metrics, laws) for name in (*forms, "ceiling")}
    their_form = forms[reference]
    for part in x.split(_at_once(their_form, x)):
        part = _floats(part).to(their_form.device)
        theirs = their_form.encode(part).float()
        for name, form in forms.items():
            z = theirs if name == reference else form.encode(part).float()
            gauges[name].see(part, form.decode(z, (part.shape[-2], part.shape[-1])))
            gauges[name].compare(z, theirs)
        if scale != 1:          # at 1 nothing is resized
            gauges["ceiling"].see(part, their_form.ceiling(part))
    return gauges if scale != 1 else {name: g for name, g in gauges.items() if name != "ceiling"}


def _at_once(remapped: Remapped, x: Tensor) -> int:
    height, width = remapped.size(x.shape[-2], x.shape[-1])
    return max(1, CHUNK // (height * width))


class Gauge:
    """What one contender does at one size and scale, as parts of the set go by."""

    def __init__(self, metrics: Mapping[str, Metric], laws: Laws | None):
        self.metrics, self.laws, self.law = metrics, laws, None
        self.values: dict[str, list[float]] = {name: [] for name in metrics}
        self.latents, self.count = 0, 0
        self.sums, self.squares = torch.zeros(0), torch.zeros(0)            # of every channel, in float64
        self.errors, self.cosines = list[Tensor](), list[float]()           # [B, C] each; one per picture

    def see(self, x: Tensor, again: Tensor) -> None:
        for name, metric in self.metrics.items():
            self.values[name] += metric(again, x).tolist()
        if self.laws is not None:
            vectors = self.laws.features(as_8bit(again))
            self.law = (self.law or Moments(vectors.shape[1])).add(vectors)

    def compare(self, z: Tensor, theirs: Tensor) -> None:
        """Of latents [B, C, h, w]: what agreement and the channels' statistics need."""
        flat = z.double().transpose(0, 1).flatten(1).cpu()                  # [C, B h w]
        if not self.count:
            self.sums, self.squares = flat.new_zeros(len(flat)), flat.new_zeros(len(flat))
        self.latents, self.count = z[0].numel(), self.count + flat.shape[1]
        self.sums, self.squares = self.sums + flat.sum(1), self.squares + flat.square().sum(1)
        if z.shape == theirs.shape:
            self.errors.append((z - theirs).square().mean((2, 3)).double().cpu())
            self.cosines += functional.cosine_similarity(z.flatten(1), theirs.flatten(1), dim=1).tolist()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """[C] mean and variance of the latents seen."""
        mean = self.sums / max(self.count, 1)
        return mean, (self.squares - self.count * mean.square()).clamp(min=0) / max(self.count - 1, 1)

    def row(self, name: str, size: int, scale: float, reference: "Gauge") -> Row:
        mean, variance = self.statistics()
        row = Row(name, size, scale, self.latents, dict(self.values))
        if self.count:
            row.channels = {"mean": mean.tolist(), "std": variance.sqrt().tolist()}
        if self.errors:     # in units of the reference's variance at this very size and scale
            theirs = reference.statistics()[1].clamp(min=1e-12)
            row.values |= {"nmse": (torch.cat(self.errors) / theirs).mean(1).tolist(), "cosine": self.cosines}
        return row


@torch.inference_mode()
def encode_ms(form: Remapped, x: Tensor) -> float:
    """Median milliseconds of encoding one picture [1, 3, S, S], resizing left out."""
    seen = resized(x, form.size(x.shape[-2], x.shape[-1])).to(form.device)
    times = list[float]()

    form.codec.encode(seen)     # the first one also allocates
    while not times or (len(times) < REPEATS and sum(times) < ENOUGH):
        wait_for(seen.device)
        start = time.perf_counter()
        form.codec.encode(seen)
        wait_for(seen.device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the linear codec, and what it does with the latents that remapping would spend ----

def truncated(klt: Codec, channels: int) -> Codec:
    """The KLT of fewer channels: the first ones, because the best bases of all sizes lie in one another."""
    block = klt.space.factor
    halves = BlockEncoder(channels, block), BlockDecoder(channels, block)
    for half, whole in zip(halves, (klt.encoder, klt.decoder), strict=True):
        half.basis.copy_(whole.basis[:channels])            # pyright: ignore[reportIndexIssue]
        half.mean.copy_(whole.mean)                         # pyright: ignore[reportArgumentType]
    space = LatentSpace(channels, block, (0.0,) * channels, klt.space.scale[:channels], klt.space.offset)
    return Codec(*halves, space).to(klt.device).eval()


class EqualBudget:
    """At native size, a KLT of as many channels as remapping one of `channels` would spend: what enlarging gains over
    it, it does not gain by having more latents. None where that is as many numbers as the picture has."""

    def __init__(self, whole: Codec, channels: int):
        self.whole, self.channels = whole, channels

    def remapped(self, scale: float) -> Remapped | None:
        channels = max(1, round(self.channels * scale**2))
        return truncated(self.whole, channels).remapped(1.0) if channels < self.whole.space.channels else None

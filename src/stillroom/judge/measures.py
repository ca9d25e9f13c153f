"""What a codec gives back, and what its latents are like, as mappings that JSON holds."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stillroom.codecs import Codec
from stillroom.codecs.study import spread
from stillroom.flows.gate import BINS
from stillroom.measure import images
from stillroom.measure.distances import sliced_wasserstein
from stillroom.measure.frechet import Moments, distance_between
from stillroom.measure.geometry import Over, cloud_of, spectrum, vectors
from stillroom.measure.images import as_8bit
from stillroom.measure.perceptual import BACKBONES, Lpips, RandomFeatures, feature_distance_of
from stillroom.measure.portrait import said
from stillroom.measure.probes import knn_probe, linear_probe
from stillroom.measure.samples import energy_distance
from stillroom.measure.spectral import equivariance, spectral_slope
from stillroom.measure.velocity import viv
from stillroom.settings import Refusal

VECTORS = 2000          # of one kind whose covariance and neighbours are looked at
MOVED = 128             # pictures that are turned and flipped
PAIRED = 2000           # latents of a side whose pairwise distances are taken
Metric = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor | None]]


def rgb(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)


# ---- reconstruction ----

def metrics_for(size: int, lpips: Mapping[str, Lpips],
                device: torch.device) -> tuple[dict[str, Metric], dict[str, str]]:
    """Distances of two pictures, and those that cannot be taken, with what they need."""
    found: dict[str, Metric] = {"psnr": images.psnr, "ssim": images.ssim}
    found["random_lpips"] = feature_distance_of(RandomFeatures().to(device))
    absent: dict[str, str] = {}
    if size < images.SSIM_SMALLEST:
        found.pop("ssim")
        absent["ssim"] = f"pictures of {size} pixels are below its {images.SSIM_SMALLEST}"
    if not lpips:
        return found, absent | {"lpips": "needs --lpips FOLDER with its public weight files"}
    for net, distance in lpips.items():
        if size < BACKBONES[net].smallest:
            absent[f"lpips_{net}"] = f"pictures of {size} pixels are below its {BACKBONES[net].smallest}"
        else:
            found[f"lpips_{net}"] = distance.to(device)
    return found, absent


@torch.no_grad()
def reconstruction(codec: Codec, pictures: Batches, metrics: Mapping[str, Metric],
                   features: Callable[[Tensor], Tensor], shown: int) -> tuple[dict[str, Any], Tensor]:
    """Held-out pictures there and back: every picture's values and their means, the Fréchet distance of all together,
    and the first ones as they came back."""
    values: dict[str, list[float]] = {name: [] for name in metrics}
    mine: Moments | None = None
    theirs: Moments | None = None
    back = list[Tensor]()
    for x, _ in pictures:
        x = rgb(x).to(codec.device)
        again = torch.cat([codec.reconstruct(part) for part in x.split(16)])
        if not bool(again.isfinite().all()):
            raise Refusal("the codec answers NaN or infinity: it cannot be compared")
        for name, metric in metrics.items():
            values[name] += metric(again, x).tolist()
        a, b = (features(as_8bit(side).cpu()) for side in (again, x))
        mine, theirs = (mine or Moments(a.shape[1])).add(a), (theirs or Moments(b.shape[1])).add(b)
        if sum(map(len, back)) < shown:
            back.append(again.cpu())
    if mine is None or theirs is None:
        raise Refusal("there are no held-out pictures")
    told = {"values": {k: [v if math.isfinite(v) else None for v in vs] for k, vs in values.items()},
            "means": {k: spread(vs)._asdict() for k, vs in values.items()},
            "frechet": distance_between(mine, theirs), "n": mine.count}
    return told, torch.cat(back)[:shown]


# ---- latents ----

def plain(thing: Any) -> Any:
    """Records and tensors as JSON holds them."""
    if hasattr(thing, "_asdict"):
        return {key: plain(value) for key, value in thing._asdict().items()}
    if isinstance(thing, Mapping):
        return {str(key): plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(value) for value in thing]
    return thing.tolist() if hasattr(thing, "tolist") else thing


def of_latents(z: Tensor, y: Tensor | None, held: Tensor, held_y: Tensor | None, seed: int) -> dict[str, Any]:
    """Of normalised latents [N, C, h, w], and of held-out ones by which probes are judged."""
    channels = held.transpose(0, 1).flatten(1)                      # [C, N h w]
    mean, std = channels.mean(1), channels.std(1)
    found: dict[str, Any] = {
        "n": len(z), "held_out": len(held),
        "channels": {"mean": [float(mean.min()), float(mean.max())], "std": [float(std.min()), float(std.max())]},
        "slope": said(spectral_slope, held), "viv": said(viv, z, held, BINS, seed),
        "spectra": {over: said(spectrum, cloud_of(z, None, over, "after", VECTORS, seed)) for over in _overs(z)},
    }
    found["probes"] = probes(z, y, held, held_y)
    return plain(found)


def _overs(z: Tensor) -> Iterator[Over]:
    if z.shape[1] > 1:
        yield "token"
    yield "element"


def probes(z: Tensor, y: Tensor | None, held: Tensor, held_y: Tensor | None) -> dict[str, Any]:
    if y is None or held_y is None:
        return {"why": "the data have no labels"}
    found: dict[str, Any] = {}
    kinds: tuple[tuple[Over, str], ...] = (("pooled", "pooled"), ("element", "flattened"))
    for over, name in kinds:
        x, test = vectors(z, over), vectors(held, over)
        found[name] = {"linear": said(linear_probe, x, y, test, held_y), "knn": said(knn_probe, x, y, test, held_y)}
    return found


@torch.no_grad()
def moves(codec: Codec, x: Tensor) -> dict[str, float | None]:
    """Of the first MOVED held-out pictures; in small batches, as large pictures need."""
    x = rgb(x[:MOVED])

    def encode(x: Tensor) -> Tensor:
        return torch.cat([codec.encode(part.to(codec.device)).float().cpu() for part in x.split(16)])

    return equivariance(encode, x)


def distance_to(z: Tensor, w: Tensor, again: Tensor, seed: int) -> dict[str, Any]:
    """Of latents to a reference's samples, and, the floor, of the reference's samples to others of it."""
    n = min(len(z), len(w), len(again))
    z, w, again = (v[:n].flatten(1).float() for v in (z, w, again))

    def both(a: Tensor, b: Tensor) -> dict[str, float]:
        return {"sliced_w2": sliced_wasserstein(a, b, seed=seed),
                "energy": float(energy_distance(a[:PAIRED], b[:PAIRED]))}

    return {"n": n, "latents": both(z, w), "floor": both(again, w)}

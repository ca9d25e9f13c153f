"""Statistics of a reference set as a file: ours, pytorch-fid's, and ADM's reference batches. They travel with the name
of the feature space, because means of other features are numbers of the same kind and mean nothing here."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.measure.frechet import Moments, frechet_distance
from stillroom.settings import Refusal
from stillroom.settings.files import file_written_atomically

FORMAT = 1
INCEPTION = "inception-2015-12-05"
INCEPTION_DIM = 2048
BEYOND = 1.5            # a pixel of pictures that were meant to be in [-1, 1], at most


@dataclass(frozen=True)
class Statistics:
    features: str
    """Names the feature space. Those of two names are never compared."""
    n: int | None
    """How many the statistics are of; foreign files do not say."""
    mean: Tensor
    cov: Tensor
    how: Mapping[str, str] = field(default_factory=dict)
    """resize, crop, labels, reference: in words."""

    def __post_init__(self):
        d, name = len(self.mean), f"statistics in {self.features}"
        if self.mean.ndim != 1 or tuple(self.cov.shape) != (d, d):
            raise Refusal(f"{name}: a mean of {list(self.mean.shape)} and a covariance of {list(self.cov.shape)}")
        if not bool(self.mean.isfinite().all() and self.cov.isfinite().all()):
            raise Refusal(f"{name}: hold NaN or infinity")
        if not torch.allclose(self.cov, self.cov.T, rtol=1e-4, atol=1e-6 * float(self.cov.abs().max())):
            raise Refusal(f"{name}: the covariance is not symmetric")

    @classmethod
    def of(cls, x: Moments, features: str, **how: str) -> "Statistics":
        return cls(features, x.count, x.mean, x.cov, how)

    def distance(self, other: "Statistics") -> float:
        if self.features != other.features:
            raise Refusal(f"statistics in {self.features} and in {other.features} cannot be compared")
        if len(self.mean) != len(other.mean):
            raise Refusal(f"statistics in {self.features}: of {len(self.mean)} features and of {len(other.mean)}")
        return frechet_distance(self.mean, self.cov, other.mean, other.cov)

    def save(self, file: Path) -> None:
        about = {"stillroom": FORMAT, "features": self.features, "n": self.n, "how": dict(self.how)}
        with file_written_atomically(file) as new, new.open("wb") as out:
            np.savez(out, about=np.array(json.dumps(about)), mu=self.mean.double().numpy(),
                     sigma=self.cov.double().numpy())


def read_statistics(file: Path) -> Statistics:
    """Ours; or those of Inception features, as pytorch-fid (mu, sigma) and ADM (beside mu_s, sigma_s, which are not
    looked at) write them."""
    with opened(file) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            raise Refusal(f"{file}: holds {', '.join(arrays.files) or 'nothing'}; statistics are mu and sigma")
        mean, cov = (numbers(arrays, k, file) for k in ("mu", "sigma"))
        about = read_about(arrays, file) if "about" in arrays.files else None
    try:
        if about is not None:
            return Statistics(str(about["features"]), about["n"], mean, cov, dict(about["how"]))
        if mean.shape != (INCEPTION_DIM,):
            raise Refusal(f"a mean of shape {list(mean.shape)}: not of Inception's last layer ({INCEPTION_DIM}), as "
                          "files of pytorch-fid and ADM are")
        return Statistics(INCEPTION, None, mean, cov, {"reference": "the file does not say"})
    except Refusal as refusal:
        raise Refusal(f"{file}: {refusal}") from None


def holds_moments(file: Path) -> bool:
    """Or pictures alone, of which statistics are still to be made."""
    with opened(file) as arrays:
        return bool({"mu", "sigma"} & set(arrays.files)) or not {"x", "arr_0"} & set(arrays.files)


def read_about(arrays: Any, file: Path) -> dict[str, Any]:
    try:
        about = json.loads(str(array(arrays, "about", file)))
        if about["stillroom"] != FORMAT:
            raise Refusal(f"{file}: statistics of format {about['stillroom']}; this stillroom reads format {FORMAT}")
        if not isinstance(about["how"], dict) or not isinstance(about["n"], int | None):
            raise TypeError("n or how")
        return {k: about[k] for k in ("features", "n", "how")}
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{file}: not statistics that this stillroom understands: {error!r}") from None


def opened(file: Path) -> Any:
    """A .npz whose arrays are read when they are asked for, and nothing in it is run."""
    try:
        found = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise Refusal(f"{file}: no such file") from None
    except Exception as error:      # of a damaged file numpy lets through what its tokenizer and zlib raise
        raise Refusal(f"{file}: not a readable .npz file ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise Refusal(f"{file}: a single array; give a .npz file of named ones")
    return found


def array(arrays: Any, name: str, file: Path) -> np.ndarray:
    try:
        return arrays[name]
    except Exception as error:
        raise Refusal(f"{file}: {name!r} is not readable ({' '.join(str(error).split())[:80]})") from None


def numbers(arrays: Any, name: str, file: Path) -> Tensor:
    x = array(arrays, name, file)
    if x.dtype.kind not in "fiu":
        raise Refusal(f"{file}: {name!r} is {x.dtype}, not numbers")
    return torch.from_numpy(x.astype(np.float64))


@dataclass(frozen=True)
class Samples:
    """The samples of a .npz file: ours (x and y), or a batch of ADM's (arr_0: uint8 [N, H, W, C])."""

    file: Path
    x: np.ndarray
    y: Tensor | None
    card: Mapping[str, Any] | None
    """What stillroom wrote of how they were drawn."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.x.shape[3], *self.x.shape[1:3]) if self.x.dtype == np.uint8 else self.x.shape[1:]

    @property
    def are_pictures(self) -> bool:
        latents = self.card is not None and self.card.get("encoding") is not None
        return len(self.shape) == 3 and self.shape[0] in (1, 3) and not latents

    @property
    def notes(self) -> tuple[str, ...]:
        foreign = self.card is None and self.are_pictures and self.x.dtype != np.uint8
        return () if not foreign or self.x.min() < 0 else (
            f"{self.file}: no pixel is below 0: pictures are meant to be in [-1, 1], and these may be in [0, 1]",)

    def batches(self, size: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        """As float32 [B, ...]; pictures in [-1, 1]."""
        for some in (torch.arange(len(self.x)) if rows is None else rows).split(size):
            x = torch.from_numpy(self.x[some.numpy()].astype(np.float32))
            yield x.permute(0, 3, 1, 2) / 127.5 - 1 if self.x.dtype == np.uint8 else x


def read_samples(file: Path) -> Samples:
    with opened(file) as arrays:
        name = next((k for k in ("x", "arr_0") if k in arrays.files), None)
        if name is None:
            raise Refusal(f"{file}: holds {', '.join(arrays.files) or 'nothing'}; samples are x, or arr_0")
        x, y = array(arrays, name, file), numbers(arrays, "y", file) if "y" in arrays.files else None
        try:
            card = dict(json.loads(str(array(arrays, "card", file)))) if "card" in arrays.files else None
        except (ValueError, TypeError) as error:
            raise Refusal(f"{file}: 'card' is not a record in JSON ({error})") from None
    floats, bytes8 = x.dtype.kind == "f" and x.ndim > 1, x.dtype == np.uint8 and x.ndim == 4
    if not x.size or not (floats or bytes8):
        raise Refusal(f"{file}: {name!r} is {x.dtype} {list(x.shape)}; samples are floats, pictures in [-1, 1], or "
                      "uint8 [N, H, W, C]")
    if bytes8 and x.shape[3] not in (1, 3):
        how = "channels come last" if x.shape[1] in (1, 3) else "leave out what is no colour, such as alpha"
        raise Refusal(f"{file}: {name!r} is uint8 {list(x.shape)}; pictures of bytes are [N, H, W, 1 or 3]: {how}")
    if y is not None and y.shape != (len(x),):
        raise Refusal(f"{file}: {len(x)} samples and labels of shape {list(y.shape)}")
    samples = Samples(file, x, None if y is None else labels_in(file, y), card)
    require_signed(samples)
    return samples


def labels_in(file: Path, y: Tensor) -> Tensor | None:
    """-1 throughout says that there are none."""
    if bool((y == -1).all()):
        return None
    labels = y.long()
    if bool((labels != y).any() | (labels < 0).any()):
        raise Refusal(f"{file}: labels y are whole numbers from 0 on, or all -1 where there are none; these go from "
                      f"{float(y.min()):g} to {float(y.max()):g}")
    return labels


def require_signed(samples: Samples) -> None:
    """What stillroom wrote is in its range, though samples may leave that; other programs write other ranges."""
    if samples.card is not None or not samples.are_pictures or samples.x.dtype == np.uint8:
        return
    low, high = float(samples.x.min()), float(samples.x.max())
    if max(-low, high) > BEYOND:
        raise Refusal(f"{samples.file}: its pixels go from {low:g} to {high:g}, and pictures are floats in [-1, 1] or "
                      "uint8: bring them into that range")

"""References: the laws that an encoder's latents can be brought to, each as a flow, which answers for its own score.

    gaussian | gmm:K[:STD] | noised:LEVEL[:RUN] | samples:FILE | RUN

All but the two with a RUN are mixtures in closed form: no network, nothing to train, exact samples. A reference without
classes is one law for all labels. What lies on the disk is opened by the caller: `run` answers the flow of a run.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillroom.data.tensors import check_labels
from stillroom.flows.closed import Mixture, Shaped
from stillroom.flows.denoiser import Denoises
from stillroom.flows.flow import Flow, noise_of
from stillroom.flows.samplers import Callback, _silent, latest
from stillroom.measure.reference import array, numbers, opened
from stillroom.nets.build import buildable
from stillroom.nets.weights import read_weights
from stillroom.paths import Linear
from stillroom.settings import Refusal, seed_of

FORMS = {
    "gaussian": "gaussian",
    "gmm": "gmm:K[:STD] with K of 2 or more and STD between 0 and 1: gmm:16, gmm:16:0.5",
    "noised": "noised:LEVEL[:RUN] with LEVEL between 0 and 1: noised:0.3, noised:0.3:runs/flow",
    "samples": "samples:FILE with a .npz, .npy or .safetensors file",
}
STD = 0.5
"""Of a mixture's components, where none is given; the whole has 1."""
MOST = 5000
"""Components that samples become at most: a mixture's cost grows with them."""

Latents = tuple[Tensor, Tensor | None]
"""[N, *shape], and labels [N]."""


class Spec(NamedTuple):
    kind: Literal["gaussian", "gmm", "noised", "samples", "run"]
    count: int = 0      # K
    value: float = 0.0  # STD, LEVEL
    file: str = ""      # FILE, RUN; of "noised" without a RUN there is none


_NUMBER = r"(\d+\.?\d*|\.\d+)"


def parse_reference(text: str) -> Spec:
    word, colon, rest = text.partition(":")
    if text == "gaussian":
        return Spec("gaussian")
    if word == "gmm" and (found := re.fullmatch(rf"(\d+)(?::{_NUMBER})?", rest)):
        count, std = int(found[1]), float(found[2] or STD)
        if count >= 2 and 0 < std < 1:
            return Spec("gmm", count, std)
    if word == "noised" and (found := re.fullmatch(rf"{_NUMBER}(?::(.+))?", rest)) and 0 < float(found[1]) < 1:
        return Spec("noised", 0, float(found[1]), found[2] or "")
    if word == "samples" and rest:
        return Spec("samples", file=rest)
    if word in FORMS:
        raise Refusal(f"reference {text!r}: write {FORMS[word]}")
    close = difflib.get_close_matches(word, FORMS, n=1)
    if not text or ((close or colon) and "/" not in word and not Path(text).exists()):
        meant = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(FORMS)}, or a flow run"
        raise Refusal(f"no reference is called {text!r}; {meant}")
    return Spec("run", file=text)


def open_reference(spec: Spec | str, shape: tuple[int, ...], classes: int | None = None,
                   latents: Callable[[], Latents] | None = None, run: Callable[[str], Flow] | None = None,
                   seed: int = 0, note: Callable[[str], None] = lambda text: None) -> Flow:
    """The flow of a reference for latents of this shape, which is refused here if it does not fit them.

    classes: None for one law over all of them. `latents` are asked of the data only for `noised:LEVEL`. `note` is told
    what a person should know of how it was made.
    """
    name = f"reference {spec if isinstance(spec, str) else spec.file or spec.kind}"
    spec = parse_reference(spec) if isinstance(spec, str) else spec
    match spec.kind:
        case "gaussian":
            flow = gaussian(shape)
        case "gmm":
            flow = mixture(shape, spec.count, spec.value, seed, classes)
        case "samples":
            x, y = read_reference_samples(Path(spec.file), shape)
            if classes and y is None:
                note(f"{name}: the file has no labels y, so that this is one law for all classes")
            x, y = some(x, y if classes else None, seed, name, note)
            flow = samples(x, y, classes)
        case "noised" if not spec.file:
            if latents is None:
                raise Refusal(f"{name}: noises the latents of data, and there are none here; give noised:LEVEL:RUN")
            x, y = latents()
            x, y = some(x, y if classes else None, seed, name, note)
            flow = noised(x, spec.value, y, classes)
        case _:
            if run is None:
                raise Refusal(f"{name}: no runs can be opened here; give a closed form: {', '.join(FORMS)}")
            flow = run(spec.file)
            if spec.kind == "noised":
                flow = Flow(Noised(flow.denoiser, spec.value), flow.shape, flow.sampler, flow.steps, flow.shift)
    require_fit(flow, shape, classes, name)
    return flow


def require_fit(flow: Flow, shape: tuple[int, ...], classes: int | None, name: str) -> None:
    """A conditional reference serves latents without labels too, and one without classes all of them alike."""
    if flow.shape != tuple(shape):
        raise Refusal(f"{name}: it is a law of {list(flow.shape)}, and the latents are {list(shape)}; give a reference "
                      "of the same dimension")
    if classes is not None and flow.classes not in (None, classes):
        raise Refusal(f"{name}: it knows {flow.classes} classes, and the data has {classes}; give a reference of the "
                      "same classes, or of none")


@buildable
class ClosedFlow(Flow):
    """A mixture as a flow. Its samples are draws of it, exact and at no cost, unless they are guided or watched: those
    follow the path, as every flow's do."""

    def __init__(self, mixture: Mixture, shape: tuple[int, ...]):
        super().__init__(mixture if len(shape) == 1 else Shaped(mixture), shape)

    @property
    def mixture(self) -> Mixture:
        law = self.denoiser.denoiser if isinstance(self.denoiser, Shaped) else self.denoiser
        assert isinstance(law, Mixture)
        return law

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, y: Tensor | None = None, guidance: float = 1.0, steps: int | None = None,
               batch: int = 256, first: int = 0, callback: Callback = _silent, weak: Flow | None = None,
               interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        if guidance != 1 or callback is not _silent or (y is not None and len(y) != n):
            return super().sample(n, seed, y, guidance, steps, batch, first, callback, weak, interval)
        y = self.labels(first, n) if y is None else y
        law, out = self.mixture, []
        device = law.means.device
        for i in range(0, n, batch):
            count = min(batch, n - i)
            noise = noise_of(self.shape, first + i, count, seed).flatten(1).to(device)
            which = noise_of((), first + i, count, seed_of(seed, "component")).to(device)
            u = torch.erfc(-which.double() / math.sqrt(2)) / 2                          # uniform
            x, _ = law.place(noise, u, None if y is None else y[i : i + count].to(device))
            out.append(x.reshape(count, *self.shape).cpu())
        return torch.cat(out)


@buildable
class Noised(Denoises):
    """The data z of another denoiser at noise level s, x = (1 - s) z + s e, on the linear path.

    x_t = (1 - t) x + t e' is (1 - t)(1 - s) z with noise of deviation b, b^2 = ((1 - t) s)^2 + t^2: the other denoiser
    knows E[z | x_t] at the time of that ratio, and e is what remains, in proportion to its share of b^2.
    """

    prediction = "x0"

    def __init__(self, denoiser: Denoises, level: float):
        super().__init__()
        if not 0 < level < 1:
            raise ValueError(f"noise level {level}: between 0 and 1")
        self.denoiser, self.level, self.path, self.classes = denoiser, level, Linear(), denoiser.classes

    def forward(self, x_t, t, y=None):
        s, c = self.level, self.path.over(t, x_t)
        a, b2 = c.alpha * (1 - s), (c.alpha * s) ** 2 + c.sigma**2
        # At t = 1 nothing of z is left: the other is asked at the end of its path, or near it where that has none.
        ratio = ((1 - t) * s).square().add(t**2).sqrt() / ((1 - t) * (1 - s)).clamp(min=1e-6)   # of noise to z, [B]
        inner = self.denoiser.path.time(ratio).clamp(max=float(latest(self.denoiser)))
        z = self.denoiser.x0(x_t * self.denoiser.path.over(inner, x_t).sigma / b2.sqrt(), inner, y)
        return (1 - s) * z + s**2 * c.alpha / b2 * (x_t - a * z)


def gaussian(shape: tuple[int, ...]) -> Flow:
    """White, of mean 0 and variance 1."""
    return ClosedFlow(Mixture(torch.zeros(1, math.prod(shape)), torch.ones(1)), shape)


def mixture(shape: tuple[int, ...], k: int, std: float = STD, seed: int = 0, classes: int | None = None) -> Flow:
    """K components of deviation std, of equal weight, about means from a seed: every number of x has mean 0 and
    variance 1. Component i is of class i modulo the number of classes."""
    if classes is not None and k % classes:
        raise Refusal(f"reference gmm:{k}: {k} components cannot be shared by {classes} classes; give a multiple of "
                      f"{classes}: gmm:{-(-k // classes) * classes}")
    means = torch.randn(k, math.prod(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    variance, mean = torch.var_mean(means, 0, correction=0)
    means = (means - mean) / variance.sqrt() * math.sqrt(1 - std**2)
    labels = None if classes is None else torch.arange(k) % classes
    return ClosedFlow(Mixture(means.float(), torch.full((k,), float(std)), labels=labels), shape)


def noised(x: Tensor, level: float, y: Tensor | None = None, classes: int | None = None) -> Flow:
    """Data z [N, *shape] at a noise level, (1 - level) z + level e: N components. One law for all without labels."""
    return about((1 - level) * x.flatten(1), level, tuple(x.shape[1:]), y, classes, "reference noised")


def samples(x: Tensor, y: Tensor | None = None, classes: int | None = None) -> Flow:
    """The kernel density of samples [N, *shape], of the bandwidth that foretells each of them best from the others.
    For more than some thousand samples, or of many dimensions, a flow that was trained on them is nearer their law."""
    flat = x.flatten(1)
    return about(flat, bandwidth(flat), tuple(x.shape[1:]), y, classes, "reference samples")


def about(means: Tensor, std: float, shape: tuple[int, ...], y: Tensor | None, classes: int | None,
          name: str) -> Flow:
    """Components of one deviation about every mean [N, D]."""
    if y is not None:
        y = check_labels(y, len(means), None if classes is None else tuple(map(str, range(classes))), name)
        missing = sorted(set(range(classes or int(y.max()) + 1)) - set(y.tolist()))
        if missing:
            raise Refusal(f"{name}: no sample is of class {missing[0]}; give some of every class, or no labels")
    return ClosedFlow(Mixture(means.float(), torch.full((len(means),), float(std)), labels=y), shape)


SMOOTHEST, SHARPEST = 0.3, 0.02
"""Bandwidths looked at, in the samples' deviation: the widest adds 9 % to their variance."""


def bandwidth(x: Tensor, rows: int = 1000, tried: int = 16) -> float:
    """The leave-one-out likelihood's choice (ours, within the bounds above), of x [N, D]; looked at in so many rows."""
    x = x.double()
    deviation = float(x.var(0, correction=0).mean().sqrt())
    if not deviation > 0:
        raise Refusal("reference samples: all are equal; give samples of a law that has some width")
    widths = deviation * torch.logspace(math.log10(SHARPEST), math.log10(SMOOTHEST), tried, dtype=x.dtype)
    if len(x) == 1:
        return float(widths[-1])
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]
    at = x[chosen] - x.mean(0)
    every = x - x.mean(0)
    square = at.square().sum(1, keepdim=True) - 2 * at @ every.T + every.square().sum(1)        # [rows, N]
    square[torch.arange(len(chosen)), chosen] = math.inf
    found = [(-square / (2 * h**2)).logsumexp(1).mean() - x.shape[1] * h.log() for h in widths]
    return float(widths[int(torch.stack(found).argmax())])


def some(x: Tensor, y: Tensor | None, seed: int, name: str, note: Callable[[str], None]) -> Latents:
    """At most MOST of them, of every class."""
    if len(x) <= MOST:
        return x, y
    note(f"{name}: {MOST} of {len(x)} samples, drawn at random")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    if y is None:
        return x[order[:MOST]], None
    first = dict[int, int]()
    for i, c in zip(order.tolist(), y[order].tolist(), strict=True):
        first.setdefault(c, i)
    kept = list(dict.fromkeys([*first.values(), *order.tolist()]))[:MOST]
    order = order[torch.isin(order, torch.tensor(kept))]
    return x[order], y[order]


def read_reference_samples(file: Path, shape: tuple[int, ...]) -> Latents:
    """[N, *shape], whether each was written in that shape or as one row; labels where the file has a y.

    .npy holds one array; .npz and .safetensors hold x, or one array alone, and perhaps y.
    """
    if not file.is_file():
        raise Refusal(f"{file}: no such file of samples")
    x, y = _READERS.get(file.suffix.lower(), _unknown)(file)
    d = math.prod(shape)
    if x.ndim < 2 or len(x) == 0:
        raise Refusal(f"{file}: holds {list(x.shape)}, which is no sample; give [N, {', '.join(map(str, shape))}]")
    if tuple(x.shape[1:]) not in (tuple(shape), (d,)):
        raise Refusal(f"{file}: its samples are {list(x.shape[1:])}, and the latents {list(shape)}; give that shape, "
                      f"or rows of {d} numbers")
    finite = x.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise Refusal(f"{file}: {int((~finite).sum())} of {len(x)} samples hold NaN or infinity, the first is sample "
                      f"{int((~finite).nonzero()[0])}")
    return x.float().reshape(len(x), *shape), y


def _named(names: Collection[str], file: Path) -> str:
    others = [name for name in names if name != "y"]
    if "x" not in names and len(others) != 1:
        raise Refusal(f"{file}: holds {', '.join(sorted(names)) or 'nothing'}; samples are x, or one array alone")
    return "x" if "x" in names else others[0]


def _from_npz(file: Path) -> Latents:
    with opened(file) as arrays:
        x = array(arrays, _named(arrays.files, file), file)
        y = numbers(arrays, "y", file).long() if "y" in arrays.files else None
    return _floats(x, file), y


def _from_npy(file: Path) -> Latents:
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise Refusal(f"{file}: not a readable .npy file ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(found, np.ndarray):
        raise Refusal(f"{file}: a .npz file by another name; call it so")
    return _floats(found, file), None


def _from_safetensors(file: Path) -> Latents:
    held = read_weights(file)
    return _floats(held[_named(held, file)], file), held.get("y")


def _floats(x: Tensor | np.ndarray, file: Path) -> Tensor:
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        x = torch.from_numpy(x.astype(np.float32))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise Refusal(f"{file}: its samples are {x.dtype}; give floats, as latents are")
    return x


def _unknown(file: Path) -> Latents:
    raise Refusal(f"{file}: samples are read from .npz, .npy and .safetensors files")


_READERS: dict[str, Callable[[Path], Latents]] = {
    ".npz": _from_npz, ".npy": _from_npy, ".safetensors": _from_safetensors,
}

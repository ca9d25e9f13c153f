"""The sets that `stillroom evaluate` compares, each in batches: what a place holds or makes, and real data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.data import (
    BUILTIN,
    ImageTable,
    Latents,
    Source,
    Tensors,
    Unreadable,
    decode,
    encoding_card,
    open_source,
    signed_picture,
    unreadable,
)
from stillroom.data.mixed import mixed_name, mixture
from stillroom.data.open import is_known, parted, placed
from stillroom.data.tables import Rows
from stillroom.flows import Mixture
from stillroom.judge.asked import Evaluation, flags_given
from stillroom.judge.draws import Draws, labels_of, open_decoder, open_draws
from stillroom.measure.metrics import halves
from stillroom.measure.reference import read_samples
from stillroom.settings import Images, Refusal, expanded
from stillroom.train.teacher import is_mixture, is_ours, open_teacher

DRAWN = 2000            # of a run, where no number is given
Batches = Iterator[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Side:
    name: str
    count: int
    shape: tuple[int, ...]
    batches: Callable[[Tensor | None], Batches]
    """(x [B, *shape], labels [B] or None), in order. Samples that are drawn take the labels given, from the start again
    where there are fewer."""
    encoding: Mapping[str, Any] | None = None
    """Of latents. None for pictures, points, and samples that do not say."""
    how: str = ""
    draws: Draws | None = None
    classes: int | None = None
    """Of real data."""
    notes: tuple[str, ...] = ()
    grey: bool = False
    """Pictures of one channel, in three equal ones."""
    source: Source | None = None
    """Of real data: what they are read from."""

    @property
    def kind(self) -> str:
        if self.encoding is not None:
            return "latents"
        if len(self.shape) != 3:
            return "points"
        return "pixels" if self.shape[0] in (1, 3) else "latents"


# ---- samples ----


def open_samples(place: Path, settings: Evaluation) -> Side:
    if is_ours(place) or is_ours(place / "product"):
        return drawn(place, settings)
    if told := flags_given(settings, "steps", "guidance", "weak", "interval", "seed", "teacher"):
        raise Refusal(f"{place}: its samples are there already: leave out {told}")
    if settings.labels == "data":
        raise Refusal(f"{place}: its samples have the labels that they have: leave out --labels")
    if place.suffix == ".npz":
        return from_arrays(place, settings)
    if place.is_dir():
        return from_pictures(place, settings)
    raise Refusal(f"{place}: no run, no product, and no samples; give a run, a folder of pictures or a .npz file")


def drawn(place: Path, settings: Evaluation) -> Side:
    draws = open_draws(place, replace(settings, codec=""))      # pictures are made of latents later, on both sides
    words = {"steps": None, "guidance": 1, "weak": "", "interval": (0, 1)}
    told = [f"{k} {str(draws.card[k])[:12]}" for k, usual in words.items() if draws.card.get(k, usual) != usual]
    return side_of_draws(str(place), draws, settings.n or DRAWN, ", ".join([f"seed {settings.seed}", *told]))


def side_of_draws(name: str, draws: Draws, count: int, how: str = "") -> Side:
    count = count if draws.limit is None else min(count, draws.limit)

    def batches(law: Tensor | None) -> Batches:
        for first, x in draws.chunks(0, count, law):
            yield x, labels_of(draws, law, first, len(x))

    return Side(name, count, draws.shape, batches, draws.encoding, how, draws)


def from_arrays(file: Path, settings: Evaluation) -> Side:
    samples = read_samples(file)
    rows = some_of(len(samples.x), settings.n)
    labels = () if samples.y is None else samples.y[rows].split(settings.batch)

    def batches(law: Tensor | None) -> Batches:
        for i, x in enumerate(samples.batches(settings.batch, rows)):
            yield x, labels[i] if labels else None

    encoding = (samples.card or {}).get("encoding")
    return Side(str(file), len(rows), samples.shape, batches, encoding, "as they are in the file", notes=samples.notes)


def some_of(count: int, n: int | None) -> Tensor:
    """Numbers of all, or of n drawn once and for all: the first ones of a sorted file would be of a few classes."""
    if n is None or n >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:n].sort().values


def from_pictures(folder: Path, settings: Evaluation) -> Side:
    """At their own size, which must be that of the data: resizing them would be part of what is measured."""
    rows = placed(str(folder))
    if not isinstance(rows, Rows):
        raise Refusal(f"{folder}: no folder of pictures; latents and tars are data, not samples")
    chosen = some_of(rows.count, settings.n)

    def picture(i: int) -> Tensor:
        try:
            return signed_picture(decode(rows.read(i), rows.title(i)))
        except Unreadable as error:
            raise Refusal(str(error)) from None

    shape = tuple(picture(0).shape)

    def batches(law: Tensor | None) -> Batches:
        for some in chosen.split(settings.batch):
            x = [picture(i) for i in some.tolist()]
            for i, each in zip(some.tolist(), x, strict=True):
                if tuple(each.shape) != shape:
                    raise Refusal(f"{rows.title(i)}: is {list(each.shape)}, and {rows.title(0)} {list(shape)}")
            yield torch.stack(x), None

    return Side(str(folder), len(chosen), shape, batches, None, "as they are in the folder")


# ---- real data ----


def open_real(settings: Evaluation, size: int, want: int) -> tuple[Side, Side]:
    """The reference, and fresh real data, `want` at most, for the floor."""
    source = source_of(settings, settings.data, size)
    heldout = settings.heldout or test_split_of(settings.data)
    if heldout is None:
        rows, aside = halves(len(source), want)
        return side_of(source, rows[: settings.reference], settings), side_of(source, aside, settings, "set aside")
    require_fresh(heldout, settings.data)
    other = source_of(settings, heldout, size)
    if tuple(other.shape) != tuple(source.shape) or encoding_card(other) != encoding_card(source):
        raise Refusal(f"{other.name}: its items are not of the kind of those of {source.name}")
    everything, fresh = (torch.randperm(len(s), generator=torch.Generator().manual_seed(0)) for s in (source, other))
    return side_of(source, everything[: settings.reference], settings), side_of(other, fresh[:want], settings)


def places_of(name: str) -> set[tuple[str, str]]:
    """(place, split) of a source, or of each that a mixture is of, however they were written."""
    each = [parted(part) for _, part in mixture(name, is_known)]
    return {(str(expanded(place).resolve()) if expanded(place).exists() else place, split or "train")
            for place, split in each}


def require_fresh(heldout: str, data: str) -> None:
    if places_of(heldout) & places_of(data):
        raise Refusal(f"--heldout {heldout}: is what --data names, or has it in it; give other data of that kind, or "
                      "leave it out")


def source_of(settings: Evaluation, spec: str, size: int) -> Source:
    if is_mixture(spec):
        return mixture_of(spec, settings)
    source = open_source(Images(data=spec, size=max(1, size), bad_share=settings.bad_share))
    if not isinstance(source, Source):
        raise Refusal(f"{source.name}: a stream cannot be read by number; give a folder or a parquet file")
    if len(source) < 2:
        raise Refusal(f"{source.name}: holds {len(source)} item; distances need more")
    return source


def mixture_of(spec: str, settings: Evaluation) -> Tensors:
    mixture = open_teacher(spec).denoiser
    assert isinstance(mixture, Mixture)
    x, y = mixture.draw(settings.reference + (settings.n or DRAWN), torch.Generator().manual_seed(1))
    return Tensors(x, y, [str(c) for c in range(len(mixture.means))], spec)


def test_split_of(spec: str) -> str | None:
    """The name of the split beside the one that is given; of several sources, of their splits in the same shares.
    Several that lack one are refused: items come round in a mixture, so that a part of it that is set aside holds
    copies of the rest."""
    parts = mixture(spec, is_known)
    if len(parts) == 1:
        return split_beside(parts[0][1])
    found = list[tuple[float, str]]()
    for share, name in parts:
        if (other := split_beside(name)) is None:
            raise Refusal(f"data {spec!r}: {name} has no test split, and of a mixture no part is set aside: give fresh "
                          "data: --heldout DATA")
        found.append((share, other))
    return mixed_name(found)


def split_beside(spec: str) -> str | None:
    """Of one source."""
    name, split = parted(spec)
    if split not in (None, "train"):
        return None
    if name in BUILTIN:
        return f"{name}:test"
    for other in ("test", "val", "validation"):
        try:
            placed(f"{name}:{other}")
        except Refusal:                     # no such split, or a single file, or a closed form
            continue
        return f"{name}:{other}"
    return None


def side_of(source: Source, rows: Tensor, settings: Evaluation, part: str = "") -> Side:
    def batches(law: Tensor | None) -> Batches:
        for some in rows.split(settings.batch):
            yield source.fetch(some.tolist(), 0)

    encoding = encoding_card(source).get("encoding")
    how = ", ".join(filter(None, (part, crop_of(source))))
    classes = None if source.classes is None else len(source.classes)
    return Side(source.name, len(rows), tuple(source.shape), batches, encoding, how, classes=classes, source=source)


def replaced(*sources: object) -> list[str]:
    """What is said of pictures that could not be read, once those of sources or their parts were: of two parts of one
    source once."""
    return list(dict.fromkeys(filter(None, map(unreadable, sources))))


def crop_of(source: Source) -> str:
    """How pictures became squares."""
    if isinstance(source, ImageTable):
        return f"shorter side to {source.shape[-1]} pixels (halved by boxes, then bicubic), centre crop"
    if isinstance(source, Latents):
        return f"encoded from {source.encoding.crop}"
    return f"{source.shape[-1]} pixels a side" if len(source.shape) == 3 else ""


# ---- both alike ----


def pictures_of(side: Side, spec: str, device: torch.device) -> Side:
    """The pictures of latents; pictures as they are."""
    if side.kind != "latents":
        return side
    codec, name = open_decoder(spec, side.encoding, side.shape)
    codec = codec.to(device)

    def batches(law: Tensor | None) -> Batches:
        for z, y in side.batches(law):
            yield codec.pictures(z), y

    shape = (3, *(n * codec.space.factor for n in side.shape[1:]))
    how = ", ".join(filter(None, (side.how, f"decoded by {spec} ({name[:12]})")))
    return replace(side, shape=shape, batches=batches, encoding=None, how=how)


def in_channels(side: Side, channels: int) -> Side:
    """Pictures in one channel or three."""
    if side.kind != "pixels" or side.shape[0] == channels:
        return side

    def batches(law: Tensor | None) -> Batches:
        for x, y in side.batches(law):
            yield x.expand(-1, 3, -1, -1) if channels == 3 else x[:, :1], y

    return replace(side, shape=(channels, *side.shape[1:]), batches=batches, grey=channels == 3)


def in_like_channels(samples: Side, real: Side, fresh: Side, stored: bool) -> tuple[Side, Side, Side]:
    """Grey data beside pictures in three channels: all in three, unless these are `stored` and grey throughout, as
    what `sample` draws in grey comes back from a folder."""
    if (samples.kind, samples.shape[0], real.kind, real.shape[0]) != ("pixels", 3, "pixels", 1):
        return samples, real, fresh
    if stored and all(bool((x == x[:, :1]).all()) for x, _ in samples.batches(None)):
        return in_channels(samples, 1), real, fresh
    return samples, in_channels(real, 3), in_channels(fresh, 3)


def require_comparable(samples: Side, real: Side, has_codec: bool) -> None:
    name, other = f"{samples.name} makes", real.name
    if samples.kind != real.kind:
        hint = "; give the --codec that decodes its latents" if samples.kind == "latents" and not has_codec else ""
        raise Refusal(f"{name} {samples.kind}, and {other} holds {real.kind}{hint}")
    if samples.shape != real.shape:
        raise Refusal(f"{name} {list(samples.shape)}, and {other} holds {list(real.shape)}")
    if samples.encoding is not None and real.encoding is not None and samples.encoding != real.encoding:
        differing = [k for k in ("codec", "space", "crop") if samples.encoding.get(k) != real.encoding.get(k)]
        raise Refusal(f"{name} other latents than those of {other}: another {', another '.join(differing)}")

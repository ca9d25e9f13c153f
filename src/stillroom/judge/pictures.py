"""The pictures on which `stillroom compare` compares codecs, and the feature space in which it holds samples against
them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillroom.data import Batch, Some, Source, encoding_card, open_source
from stillroom.judge.asked import OfCodecs
from stillroom.judge.evaluation import Space, learned_space
from stillroom.judge.measures import rgb
from stillroom.judge.places import record_at
from stillroom.judge.sides import Side, crop_of, in_channels, places_of, replaced, require_fresh, test_split_of
from stillroom.measure.inception import FidInception
from stillroom.measure.metrics import halves
from stillroom.measure.perceptual import SMALL, RandomFeatures, pooled
from stillroom.measure.reference import INCEPTION
from stillroom.settings import Images, Refusal
from stillroom.settings.files import file_written_atomically
from stillroom.train.checkpoint import load_tensors
from stillroom.train.teacher import is_ours

FEWEST = 32             # pictures on either side
SHOWN = 16              # pictures in a row of the page
AT_ONCE = 64


class Part(Some):
    """Some of a source's pictures, and `how` they came to be these."""

    def __init__(self, source: Source, rows: Tensor, how: str = ""):
        super().__init__(source, rows)
        self.how = how

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for first in range(start, len(self), AT_ONCE):
            yield self.fetch(range(first, min(first + AT_ONCE, len(self))), 0)

    def first(self, count: int) -> Tensor:
        return self.fetch(range(min(count, len(self))), 0).x

    @cached_property
    def digest(self) -> str:
        """Which pictures these are: their source and classes, every pixel and every label. It costs reading all."""
        told = json.dumps([self.name, len(self), list(self.shape), self.classes])
        digest = hashlib.sha256(told.encode())
        for x, y in self.batches():
            digest.update(x.numpy().tobytes() + (b"" if y is None else y.numpy().tobytes()))
        return digest.hexdigest()[:16]


def told(part: Part) -> str:
    return f"{part.name}: {len(part):,}" + "".join(f", {how}" for how in (part.how, crop_of(part.source)) if how)


# ---- pictures ----

def pictures_of(settings: OfCodecs) -> tuple[Part, Part, str]:
    """What is learned from, what is judged on, and how they became squares."""
    source = opened_source(settings, settings.data, settings.size)
    size = source.shape[-1]
    heldout = settings.heldout or test_split_of(settings.data)
    if heldout is None:
        rows, aside = halves(len(source), settings.n, settings.seed)
        held = Part(source, aside, "set aside")
    else:
        require_fresh(heldout, settings.data)
        other = opened_source(settings, heldout, size)
        if (other.shape, other.classes) != (source.shape, source.classes):
            raise Refusal(f"{other.name}: its pictures or classes are not those of {source.name}")
        rows, held = shuffled(source, settings.seed), Part(other, shuffled(other, settings.seed)[: settings.n])
    learned = Part(source, rows[: settings.pictures])
    for part in (learned, held):
        if len(part) < FEWEST:
            raise Refusal(f"{part.name}: {len(part)} pictures are too few to compare codecs on; {FEWEST} to learn from "
                          f"and {FEWEST} held-out ones are needed")
    return learned, held, f"{settings.crop} {size}"


def learned_from(place: str, data: str) -> bool:
    """Whether the run of a codec learned from data that this is, or is a part of: by the run's own record."""
    inputs = record_at(Path(place)).get("inputs", {}) if is_ours(Path(place)) else {}
    return any(places_of(told["name"]) & places_of(data) for told in inputs.values())


def shuffled(source: Source, seed: int) -> Tensor:
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))


def opened_source(settings: OfCodecs, spec: str, size: int | None) -> Source:
    s = settings
    source = open_source(Images(data=spec, size=size, crop=s.crop, shrink=s.shrink, bad_share=s.bad_share))
    if not isinstance(source, Source):
        raise Refusal(f"{source.name}: a stream cannot be read by number; give a folder or a parquet file")
    if encoding_card(source) or len(source.shape) != 3 or source.shape[0] not in (1, 3):
        raise Refusal(f"{source.name}: holds {list(source.shape)}, and codecs are compared on pictures")
    return source


# ---- the feature space ----

def space_of(settings: OfCodecs, learned: Part, device: torch.device) -> Space:
    """The one in which all samples are held against real pictures: of RGB in [-1, 1]."""
    if settings.features and settings.inception is not None:
        raise Refusal("--features and --inception: distances are in one feature space; give one of them")
    if settings.inception is not None:
        net = FidInception.from_file(settings.inception).to(device)
        return Space(INCEPTION, lambda x: net(x.to(device)).cpu(), "FID")
    if settings.features:
        shape = tuple(learned.shape)
        side = in_channels(Side(learned.name, len(learned), shape, lambda law: learned.batches()), 3)
        return learned_space(settings.features, side, side, device)
    random = pooled(RandomFeatures(widths=SMALL).to(device))
    return Space("random features", lambda x: random(x.to(device)).float().cpu(), "of pixels, an untrained network's")


@torch.no_grad()
def real_features(out: Path, learned: Part, held: Part, space: Space,
                  tell: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Of both parts, kept in a file that is named after them and the space."""
    key = hashlib.sha256(json.dumps([learned.digest, held.digest, space.name]).encode()).hexdigest()[:16]
    for line in replaced(learned, held):
        tell(line)
    file = out / f"real-{key}.safetensors"
    if not file.is_file():
        tell(f"real pictures in {space.name}")
        parts = {name: torch.cat([space.of(rgb(x)) for x, _ in part.batches()]).contiguous()
                 for name, part in (("learned", learned), ("held", held))}
        with file_written_atomically(file) as new:
            save_file(parts, new)
    found = load_tensors(file)
    return found["learned"], found["held"]

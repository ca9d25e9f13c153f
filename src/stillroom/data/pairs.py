"""Pictures with a teacher's answers to them: computed once, kept on disk, read beside the picture ever after."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stillroom.data.batch import Batch, Source, Stream, named
from stillroom.data.latents import Encoding, Latents, LatentSpace, write_latents
from stillroom.settings import Refusal

CHUNK = 16
SHARDS = 64     # of answers; an interrupted writer loses what one holds


class Pairs:
    """`count` fixed crops of a source as x, and what a teacher answered to each as y.

    Crop i is item i % n of the source in its epoch i // n, so that pictures are cropped more than once.
    """

    classes = None

    def __init__(self, source: Source, answers: Latents, count: int):
        self.source, self.answers, self.shape = source, answers, source.shape
        self.name, self._count = f"{source.name} with {answers.folder}", count

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        return Batch(crops(self.source, indices), self.answers.fetch(indices, 0).x)


def crops(source: Source, indices: Sequence[int]) -> Tensor:
    n = len(source)
    by_epoch: dict[int, list[int]] = {}
    for place, i in enumerate(indices):
        by_epoch.setdefault(i // n, []).append(place)
    x = torch.empty(len(indices), *source.shape)
    for epoch, places in by_epoch.items():
        x[places] = source.fetch([indices[p] % n for p in places], epoch).x
    return x


def write_pairs(folder: Path, source: Source | Stream, count: int, teacher: Callable[[Tensor], Tensor], name: str,
                crop: str, note: Callable[[str], None] = lambda _text: None) -> Pairs:
    """Asks the teacher, named by its hash, about every crop that the folder does not hold yet."""
    if isinstance(source, Stream):
        raise Refusal(f"{source.name}: a stream has no numbered crops to keep answers for; leave out cache, or use a "
                      "folder or parquet")
    some = crops(source, range(0, count, -(-count // 8)))       # from all epochs: they tell data of one name apart
    channels = teacher(some[:1]).shape[1]
    space = LatentSpace(channels, 1, (0.0,) * channels, (1.0,) * channels)      # answers as they are
    digest = hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16]
    origin = f"{count} crops of {named(source)}, {digest}"

    def batches(start: int) -> Iterator[Batch]:
        for i in range(start, count, CHUNK):
            if (i - start) // CHUNK % 64 == 0:
                note(f"{folder}: the teacher has answered {i} of {count} crops")
            yield Batch(teacher(crops(source, range(i, min(i + CHUNK, count)))).float().cpu())

    encoding = Encoding(space, name, crop)
    write_latents(Path(folder), batches, encoding, origin=origin, per_shard=max(CHUNK, count // SHARDS))
    return Pairs(source, Latents(Path(folder), encoding), count)

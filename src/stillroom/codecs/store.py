"""A whole data set as latents on disk, in the codec's own numbers, with what they were made by."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from stillroom.codecs.codec import Codec, fingerprint, require_multiple
from stillroom.data import Batch, Encoding, Source, Stream, named, unreadable, write_latents
from stillroom.settings import Images, Refusal

LEAST, SHARDS = 64, 256     # pictures a file at least, and files at most, about: what is killed loses one file's


def nobody(_said: object) -> None:
    """Hears nothing."""


def write_store(folder: Path, codec: Codec, source: Source | Stream, images: Images, batch: int = 16,
                told: Callable[[int], None] = nobody, note: Callable[[str], None] = nobody) -> Path:
    """Interrupted, it goes on after the last whole file; finished, it is left as it is. `told` hears how many pictures
    are encoded, `note` that it begins, and what could not be read."""
    if not isinstance(source, Source):
        raise Refusal(f"{source.name}: a stream is not cached; give a folder or a parquet file")
    if images.crop != "centre" or images.flip:
        raise Refusal("a store holds each picture once: leave out --crop and --flip")
    if getattr(source, "encoding", None) is not None:
        raise Refusal(f"{source.name}: holds latents already; leave out --codec")
    size = source.shape[-1]
    require_multiple(f"size {size} is", codec.space.factor, size)
    encoding = Encoding(codec.space, fingerprint(codec), f"centre {size}")
    return write_latents(folder, lambda start: _encoded(codec, source, start, batch, told, note), encoding,
                         source.classes, named(source), max(LEAST, len(source) // SHARDS))


def _encoded(codec: Codec, source: Source, start: int, batch: int, told: Callable[[int], None],
             note: Callable[[str], None]) -> Iterator[Batch]:
    note(f"encoding {len(source) - start} pictures of {source.name}")
    for first in range(start, len(source), batch):
        last = min(first + batch, len(source))
        x, y = source.fetch(range(first, last), 0)
        with torch.inference_mode():
            z = codec.space.denormalise(codec.encode(x.to(codec.device))).cpu()
        told(last)
        yield Batch(z, y)
    if replaced := unreadable(source):
        note(replaced)

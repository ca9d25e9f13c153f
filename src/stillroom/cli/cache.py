"""`stillroom cache --codec CODEC`: a whole data set to a store of latents. Killed, the same command goes on."""

import sys
from dataclasses import dataclass
from pathlib import Path

from stillroom.cli.flags import parse
from stillroom.settings import Count, Images, Refusal, Where

ABOUT = "Encodes a data set once, so that flows can be trained on its latents: --data FOLDER of this command's --out."

LEAST, SHARDS = 64, 256     # pictures a file at least, and files at most, about: a killed command loses one file's


@dataclass(frozen=True, kw_only=True)
class Settings(Images):
    codec: Where
    """`bundled`, a run or product, a TAESD weight file, a diffusers folder, or a hub id."""
    out: Path
    """The store's folder. An unfinished one is gone on with."""
    batch: Count = 16
    device: str = "auto"


def run(word: str, arguments: list[str]) -> int:
    settings = parse(Settings, arguments, "stillroom cache", ABOUT)
    if settings.crop != "centre" or settings.flip:
        raise Refusal("a store holds each picture once: leave out --crop and --flip")
    from stillroom.codecs import fingerprint
    from stillroom.data import Encoding, Source, open_source, write_latents
    from stillroom.train.teacher import open_codec
    from stillroom.train.world import pick_device

    codec, source = open_codec(settings.codec).to(pick_device(settings.device)), open_source(settings)
    if not isinstance(source, Source):
        raise Refusal(f"{source.name}: a stream is not cached; give a folder or a parquet file")
    if settings.size % codec.space.factor:
        raise Refusal(f"size {settings.size} is no multiple of {codec.space.factor}, the pixels that a latent spans")
    encoding = Encoding(codec.space, fingerprint(codec), f"centre {settings.size}")
    folder = write_latents(settings.out, lambda start: encoded(codec, source, start, settings.batch), encoding,
                           source.classes, origin=f"{source.name}, {len(source)} pictures",
                           per_shard=max(LEAST, len(source) // SHARDS))
    print(f"{folder}  {len(source)} pictures")
    return 0


def encoded(codec, source, start: int, batch: int):
    import torch

    from stillroom.data import Batch

    for first in range(start, len(source), batch):
        x, y = source.fetch(range(first, min(first + batch, len(source))), 0)
        with torch.inference_mode():
            z = codec.space.denormalise(codec.encode(x.to(codec.device))).cpu()
        if sys.stderr.isatty():
            print(f"\r{min(first + batch, len(source))} of {len(source)}", end="", file=sys.stderr)
        yield Batch(z, y)
    if sys.stderr.isatty():
        print(file=sys.stderr)

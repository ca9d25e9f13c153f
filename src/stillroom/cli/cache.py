"""`stillroom cache --codec CODEC`: a whole data set to a store of latents. Killed, the same command goes on."""

import sys
from dataclasses import dataclass
from pathlib import Path

from stillroom.cli.flags import parse
from stillroom.settings import Count, Images, Where

ABOUT = "Encodes a data set once, so that flows can be trained on its latents: --data FOLDER of this command's --out."

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
    from stillroom.codecs.store import write_store
    from stillroom.data import open_source
    from stillroom.train.teacher import open_codec
    from stillroom.train.world import pick_device

    source = open_source(settings)

    def told(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {len(source)}", end="" if done < len(source) else "\n", file=sys.stderr)  # pyright: ignore

    codec = open_codec(settings.codec).to(pick_device(settings.device))
    folder = write_store(settings.out, codec, source, settings, settings.batch, told)
    print(f"{folder}  {len(source)} pictures")  # pyright: ignore[reportArgumentType]
    return 0

"""`stillroom cache --codec CODEC`: a whole data set to a store of latents. Killed, the same command goes on.
`stillroom cache --prompts FILE`: the text embeddings of prompts, for a text-to-image teacher."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom.cli.flags import given_flags, parse
from stillroom.settings import Count, Images, Natural, NotNegative, Where

ABOUT = """Encodes a data set once, so that flows can be trained on its latents: --data FOLDER of this command's --out.

With --prompts FILE --teacher FOLDER --size PIXELS it encodes prompts for a text-to-image teacher instead: see
stillroom cache --prompts --help."""
ABOUT_PROMPTS = """Encodes prompts once, by the text encoders of a pipeline of SD, SDXL, SD3 or Flux: what is written is
then a student's --prompts FOLDER."""


@dataclass(frozen=True, kw_only=True)
class Settings(Images):
    size: Count | None = None
    """Pixels a side of the squares; those that the codec's run learned from, unless given."""
    codec: Where
    """`bundled`, a run or product, a TAESD weight file, a diffusers folder, or a hub id."""
    out: Path
    """The store's folder. An unfinished one is gone on with."""
    batch: Count = 16
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    prompts: Path
    """A text file with a prompt on each line."""
    teacher: Where
    """A pipeline's folder, or a hub id."""
    size: Count
    """Pixels a side of the pictures that the teacher shall make."""
    out: Path
    length: Natural = 0
    """Tokens of T5, for SD3 and Flux; 0 takes the pipeline's own."""
    guidance: NotNegative = 0.0
    """What a guidance-distilled teacher (FLUX.1-dev) is told, and its students too; 0 takes 3.5, as its pipeline."""
    precision: Literal["float32", "bfloat16"] = "float32"
    batch: Count = 16
    device: str = "auto"


def run(word: str, arguments: list[str]) -> int:
    if "prompts" in given_flags(arguments):
        return run_prompts(arguments)
    settings = parse(Settings, arguments, "stillroom cache", ABOUT)
    from stillroom.codecs.store import write_store
    from stillroom.data import open_source, unreadable
    from stillroom.judge.places import CODECS, codec_at, is_codec_name, require_there
    from stillroom.train.teacher import size_of
    from stillroom.train.world import pick_device

    require_there(settings.codec, CODECS, is_codec_name(settings.codec))

    settings = dataclasses.replace(settings, size=settings.size or size_of(settings.codec))
    source = open_source(settings)

    def told(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {len(source)}", end="" if done < len(source) else "\n", file=sys.stderr)  # pyright: ignore

    codec = codec_at(settings.codec).to(pick_device(settings.device))
    folder = write_store(settings.out, codec, source, settings, settings.batch, told)
    if replaced := unreadable(source):
        print(replaced, file=sys.stderr)
    print(f"{folder}  {len(source)} pictures")  # pyright: ignore[reportArgumentType]
    return 0


def run_prompts(arguments: list[str]) -> int:
    s = parse(PromptSettings, arguments, "stillroom cache", ABOUT_PROMPTS)
    from stillroom.flows.prompts import cache_prompts
    from stillroom.train.world import pick_device

    def told(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} prompts", end="", file=sys.stderr)

    prompts = cache_prompts(s.prompts, s.teacher, s.size, s.out, s.length, s.guidance, s.precision, s.batch,
                            str(pick_device(s.device)), told)
    print(f"{s.out}  {len(prompts.texts)} prompts for pictures of {s.size} x {s.size}, {prompts.pipeline}")
    return 0

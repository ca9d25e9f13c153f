"""`stillroom compare CODEC CODEC ... --data IMAGES`: what codecs give back, and how easy their latents are to model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom.cli.flags import parse, take
from stillroom.settings import Count, Positive, Refusal, Share, Where

COMMAND = "stillroom compare CODEC CODEC ..."
ABOUT = ("Codecs side by side on the same pictures: reconstruction, samples of the same small prior on the way through "
         "its budget, its loss over time, probes, spectra, and a page of it all. CODEC is `bundled`, a run or product, "
         "a TAESD weight file, a diffusers folder or hub id; NAME=CODEC calls it so. What was measured is kept under "
         "--out/NAME and is not measured again.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Where
    """Pictures: a folder, a parquet file, or one of digits, shapes, leaves, photos."""
    heldout: Where = ""
    """Pictures that codecs are judged on. Unless given, the data's :test split; where there is none, a part of the data
    that is set aside."""
    size: Count | None = None
    """Pixels a side; of digits 8, unless given."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    """How pictures become squares; random ones are drawn once and for all."""
    shrink: tuple[Positive, Positive] = (1.0, 8.0)
    """With crop shrink: least and most pixels of the original per pixel."""
    bad_share: Share = 0.01
    out: Path = Path("compare")
    """Folder of the page, and of what was measured."""
    pictures: Count = 10_000
    """That a prior learns from, and that its samples are held against, at most."""
    n: Count = 2000
    """Held-out pictures, and samples of each prior at each look, at most."""
    steps: Count = 3000
    """Of the prior of each codec, which is looked at after a quarter, a half and all of them."""
    batch: Count = 64
    width: Count = 96
    """Of the prior, a DiT."""
    depth: Count = 4
    tokens: Count = 4
    """A side of the prior's, at most: latents are taken together so that every codec's prior has about as many. More of
    them see more, at their square's cost; 16 is usual for pictures of 256 pixels."""
    rate: Positive = 1e-3
    sampler_steps: Count = 8
    """Of Heun's method."""
    guidance: float = 1.5
    """Samples are drawn without guidance and, where there are labels, with this much; 1 leaves it out."""
    features: Where = ""
    """A run of `stillroom train features` on such pictures: Fréchet distances are in its features. Random features
    stand in, unless given."""
    inception: Path | None = None
    """Weight file of FID's Inception, pt_inception-2015-12-05-6726825d.pth: Fréchet distances are in its features."""
    lpips: Where = ""
    """Folder with public weight files of LPIPS."""
    reference: tuple[str, ...] = ()
    """Laws that latents were brought to: gaussian, gmm:16, noised:0.3, samples:FILE or a flow; NAME=REFERENCE is of
    one codec, any other of all. Drawn from --seed, where one is drawn."""
    seed: int = 0
    device: str = "auto"


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    specs = list[str]()
    while arguments and not arguments[0].startswith("-"):
        specs.append(arguments.pop(0))
    if not specs and not {"-h", "--help"} & set(arguments):
        raise Refusal(f"usage: {COMMAND} --data IMAGES --size PIXELS; see stillroom compare --help")
    settings = parse(Settings, arguments, COMMAND, ABOUT)
    from stillroom.cli.comparison import compare
    from stillroom.report.compare import in_terminal, write_comparison
    from stillroom.train.files import write_atomically

    found = compare(specs, settings, quiet)
    write_atomically(settings.out / "compare.json", json.dumps(found, indent=1, allow_nan=False))
    in_terminal(found)
    print(f"page: {write_comparison(settings.out, found)}")
    return 0

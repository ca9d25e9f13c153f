"""`stillroom compare`: codecs side by side, what they give back and how easy their latents are to model; or flows,
generators and points, what they draw and what that costs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from stillroom.cli.flags import parse, take
from stillroom.settings import Count, Natural, Positive, Refusal, Share, Where

COMMAND, OF_RUNS = "stillroom compare CODEC CODEC ...", "stillroom compare RUN RUN ..."
ABOUT = ("Codecs side by side on the same pictures: reconstruction, samples of the same small prior on the way through "
         "its budget, its loss over time, probes, spectra, and a page of it all. CODEC is `bundled`, a run or product, "
         "a TAESD weight file, a diffusers folder or hub id; NAME=CODEC calls it so. What was measured is kept under "
         "--out/NAME and is not measured again. Flows, generators and points are compared too: stillroom compare RUN "
         "RUN ... --help.")
ABOUT_RUNS = ("Flows, generators and points of one teacher side by side: samples of the same noise against data, or "
              "against the teacher's, by the same metrics, beside what they cost; a page, a table (.csv) and LaTeX "
              "(.tex) of it all. RUN is a run or a product; NAME=RUN,RUN,RUN are several seeds of one method, told as "
              "mean and deviation. What was measured is kept under --out/NAME and is not measured again.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Where
    """Pictures: a folder, a parquet file, or one of digits, shapes, leaves, photos."""
    heldout: Where = ""
    """Pictures that codecs are judged on. Unless given, the data's :test split; where there is none, a part of the data
    that is set aside. Of a mixture, the :test splits of all its parts."""
    size: Count | None = None
    """Pixels a side; of digits 8, unless given."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    """How pictures become squares; random ones are drawn once and for all."""
    shrink: tuple[Positive, Positive] = (1.0, 8.0)
    """With crop shrink: least and most pixels of the original per pixel."""
    bad_share: Share = 0.01
    out: Path = Path("compare")
    """Folder of the page, and of what was measured; or FILE.html, the page, with the folder FILE beside it."""
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
    one codec, any other of all. Drawn from --seed, where one is drawn. A product of dmvae knows its own, with its seed
    and the units that it stands in: give another place of it, another law, or NAME=none to leave it out."""
    base: tuple[str, ...] = ()
    """NAME=CODEC: where the codec lies that a product of dmvae began with, if not where it did; noised:0.3 wants it."""
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class OfRuns:
    data: Where = ""
    """What samples are held against. Unless given, samples of the teacher; of a mixture, draws of it."""
    heldout: Where = ""
    """Fresh real data for the floor. Unless given, the data's :test split; where there is none, a part of the data that
    is set aside. Of a mixture, the :test splits of all its parts."""
    out: Path = Path("compare")
    """Folder of the page, and of what was measured; or FILE.html, the page, with the folder FILE beside it."""
    teacher: Where = ""
    """Unless given, the one that the runs name."""
    prompts: Where = ""
    """Of a text-to-image teacher: what `stillroom cache --prompts` wrote. Unless given, those that the runs name."""
    teacher_steps: tuple[Count, ...] = (1, 2, 8)
    """At which the teacher is drawn from, beside its own."""
    n: Count = 2000
    """Samples of each; as many as there are, where points are fewer."""
    reference: Count = 50_000
    """Real ones, at most; of the teacher, where it stands for data, 5000 at most."""
    size: Natural = 0
    """Pixels a side to which pictures of the data are cropped; as large as the samples unless given."""
    bad_share: Share = 0.01
    features: Where = ""
    """A run of `stillroom train features`: distances in its pooled features too."""
    inception: Path | None = None
    """Weight file of FID's Inception, pt_inception-2015-12-05-6726825d.pth: distances in its features too."""
    codec: Where = ""
    """Decodes latents: the codec that made those on which the runs were trained."""
    seed: int = 0
    """Of the noise, which all share."""
    batch: Count = 256
    device: str = "auto"


S = TypeVar("S", Settings, OfRuns)


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    specs = list[str]()
    while arguments and not arguments[0].startswith("-"):
        specs.append(arguments.pop(0))
    if not specs and not {"-h", "--help"} & set(arguments):
        raise Refusal(f"usage: {COMMAND} --data IMAGES --size PIXELS; see stillroom compare --help")
    if specs and are_runs(specs):
        return run_on_runs(specs, *paged(parse(OfRuns, arguments, OF_RUNS, ABOUT_RUNS)), quiet)
    settings, page = paged(parse(Settings, arguments, COMMAND, ABOUT))
    from stillroom.cli.comparison import compare
    from stillroom.report.compare import in_terminal, write_comparison
    from stillroom.settings.files import write_atomically

    found = compare(specs, settings, quiet)
    write_atomically(settings.out / "compare.json", json.dumps(found, indent=1, allow_nan=False))
    in_terminal(found)
    print(f"page: {write_comparison(settings.out, page, found)}")
    return 0


def paged(settings: S) -> tuple[S, Path]:
    """The settings, with the folder as --out, and the page: FILE.html stands beside the folder FILE, or in its
    folder."""
    out = settings.out
    if out.suffix.lower() not in (".html", ".htm"):
        return settings, out / "compare.html"
    if out.is_dir():
        raise Refusal(f"--out {out}: is a folder, and would be the page: give --out FOLDER, or another FILE.html")
    return replace(settings, out=out.with_suffix("")), out


def are_runs(specs: list[str]) -> bool:
    """Whether flows, generators and points are to be compared, and no codecs."""
    from stillroom.cli.comparison_named import DRAWN, contender, places_of

    kinds = {place: contender(place) for spec in specs for place in places_of(spec)}
    for place, kind in kinds.items():
        if kind not in (*DRAWN, "codec"):
            raise Refusal(f"{place}: a product of kind {kind!r} is not compared; give codecs, or flows, generators and "
                          "points")
    runs = [place for place, kind in kinds.items() if kind in DRAWN]
    if runs and len(runs) < len(kinds):
        codec = next(place for place in kinds if place not in runs)
        raise Refusal(f"{runs[0]} is {DRAWN[kinds[runs[0]]]} and {codec} a codec: compare codecs with codecs, and "
                      "flows, generators and points with their like")
    return bool(runs)


def run_on_runs(specs: list[str], settings: OfRuns, page: Path, quiet: bool) -> int:
    from stillroom.cli.comparison_runs import compare
    from stillroom.report.compare_runs import in_terminal, write_comparison

    found, clouds = compare(specs, settings, quiet)
    in_terminal(found)
    print(f"page: {write_comparison(settings.out, page, found, clouds)}")
    return 0

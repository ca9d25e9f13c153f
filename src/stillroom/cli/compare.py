"""`stillroom compare`: codecs side by side, what they give back and how easy their latents are to model; or flows,
generators and points, what they draw and what that costs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from stillroom.cli.flags import parse, take
from stillroom.judge.asked import OfCodecs, OfRuns
from stillroom.settings import Refusal

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


S = TypeVar("S", OfCodecs, OfRuns)


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    specs = list[str]()
    while arguments and not arguments[0].startswith("-"):
        specs.append(arguments.pop(0))
    if not specs and not {"-h", "--help"} & set(arguments):
        raise Refusal(f"usage: {COMMAND} --data IMAGES --size PIXELS; see stillroom compare --help")
    if specs and are_runs(specs):
        return run_on_runs(specs, *paged(parse(OfRuns, arguments, OF_RUNS, ABOUT_RUNS)), quiet)
    settings, page = paged(parse(OfCodecs, arguments, COMMAND, ABOUT))
    from stillroom.cli.progress import watch_for
    from stillroom.judge.codecs import compare
    from stillroom.report.compare import in_terminal, write_comparison
    from stillroom.settings.files import write_atomically

    found = compare(specs, settings, watch_for(quiet))
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
    from stillroom.judge.contenders import DRAWN, contender, places_of

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
    from stillroom.cli.progress import watch_for
    from stillroom.judge.runs import compare
    from stillroom.report.compare_runs import in_terminal, write_comparison

    found, clouds = compare(specs, settings, watch_for(quiet))
    in_terminal(found)
    print(f"page: {write_comparison(settings.out, page, found, clouds)}")
    return 0

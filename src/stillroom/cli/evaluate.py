"""`stillroom evaluate PLACE --data DATA`: how far samples are from data, beside how far fresh data are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillroom.cli.draws import Drawing, require_there
from stillroom.cli.flags import parse
from stillroom.settings import Count, Natural, Refusal, Share, Where

COMMAND = "stillroom evaluate PLACE"
ABOUT = ("Distances between samples and data in named feature spaces, each beside the same distance of fresh real "
         "data. PLACE is a run, or samples: a .npz file, or a folder of pictures.")


@dataclass(frozen=True, kw_only=True)
class Settings(Drawing):
    data: Where = ""
    """The reference: what the run was trained on, or other data of its kind. Only with --stats may it be left out."""
    heldout: Where = ""
    """Fresh real data for the floor. Unless given, the data's :test split; where there is none, a part of the data that
    is set aside. Of a mixture, the :test splits of all its parts."""
    n: Count | None = None
    """Samples: 2000 of a run, all that are there of a file or folder, unless given."""
    reference: Count = 50_000
    """Real ones, at most."""
    size: Natural = 0
    """Pixels a side to which pictures of the data are cropped; as large as the samples unless given."""
    bad_share: Share = 0.01
    labels: Literal["balanced", "data"] = "balanced"
    """Of which classes samples are drawn: equally of all, or as the data have them."""
    features: Where = ""
    """A run of `stillroom train features`: distances in its pooled features too."""
    inception: Path | None = None
    """Weight file of FID's Inception, pt_inception-2015-12-05-6726825d.pth: distances in its features too."""
    stats: Path | None = None
    """Statistics of a reference set: pytorch-fid's .npz, ADM's reference batch, or what --save-stats wrote."""
    save_stats: Path | None = None
    """Write the data's statistics, in the last of the feature spaces, to this .npz."""
    teacher: Where = ""
    """A flow: how far samples lie from where its trajectories lead from the same noise."""
    prompts: Where = ""
    """Of a text-to-image teacher: what `stillroom cache --prompts` wrote."""
    out: Path | None = None
    """Write all figures to this .json."""


def run(word: str, arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parse(Settings, ["--help"], COMMAND, ABOUT)
        raise Refusal(f"usage: {COMMAND} --data DATA [--n 2000]; see stillroom evaluate --help")
    settings = parse(Settings, arguments[1:], COMMAND, ABOUT)
    require_there(arguments[0], "a run, a folder of pictures or a .npz file")
    if not settings.data and settings.stats is None:
        raise Refusal(f"{COMMAND}: --data DATA must be given, or --stats FILE")
    if settings.save_stats is not None and not settings.data:
        raise Refusal(f"{COMMAND}: --save-stats needs --data, of which the statistics are")
    from stillroom.cli.evaluation import evaluate
    from stillroom.settings.files import write_atomically

    report = evaluate(arguments[0], settings)
    print(report.text())
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.out, json.dumps(report.content(), indent=1))
    return 0

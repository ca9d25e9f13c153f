"""`stillroom evaluate PLACE --data DATA`: how far samples are from data, beside how far fresh data are."""

import json

from stillroom.cli.flags import parse
from stillroom.judge.asked import Evaluation, flags_given
from stillroom.judge.places import require_there
from stillroom.settings import Refusal

COMMAND = "stillroom evaluate PLACE"
ABOUT = ("Distances between samples and data in named feature spaces, each beside the same distance of fresh real "
         "data. PLACE is a run, or samples: a .npz file, or a folder of pictures.")


def run(word: str, arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parse(Evaluation, ["--help"], COMMAND, ABOUT)
        raise Refusal(f"usage: {COMMAND} --data DATA [--n 2000]; see stillroom evaluate --help")
    settings = parse(Evaluation, arguments[1:], COMMAND, ABOUT)
    require_there(arguments[0], "a run, a folder of pictures or a .npz file")
    if not settings.data and settings.stats is None:
        raise Refusal(f"{COMMAND}: --data DATA must be given, or --stats FILE")
    if settings.save_stats is not None and not settings.data:
        raise Refusal(f"{COMMAND}: --save-stats needs --data, of which the statistics are")
    if not settings.data and (told := flags_given(settings, "heldout", "reference", "size", "bad_share")):
        raise Refusal(f"{COMMAND}: without --data there is no use for {told}; leave it out, or give --data")
    from stillroom.judge.evaluation import evaluate
    from stillroom.settings.files import require_file, write_atomically

    require_file(settings.out)
    require_file(settings.save_stats)
    report = evaluate(arguments[0], settings)
    print(report.text())
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.out, json.dumps(report.content(), indent=1))
    return 0

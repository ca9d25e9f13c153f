"""`stillroom inspect PLACE`: the geometry of a space, how flows bend in it, and whether drifting will work there."""

import json

from stillroom.cli.flags import parse
from stillroom.judge.asked import Inspection
from stillroom.settings import Refusal

ABOUT = ("Measures a space: how many dimensions it spreads in, how its classes and distances lie, what a drifting "
         "kernel would see of it, and how a flow's trajectories bend. PLACE is a store of latents, a data set, a codec "
         "(with --data), or a flow or generator, whose samples are measured.")


def run(word: str, arguments: list[str]) -> int:
    place = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if not place and not {"-h", "--help"} & set(arguments):
        raise Refusal("usage: stillroom inspect PLACE [--flow RUN] [--against PLACE2]; see stillroom inspect --help")
    settings = parse(Inspection, arguments, "stillroom inspect PLACE", ABOUT)
    from stillroom.judge.inspection import inspect
    from stillroom.report.geometry import in_terminal, write_inspection
    from stillroom.settings.files import require_file, write_atomically

    require_file(settings.out)
    found = inspect(place, settings)
    in_terminal(found)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.out.with_suffix(".json"), json.dumps(found, allow_nan=False))
        print(f"page: {write_inspection(settings.out, found)}")
    return 0

"""`stillroom resume RUN`."""

from pathlib import Path

from stillroom.cli.flags import take
from stillroom.recipes import find
from stillroom.settings import Refusal


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        if arguments and arguments[0] in ("-h", "--help"):
            print("usage: stillroom resume RUN [--quiet]\n\nGoes on from the run's last good checkpoint.")
            return 0
        raise Refusal("usage: stillroom resume RUN")
    from stillroom import train
    from stillroom.cli.progress import watch_for
    from stillroom.cli.train import finish, is_first

    folder = train.resume(Path(arguments[0]), find, watch=watch_for(quiet or not is_first()))
    return finish(folder, quiet)

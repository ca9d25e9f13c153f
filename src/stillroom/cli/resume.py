"""`stillroom resume RUN`."""

from pathlib import Path

from stillroom.cli.flags import take, take_value
from stillroom.recipes import find
from stillroom.settings import Refusal, Run
from stillroom.settings.limits import places_of

USAGE = "usage: stillroom resume RUN [--quiet] [--SETTING PLACE ...] [--bad-share SHARE]"
ABOUT = """Goes on from the run's last good checkpoint. Where data, a teacher or another place that its settings name
has moved, say where it is now: --data PLACE, --teacher PLACE. It must hold what the run began with.
Where it stopped at pictures that cannot be read, --bad-share says how many of them it may pass over."""


def run(word: str, arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        if not arguments:
            raise Refusal(USAGE)
        print(f"{USAGE}\n\n{ABOUT}")
        return 0
    from stillroom import train
    from stillroom.cli.progress import watch_for
    from stillroom.cli.train import finish, is_first

    quiet = take(arguments, "--quiet")
    if not arguments or arguments[0].startswith("-") or (arguments[1:] and not arguments[1].startswith("--")):
        raise Refusal(USAGE)
    path = Path(arguments.pop(0))
    _, settings, _ = train.read_run(path, find)
    changed = taken_places(type(settings), arguments) | taken_share(settings, arguments)
    if arguments:
        raise Refusal(f"{USAGE}; {arguments[0]!r} is no place that the settings of {path} name")
    folder = train.resume(path, find, watch=watch_for(quiet or not is_first()), changed=changed)
    return finish(folder, quiet)


def taken_places(cls: type[Run], arguments: list[str]) -> dict[str, str]:
    from stillroom.cli.train import anchored_place

    given = {name: (take_value(arguments, f"--{name.replace('_', '-')}"), place)
             for name, place in places_of(cls).items()}
    return {name: anchored_place(text, place) for name, (text, place) in given.items() if text is not None}


def taken_share(settings: Run, arguments: list[str]) -> dict[str, float]:
    """Of bad pictures, which changes nothing of what is learned from the others."""
    if not hasattr(settings, "bad_share") or (text := take_value(arguments, "--bad-share")) is None:
        return {}
    try:
        return {"bad_share": float(text)}
    except ValueError:
        raise Refusal(f"--bad-share {text!r}: give a share, --bad-share 0.2") from None

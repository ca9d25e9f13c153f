"""What goes wrong is told in one line: what, where, and what to do."""

import difflib
from collections.abc import Iterable


class Refusal(Exception):
    """An error that the user can mend. Its text is one line; the command line prints it and exits with 2."""

    def __init__(self, text: str):
        super().__init__(" ".join(text.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"

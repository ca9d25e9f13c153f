"""The command line, called as a person would, in this process or in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stillroom.cli.main import main
from stillroom.settings import Refusal

TINY = "--data digits --size 8 --batch 8 --width 16 --depth 1 --precision float32"


class Told(NamedTuple):
    code: int
    out: str
    err: str


def stillroom(*words: str | Path) -> Told:
    """One string may hold several words; a Path is one word."""
    argv = [w for word in words for w in ([str(word)] if isinstance(word, Path) else word.split())]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as end:  # tyro's --help
            code = int(end.code or 0)
    return Told(code, out.getvalue(), err.getvalue())


def printed(*words: str | Path) -> str:
    """What a command that does well prints."""
    told = stillroom(*words)
    assert told.code == 0, told.err
    return told.out


def complaint(*words: str | Path) -> str:
    """The one line in which a command is refused."""
    told = stillroom(*words)
    assert told.code == 2 and told.err.startswith("stillroom: ") and told.err.count("\n") == 1, told
    return told.err.removeprefix("stillroom: ").rstrip("\n")


def refused(do: Callable[[], Any]) -> str:
    """The one line in which a call is refused."""
    with pytest.raises(Refusal) as found:
        do()
    line = str(found.value)
    assert "\n" not in line
    return line


def python(*argv: str | Path, **more) -> subprocess.CompletedProcess:
    """Another interpreter; `env` adds to this one's."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=env, check=False,
                          timeout=120, **more)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))

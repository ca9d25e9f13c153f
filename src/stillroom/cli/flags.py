"""Flags from a settings declaration, over a TOML file. tyro reads and documents them; errors are one line."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from stillroom.settings import Refusal, from_mapping, nearest, read_toml

T = TypeVar("T")


def flag_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Every flag of a settings dataclass; nested ones are joined by a dot."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flag_names(hints[field.name], name + ".")  # pyright: ignore[reportArgumentType]
        else:
            yield name


def given_flags(arguments: Sequence[str]) -> list[str]:
    return [a[2:].split("=", 1)[0].replace("_", "-") for a in arguments if a.startswith("--")]


def parse(cls: type[T], arguments: Sequence[str], command: str, description: str, config: Path | None = None,
          also: Sequence[str] = ()) -> T:
    """An instance of `cls` from flags over a TOML file over its defaults. `also`: keys of the file that are not settings."""
    if any(a in ("-h", "--help") for a in arguments):
        tyro.cli(cls, prog=command, description=description, args=["--help"])
    known = list(flag_names(cls))
    for flag in given_flags(arguments):
        head, _, last = flag.rpartition(".")
        positive = flag.removeprefix("no-") if not head else f"{head}.{last.removeprefix('no-')}"
        if flag not in known and positive not in known:
            raise Refusal(f"{command}: --{flag} is not a setting{nearest(flag, known)}")
    values = {} if config is None else {k: v for k, v in read_toml(config).items() if k not in also}
    default = _with_gaps(cls, values, str(config))
    missing = [
        f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if getattr(default, f.name) is tyro.MISSING and f.name.replace("_", "-") not in given_flags(arguments)
    ]
    if missing:
        raise Refusal(f"{command}: {', '.join(missing)} must be given; see {command} --help")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            settings = tyro.cli(cls, prog=command, args=list(arguments), default=default)
    except SystemExit:
        raise Refusal(f"{command}: {_first_message(said.getvalue())}") from None
    # Once more through the strict door: tyro lets nan and inf through, TOML values are not yet typed.
    return from_mapping(cls, {f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)}, command)  # pyright: ignore


def _with_gaps(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The settings of the file, with tyro's mark where a required one is still to come from a flag."""
    required = [
        f.name for f in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    hints = typing.get_type_hints(cls)
    stand_in = {int: 1, float: 1.0, str: "", Path: "."}
    whole = from_mapping(cls, values | {n: stand_in[hints[n]] for n in required}, where)
    return dataclasses.replace(whole, **dict.fromkeys(required, tyro.MISSING))  # pyright: ignore


def _first_message(box: str) -> str:
    """What tyro's box says before its first rule, without the frame."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    text: list[str] = []
    for line in lines[1:]:
        if set(line) <= set("─╰╯"):
            break
        text.append(line)
    return " ".join(text) or "not understood"


def take(arguments: list[str], flag: str) -> bool:
    """Removes a bare flag that is of the command and not a setting."""
    present = flag in arguments
    arguments[:] = [a for a in arguments if a != flag]
    return present


def take_value(arguments: list[str], flag: str) -> str | None:
    for i, a in enumerate(arguments):
        if a == flag:
            if i + 1 == len(arguments):
                raise Refusal(f"{flag} needs a value")
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if a.startswith(flag + "="):
            del arguments[i]
            return a.split("=", 1)[1]
    return None

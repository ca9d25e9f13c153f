"""Flags from a settings declaration, over a TOML file. tyro reads and documents them; errors are one line."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from stillroom.settings import Refusal, absent, checked, fit, nearest, read_toml, required

T = TypeVar("T")


def flags_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every flag of a settings dataclass, with its type; nested ones are joined by a dot."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name], name + ".")  # pyright: ignore[reportArgumentType]
        else:
            yield name, hints[field.name]


def given_flags(arguments: Sequence[str]) -> list[str]:
    return [a[2:].split("=", 1)[0].replace("_", "-") for a in arguments if a.startswith("--")]


def parse(cls: type[T], arguments: Sequence[str], command: str, description: str, config: Path | None = None,
          also: Sequence[str] = ()) -> T:
    """An instance of `cls` from flags over a TOML file over its defaults. `also`: other keys that the file may hold."""
    if any(a in ("-h", "--help") for a in arguments):
        tyro.cli(cls, prog=command, description=description, args=["--help"])
    check_flags(cls, arguments, command)
    values = {} if config is None else {k: v for k, v in read_toml(config).items() if k not in also}
    fitted = fit(cls, values, str(config))
    gaps = [name for name in required(cls) if name not in fitted]
    if missing := [f"--{flag}" for n in gaps if not is_given(flag := n.replace("_", "-"), given_flags(arguments))]:
        raise Refusal(f"{command}: {', '.join(missing)} must be given; see {command} --help")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            settings = tyro.cli(cls, prog=command, args=list(arguments), default=with_gaps(cls, fitted))
    except SystemExit:
        raise Refusal(f"{command}: {first_message(said.getvalue())}") from None
    return checked(settings, command)  # tyro knows the types, but no limits, and lets nan through


def with_gaps(cls: type[T], fitted: dict[str, Any]) -> T:
    """The settings of a file, with tyro's mark where a required one is still to come from a flag."""
    hints = typing.get_type_hints(cls)
    gaps = {
        name: with_gaps(hints[name], {}) if dataclasses.is_dataclass(hints[name]) else tyro.MISSING
        for name in required(cls) if name not in fitted
    }
    return cls(**gaps, **fitted)


def check_flags(cls: type, arguments: Sequence[str], command: str) -> None:
    known, given = dict(flags_of(cls)), given_flags(arguments)
    for flag in given:
        head, dot, last = flag.rpartition(".")
        positive = head + dot + last.removeprefix("no-")
        if flag not in known and positive not in known:
            why = absent(cls, flag.replace("-", "_")) or nearest("--" + flag, ["--" + k for k in known])
            raise Refusal(f"{command}: --{flag} is not a setting{why}")
        if (times := given.count(flag)) > 1 and typing.get_origin(known.get(flag)) is tuple:
            raise Refusal(f"{command}: --{flag} is given {times} times, of which the last alone would count; give all "
                          f"values after one --{flag}")


def is_given(name: str, flags: Sequence[str]) -> bool:
    """A nested setting is given by any of its parts; tyro then asks for the others."""
    return any(flag == name or flag.startswith(name + ".") for flag in flags)


def first_message(box: str) -> str:
    """What tyro says first, without its frame, headline and help."""
    rules, text = 0, []
    for line in (line.strip("│| ").strip() for line in box.splitlines()):
        if set(line) <= set("─╭╮╰╯-"):
            rules += 1
            if text:
                break
        elif rules:
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

"""Settings to and from plain mappings and TOML. Strict: an unknown key, a wrong type or a missing value is refused."""

import dataclasses
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import tomli_w

from stillroom.settings.errors import Refusal, nearest
from stillroom.settings.given import default_of
from stillroom.settings.limits import Within, but_for_none, hints_of

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the settings dataclass; `where` names the file or call in errors."""
    fitted = fit(cls, values, where)
    for name in required(cls):
        if name not in values:
            raise Refusal(f"{where}: {name!r} is missing; it has no default")
    return cls(**fitted)


def checked(settings: T, where: str) -> T:
    """Settings that were made in Python, through the same door as those from a file."""
    return from_mapping(type(settings), _shallow(settings), where)


def required(cls: type) -> list[str]:
    return [
        f.name for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]


def fit(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as their declared types, which may be a part of the settings. A nested table is laid over the default:
    naming one rate must not lose the recipe's other optimizer settings."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = hints_of(cls)
    for key in values:
        if key not in fields:
            raise Refusal(f"{where}: {key!r} is not a setting{absent(cls, key) or nearest(key, fields)}")
    return {k: _fit(hints[k], v, f"{where}: {k}", default_of(fields[k])) for k, v in values.items()}


def absent(cls: type, name: str) -> str:
    """Why it has not the setting of a name that its like have, where its `ABSENT` says so."""
    why = getattr(cls, "ABSENT", {}).get(name)
    return f": {why}" if why else ""


def _shallow(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}


def _fit(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _fit_table(hint, value, where, default)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitted = _fit(arguments[0], value, where, default)
        for limit in arguments[1:]:
            if isinstance(limit, Within) and fitted not in limit:
                raise Refusal(f"{where}: {fitted} must be {limit}")
        return fitted
    if origin is Literal:
        if not any(type(a) is type(value) and a == value for a in arguments):
            raise Refusal(f"{where}: {_shown(value)} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _fit(but_for_none(hint), value, where)
    if origin is tuple:
        return _fit_tuple(arguments, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # too large an int would not even be turned into a float
            raise Refusal(f"{where}: {_shown(value)} is not a finite number")
        return float(value)
    if hint in (str, Path) and isinstance(value, str | hint):
        if "\0" in str(value) or not _is_unicode(str(value)):
            raise Refusal(f"{where}: {ascii(value)[:60]} holds characters that a settings file cannot")
        return hint(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        if hint is int and not -(2**63) <= value < 2**63:
            raise Refusal(f"{where}: {_shown(value)} has more than the 64 bits of a settings file")
        return value
    raise Refusal(f"{where}: expected {hint.__name__}, got {_shown(value)}")


def _fit_table(hint: type, value: Any, where: str, default: Any) -> Any:
    if isinstance(value, hint):
        return checked(value, where)
    if not isinstance(value, Mapping):
        raise Refusal(f"{where}: expected a table of settings, got {_shown(value)}")
    given = to_mapping(default) if isinstance(default, hint) else {}
    return from_mapping(hint, given | dict(value), where)


def _fit_tuple(arguments: tuple, value: Any, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise Refusal(f"{where}: expected a list, got {_shown(value)}")
    if arguments[-1] is Ellipsis:
        return tuple(_fit(arguments[0], v, where) for v in value)
    if len(value) != len(arguments):
        raise Refusal(f"{where}: expected {len(arguments)} values, got {len(value)}")
    return tuple(_fit(a, v, where) for a, v in zip(arguments, value, strict=True))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_unicode(text: str) -> bool:
    """Not so for an argument whose bytes were not UTF-8: Python keeps those as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def to_mapping(settings: Any) -> dict[str, Any]:
    """Plain values, as TOML holds them; settings that are None are left out."""
    return {k: _plain(v) for k, v in _shallow(settings).items() if v is not None}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such settings file") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError: bad TOML, bad UTF-8, endless digits
        raise Refusal(f"{path}: not a readable settings file: {error}") from None


def from_toml(cls: type[T], path: Path) -> T:
    return from_mapping(cls, read_toml(path), str(path))


def to_toml(settings: Any, **extra: Any) -> str:
    """`extra` keys stand first: what is resolved beside the settings themselves, such as the recipe's name."""
    return tomli_w.dumps(extra | to_mapping(settings))

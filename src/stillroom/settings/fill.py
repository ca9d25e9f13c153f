"""Settings to and from plain mappings and TOML. Strict: an unknown key, a wrong type or a missing value is refused."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import tomli_w

from stillroom.settings.errors import Refusal, nearest

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the settings dataclass; `where` names the file or call in errors."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise Refusal(f"{where}: {key!r} is not a setting{nearest(key, fields)}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise Refusal(f"{where}: {name!r} is missing; it has no default")
    return cls(**{k: _fit(hints[k], v, f"{where}: {k}", _default(fields[k])) for k, v in values.items()})


def _default(field: dataclasses.Field) -> Any:
    """What a nested table is laid over: naming one rate must not lose the recipe's other optimizer settings."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _fit(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise Refusal(f"{where}: expected a table of settings, got {value!r}")
        given = to_mapping(default) if isinstance(default, hint) else {}
        return from_mapping(hint, given | dict(value), where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise Refusal(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _fit(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise Refusal(f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_fit(arguments[0], v, where) for v in value)
        if len(value) != len(arguments):
            raise Refusal(f"{where}: expected {len(arguments)} values, got {len(value)}")
        return tuple(_fit(a, v, where) for a, v in zip(arguments, value, strict=True))
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise Refusal(f"{where}: {value} is not a finite number")
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise Refusal(f"{where}: expected {hint.__name__}, got {value!r}")


def to_mapping(settings: Any) -> dict[str, Any]:
    """Plain values, as TOML holds them; settings that are None are left out."""
    out = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = to_mapping(value)
        elif isinstance(value, Path):
            out[field.name] = str(value)
        elif isinstance(value, tuple):
            out[field.name] = list(value)
        elif value is not None:
            out[field.name] = value
    return out


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such settings file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise Refusal(f"{path}: not a readable settings file: {error}") from None


def from_toml(cls: type[T], path: Path) -> T:
    return from_mapping(cls, read_toml(path), str(path))


def to_toml(settings: Any, **extra: Any) -> str:
    """`extra` keys stand first: what is resolved beside the settings themselves, such as the recipe's name."""
    return tomli_w.dumps(extra | to_mapping(settings))

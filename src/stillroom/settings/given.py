"""Which settings were given: those that differ from what they are unless given."""

import dataclasses
from typing import Any

from stillroom.settings.errors import Refusal


def given(settings: Any, *names: str) -> list[str]:
    """Of these names."""
    fields = {f.name: f for f in dataclasses.fields(settings)}
    return [name for name in names if getattr(settings, name) != default_of(fields[name])]


def refuse_given(settings: Any, names: tuple[str, ...], why: str) -> None:
    """Settings that would have no effect."""
    if found := given(settings, *names):
        raise Refusal(f"{', '.join(found)}: {why}")


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

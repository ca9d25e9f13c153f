"""Limits of a setting, declared with its type: `steps: Count = 100`. Every way in to the settings keeps them."""

import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from stillroom.settings.errors import Refusal


@dataclass(frozen=True)
class Within:
    """low <= value <= high; a side that is open leaves its end out."""

    low: float
    high: float = float("inf")
    open: tuple[bool, bool] = (False, False)

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open[0] else value >= self.low
        return above and (value < self.high if self.open[1] else value <= self.high)

    def __str__(self) -> str:
        least = f"above {self.low}" if self.open[0] else f"at least {self.low}"
        most = f"below {self.high}" if self.open[1] else f"at most {self.high}"
        return least if self.high == float("inf") else f"{least} and {most}"


@dataclass(frozen=True)
class Place:
    """A path or a name: the command line makes it absolute where a file or folder of that name is there, unless it is
    one of `names`, which mean something else. `after`: a regular expression of what may stand before it."""

    names: tuple[str, ...] = ()
    after: str = ""


def expanded(place: str | Path) -> Path:
    """With ~ and ~USER as the folders that they stand for."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise Refusal(f"{place}: nobody of that name has a folder here; give the path") from error


Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
NotNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, open=(True, False))]
Share = Annotated[float, Within(0, 1)]
Decay = Annotated[float, Within(0, 1, open=(False, True))]
Where = Annotated[str, Place()]


def places_of(cls: type) -> dict[str, Place]:
    """The settings that are paths or names."""
    found = {name: [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Place)]
             for name, hint in hints_of(cls).items()}
    return {name: marks[0] for name, marks in found.items() if marks}


def hints_of(cls: type) -> dict[str, Any]:
    """The fields' types, with limits. A recipe that restates `steps: int = 5000` keeps the limit of `Run.steps`; one
    that restates `size: int = 64` keeps that of `Images.size`, which may be None."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            limited = but_for_none(hints.get(name))
            restated = typing.get_origin(limited) is Annotated and typing.get_args(limited)[0] == hint
            hints[name] = limited if restated else hint
    return hints


def but_for_none(hint: Any) -> Any:
    """`X` of `X | None`; another type as it is."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return next(a for a in typing.get_args(hint) if a is not type(None))

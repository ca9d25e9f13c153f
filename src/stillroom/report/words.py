"""Numbers, times, sizes and file names as a reader wants them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 200  # characters of one value before it is cut; settings and cards may hold whole tensors


def number(value: float, digits: int = 4) -> str:
    """Few significant digits, and thousands set apart: what a person compares, not what a machine stores."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return str(value)
    if 10**digits - 0.5 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*(\d+)", lambda m: f"e{m[1].strip('+')}{m[2]}", f"{value:.{digits}g}")


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def duration(seconds: float) -> str:
    """The two largest units that matter: 8.4 s, 12 min 30 s, 2 h 5 min, 3 d 4 h."""
    if not (math.isfinite(seconds) and seconds >= 0):
        return "unknown"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole, parts = round(seconds), []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, length)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(part for part in parts[:2] if part)


def size(count: float) -> str:
    """Bytes in the units in which disks and memories are told."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1023.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def caption(stem: str) -> str:
    """step-000500 -> step 500; one-step_vs_teacher -> one step vs teacher."""
    return re.sub(r"(?<![.\d])0+(?=\d)", "", re.sub(r"[-_]+", " ", stem)).strip()


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which step-900 stands before step-1000."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def value(thing: Any) -> str:
    """One setting or card entry in one line, as TOML and JSON would write it; long lists say how long they are."""
    if isinstance(thing, str):
        text = thing
    elif isinstance(thing, bool) or thing is None:
        text = {True: "true", False: "false", None: "none"}[thing]
    elif isinstance(thing, list | tuple) and all(is_number(x) or isinstance(x, str) for x in thing):
        text = f"[{', '.join(map(str, thing))}]"
    elif isinstance(thing, Mapping | list | tuple):
        text = json.dumps(thing, default=str)
    else:
        text = str(thing)
    if len(text) <= LONGEST:
        return text
    count = f" ({len(thing):,} values)" if isinstance(thing, list | tuple) else ""
    return f"{text[:LONGEST]} …{count}"


def flatten(mapping: Mapping[str, Any], name: str = "") -> list[tuple[str, list[tuple[str, str]]]]:
    """Nested tables -> [(dotted table name, [(key, value)])], the top level first under the name ''."""
    own = [(str(key), value(thing)) for key, thing in mapping.items() if not isinstance(thing, Mapping) or not thing]
    groups = [(name, own)] if own else []
    for key, thing in mapping.items():
        if isinstance(thing, Mapping) and thing:
            groups += flatten(thing, f"{name}.{key}" if name else str(key))
    return groups

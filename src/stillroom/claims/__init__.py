"""One file per claim, named like the method it is about. Listing them reads files; only `find` imports one."""

import ast
import importlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stillroom.settings import Refusal, nearest

if TYPE_CHECKING:
    from stillroom.claims.claim import Claim

RESULTS = Path(__file__).parent / "results"


class Entry(NamedTuple):
    name: str
    title: str  # first line of the file
    text: str  # the paragraphs after it
    recipe: str  # that it is about


@cache
def listing() -> tuple[Entry, ...]:
    """Every file of this folder that states a CLAIM, from its source alone."""
    entries = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        made = [node.value for node in tree.body if isinstance(node, ast.Assign) and
                "CLAIM" in map(ast.unparse, node.targets)]
        if made:
            title, _, text = (ast.get_docstring(tree) or "").partition("\n")
            name = path.stem.replace("_", "-")
            about = [ast.literal_eval(k.value) for call in made if isinstance(call, ast.Call) for k in call.keywords
                     if k.arg == "recipe"]
            entries.append(Entry(name, title, text.strip(), *(about or [name])))
    return tuple(entries)


def check_name(name: str) -> None:
    known = [e.name for e in listing()]
    if name not in known:
        raise Refusal(f"no claim is called {name!r}{nearest(name, known)}")


def find(name: str) -> "Claim":
    check_name(name)
    return importlib.import_module(f"stillroom.claims.{name.replace('-', '_')}").CLAIM


def stored(name: str) -> dict[str, Any] | None:
    """The result that came with this stillroom."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

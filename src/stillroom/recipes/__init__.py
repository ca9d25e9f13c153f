"""One file per method. Listing them reads files; only `find` imports one."""

import ast
import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from stillroom.settings import Refusal, nearest

TEACHERS = frozenset({"codec", "features", "flow", "rae", "tokenizer"})
"""Recipes that learn from data alone: `stillroom train NAME`. All others: `stillroom distill NAME`."""


class Entry(NamedTuple):
    name: str
    verb: str  # train or distill
    title: str  # first line of the file
    paper: str


@cache
def listing() -> tuple[Entry, ...]:
    """Every recipe file of this folder, from its docstring alone."""
    entries = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.stem.replace("_", "-")
        papers = (line.removeprefix("Paper:").strip() for line in doc.splitlines() if line.startswith("Paper:"))
        entries.append(Entry(name, "train" if name in TEACHERS else "distill", doc.split("\n", 1)[0], next(papers, "")))
    return tuple(entries)


def find(name: str) -> type:
    """The recipe class of a name, or of FILE.py:CLASS."""
    file, colon, cls = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), cls)
    if name.startswith("python:"):
        raise Refusal(f"this run's recipe, {name[7:]}, was given in Python: call stillroom.fit again to go on with it")
    known = [e.name for e in listing()]
    if name not in known:
        raise Refusal(f"no recipe is called {name!r}{nearest(name, known)}")
    module = importlib.import_module(f"stillroom.recipes.{name.replace('-', '_')}")
    return _recipe_in(module, name)


def _recipe_in(module, where: str) -> type:
    from stillroom.train import Recipe

    own = [
        c for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Recipe) and c is not Recipe and c.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise Refusal(f"{where}: expected one Recipe class in the file, found {[c.__name__ for c in own]}")
    return own[0]


def module_of(path: Path) -> ModuleType:
    """A file of the user's."""
    from stillroom.nets.build import USERS

    name = USERS + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Refusal(f"{path}: {error}; install what it needs, or mend its imports") from error
    return module


def _from_file(path: Path, cls: str) -> type:
    from stillroom.train import Recipe

    if not path.is_file():
        raise Refusal(f"{path}: no such file; give FILE.py:CLASS")
    module = module_of(path)
    found = getattr(module, cls, None)
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Recipe)}
        hint = nearest(cls, (n for n, c in classes.items() if c is not Recipe))
        raise Refusal(f"{path}: it has no Recipe called {cls!r}{hint}")
    return found

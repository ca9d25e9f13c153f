"""One self-contained Python file out of classes of this package: each with the functions, constants and imports that it
needs and nothing else. What a user gets is the code that was trained and tested, not a second version of it."""

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from stillroom.settings import Refusal

DROPPED = "buildable"       # the decorator that writes constructor arguments down: an export has them in its config


def standalone(names: list[str]) -> str:
    """Source text in which all of `names` ("package.module:Class") are defined."""
    carried = Carried({name.split(":")[0].split(".")[0] for name in names} | {"stillroom"})
    for name in names:
        carried.add(*name.split(":"))
    lines = sorted(carried.imports, key=lambda line: (line.startswith("from"), line.lower()))
    return "\n".join(lines) + "\n\n\n" + "\n\n\n".join(carried.bodies) + "\n"


@dataclass
class Carried:
    packages: set[str]                                                  # whose code is carried; all else is imported
    imports: set[str] = field(default_factory=set)
    bodies: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)               # of every name that the file defines

    def add(self, module: str, name: str) -> None:
        """The definition and, before it, all that it names; imports are followed to where things are defined."""
        source, table = _parsed(module)
        if name not in table:
            raise Refusal(f"{module} defines no {name!r} at its top level, so it cannot be exported")
        node = table[name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._follow(module, node, name)
        elif self._is_new(name, module):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom) and str(inner.module).split(".")[0] in self.packages:
                    raise Refusal(f"{module}: '{ast.unparse(inner)}' within {name} cannot be carried into an export")
            used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            for other in sorted(used & table.keys() - {DROPPED}):
                self.add(module, other)
            self.bodies.append(_text(source, node))

    def _follow(self, module: str, node: ast.Import | ast.ImportFrom, name: str) -> None:
        alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
        home = alias.name if isinstance(node, ast.Import) else str(node.module)
        if home.split(".")[0] not in self.packages:
            if self._is_new(name, home):
                line = f"import {alias.name}" if isinstance(node, ast.Import) else f"from {home} import {alias.name}"
                self.imports.add(line + (f" as {alias.asname}" if alias.asname else ""))
        elif isinstance(node, ast.ImportFrom) and not node.level and alias.asname is None:
            self.add(home, name)
        else:
            raise Refusal(f"{module}: '{ast.unparse(node)}' cannot be carried into an export; import plain names")

    def _is_new(self, name: str, home: str) -> bool:
        if name not in self.origins:
            self.origins[name] = home
            return True
        if (known := self.origins[name]) != home:
            raise Refusal(f"{name} is one thing in {known} and another in {home}; an export is one file: rename one")
        return False


@cache
def _parsed(module: str) -> tuple[str, dict[str, ast.stmt]]:
    """The module's text, and its top-level statements by the names that they define."""
    found = importlib.util.find_spec(module)
    if found is None or not found.origin or not found.origin.endswith(".py"):
        raise Refusal(f"{module} is no Python file, so its classes cannot be exported; put them into a module")
    source, table = Path(found.origin).read_text(encoding="utf-8"), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            table[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                table |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            table |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
    return source, table


def _text(source: str, node: ast.stmt) -> str:
    decorators = getattr(node, "decorator_list", [])
    kept = [d for d in decorators if getattr(d, "id", "") != DROPPED]
    lines = source.splitlines()
    above = [line for d in kept for line in lines[d.lineno - 1 : d.end_lineno]]
    return "\n".join([*above, *lines[node.lineno - 1 : node.end_lineno]])

"""Modules that can be written down and built again: class name and constructor arguments, as JSON.

    @buildable
    class MLP(nn.Module): ...
    build(describe(MLP(dim=2)))       # the same architecture, new weights
"""

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stillroom.settings import Refusal, nearest

USERS = "stillroom_user_"
"""Before the name of a module that a user's file became."""

_known: dict[str, type] = {}


class NotImported(Refusal):
    """Of a class whose module is not there, and is not ours to import."""


def _name(cls: type) -> str:
    """The same, whether the user's file was given as FILE.py:CLASS or imported under its own name."""
    return f"{cls.__module__}:{cls.__qualname__}".removeprefix(USERS)


def buildable(cls):
    """Class decorator: remembers the constructor's arguments, so that `describe` can write them down.

    Works on modules and on frozen dataclasses (paths, latent spaces).
    """
    _known[_name(cls)] = cls
    if not issubclass(cls, nn.Module):
        return cls
    init, signature = cls.__init__, inspect.signature(cls.__init__)

    @functools.wraps(init)
    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            # Not through nn.Module.__setattr__: an argument that is a module would be registered twice.
            # The class's name too: sharding gives the module another class.
            self.__dict__["_built"] = _name(cls), dict(list(bound.arguments.items())[1:])

    cls.__init__ = remember
    return cls


def describe(thing: Any) -> Any:
    """JSON from which `build` makes the same architecture again (weights are not part of it)."""
    if isinstance(thing, nn.Module):
        if "_built" not in thing.__dict__:
            raise Refusal(
                f"{type(thing).__name__} cannot be written down: "
                "put @stillroom.nets.buildable on its class so that a product can be loaded again"
            )
        name, arguments = thing.__dict__["_built"]
        return {"class": name, "arguments": {k: describe(v) for k, v in arguments.items()}}
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing) if f.init}
        return {"class": _name(type(thing)), "arguments": fields}
    if isinstance(thing, torch.Tensor):
        return {"tensor": thing.tolist(), "dtype": str(thing.dtype).removeprefix("torch.")}
    if isinstance(thing, list | tuple):
        return [describe(x) for x in thing]
    if isinstance(thing, Mapping):
        return {"mapping": {k: describe(v) for k, v in thing.items()}}
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    raise Refusal(f"an argument of type {type(thing).__name__} cannot be written down as JSON")


def build(description: Any) -> Any:
    """The inverse of `describe`. Lists come back as tuples, which is what constructors take."""
    if isinstance(description, list):
        return tuple(build(x) for x in description)
    if not isinstance(description, Mapping):
        return description
    if "tensor" in description:
        return torch.tensor(description["tensor"], dtype=getattr(torch, description["dtype"]))
    if "mapping" in description:
        return {k: build(v) for k, v in description["mapping"].items()}
    return _find(description["class"])(**{k: build(v) for k, v in description["arguments"].items()})


def _find(name: str) -> type:
    """A buildable class by module and name. Only this package's own modules are imported for it: a file that is loaded
    must not choose what code runs."""
    name = name.removeprefix(USERS)
    module = name.partition(":")[0]
    if module.split(".")[0] == "stillroom":
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            raise Refusal(f"no module is called {module!r}; was this made by a newer stillroom?") from None
    if name not in _known:
        unknown = f"no buildable class is called {name!r}"
        if not {module, USERS + module} & set(sys.modules):
            raise NotImported(f"{unknown}: import {module} first")
        raise Refusal(unknown + nearest(name, _known))
    return _known[name]

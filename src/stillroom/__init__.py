"""Distils generative models: small codecs, latents that are easy to model, one-step generators.

    model = stillroom.load("runs/flow")                # what a run made
    stillroom.fit(MyRecipe, settings, data=(x, y))     # a run, from Python
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.nets import buildable
    from stillroom.settings import Images, Optimizer, Refusal, Run
    from stillroom.train import Average, Product, Recipe, Role, Stage, Turn, fit, load, load_product

_HOMES = {
    "stillroom.settings": ("Images", "Optimizer", "Refusal", "Run"),
    "stillroom.nets": ("buildable",),
    "stillroom.train": ("Average", "Product", "Recipe", "Role", "Stage", "Turn", "fit", "load", "load_product"),
}

__all__ = [
    "Average", "Images", "Optimizer", "Product", "Recipe", "Refusal", "Role", "Run", "Stage", "Turn", "buildable",
    "fit", "load", "load_product",
]


def __getattr__(name: str) -> Any:
    """Names are fetched when they are used: the command line starts without torch."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'stillroom' has no attribute {name!r}")

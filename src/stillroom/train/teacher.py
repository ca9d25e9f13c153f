"""Teachers by name: a closed-form mixture, one of our runs, or a diffusers folder. Frozen, and always a `Flow`."""

import re
from pathlib import Path

from stillroom.flows import Flow, Mixture
from stillroom.settings import Refusal
from stillroom.train.product import load_product

_RING = re.compile(r"ring:(\d+)(?::(\d+\.?\d*|\.\d+))?")


def open_teacher(spec: str) -> Flow:
    """`ring:MODES[:STD]`, a run or product folder, a diffusers folder, or a hub id."""
    if match := _RING.fullmatch(spec):
        modes, std = int(match[1]), float(match[2] or 0.15)
        if modes < 1 or std <= 0:
            raise Refusal(f"teacher {spec!r}: a ring needs at least one mode and a positive spread")
        return Flow(Mixture.ring(modes, std=std), (2,))
    path = Path(spec)
    if (path / "settings.toml").is_file() or (path / "product.json").is_file():
        product = load_product(path)
        if product.kind != "flow":
            raise Refusal(f"teacher {spec}: a product of kind {product.kind!r}, not a flow; see: stillroom train flow")
        return product.parts["flow"]  # pyright: ignore[reportReturnType]
    from stillroom.flows.folders import from_diffusers

    return from_diffusers(spec).requires_grad_(False).eval()

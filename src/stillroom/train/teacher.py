"""Teachers by name, frozen: flows (a closed-form mixture, one of our runs, a diffusers folder) and codecs."""

import re
from pathlib import Path
from typing import Any

from stillroom.codecs import Codec
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
    if is_ours(Path(spec)):
        return part_of(spec, "flow")
    from stillroom.flows.folders import from_diffusers

    return frozen(from_diffusers(spec))


BUNDLED = Path(__file__).parents[1] / "codecs" / "bundled"
"""A product that comes with the package: trained by `stillroom train codec --preset bundled`."""


def open_codec(spec: str) -> Codec:
    """`bundled`, a run or product folder, a TAESD weight file, a diffusers folder, or a hub id."""
    path = BUNDLED if spec == "bundled" else Path(spec)
    if is_ours(path):
        return part_of(path, "codec")
    if path.suffix.lower() in (".safetensors", ".pth"):
        from stillroom.codecs.taesd import from_taesd

        return frozen(from_taesd(path))
    from stillroom.codecs.folders import from_diffusers

    return frozen(from_diffusers(spec))


def frozen(module):
    return module.requires_grad_(False).eval()


def is_ours(path: Path) -> bool:
    return (path / "settings.toml").is_file() or (path / "product.json").is_file()


def part_of(place: Path | str, kind: str) -> Any:
    """The one part that a product of this kind is about."""
    product = load_product(place)
    if product.kind != kind:
        raise Refusal(f"teacher {place}: a product of kind {product.kind!r}, not a {kind}; see: stillroom train {kind}")
    return product.parts[kind]

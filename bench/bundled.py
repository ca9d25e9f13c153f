"""Packs a finished run of `stillroom train codec --preset bundled` as the codec that comes with the package: in half
precision, its card with what it reconstructs of every held-out photograph beside the linear code of the same size.

    stillroom train codec --preset bundled --out RUN && python bench/bundled.py RUN
"""

import sys
from pathlib import Path

import torch

from stillroom.codecs import Codec, fit_klt
from stillroom.data import CREDITS, open_source, pictures, sample
from stillroom.measure import as_8bit, psnr
from stillroom.recipes.codec import Settings
from stillroom.settings import from_mapping, read_toml
from stillroom.train import Product, load_product
from stillroom.train.product import save_product
from stillroom.train.teacher import BUNDLED

LIMIT = 4_000_000       # bytes


def decibels(codec: Codec, data: str) -> dict[str, float]:
    """Of every picture at its own size, as a file would hold it."""
    with torch.inference_mode():
        return {name: round(float(psnr(as_8bit(codec.reconstruct(x[None])), x[None])[0]), 2)
                for name, x in pictures(data)}


def main(run: Path) -> None:
    product = load_product(run)
    half: Codec = product.parts["codec"].half()         # pyright: ignore
    values = read_toml(run / "settings.toml")
    values.pop("recipe")
    settings = from_mapping(Settings, values, str(run))
    codec: Codec = load_product(run).parts["codec"]     # pyright: ignore
    codec.load_state_dict(half.state_dict())            # what a user gets: rounded weights in float32
    linear = fit_klt(sample(open_source(settings), 2048, 0).x, codec.space.factor, codec.space.channels)
    mine, klt = decibels(codec, "photos:test"), decibels(linear, "photos:test")
    card = {
        **product.card, "PSNR in dB, held-out photographs": mine, "PSNR in dB, KLT of the same size": klt,
        "licence": "Apache-2.0; trained on pictures that must be credited", "steps": settings.steps,
        "credits": [str(c) for c in CREDITS if c.split == "train"],
        "command": "stillroom train codec --preset bundled --out RUN && python bench/bundled.py RUN",
    }
    save_product(Product("codec", {"codec": half}, card), BUNDLED)
    size = sum(file.stat().st_size for file in BUNDLED.iterdir())
    print(f"{BUNDLED}: {size:,} bytes\n" + "\n".join(f"{n}: {mine[n]:.2f} dB, KLT {klt[n]:.2f} dB" for n in mine))
    if size > LIMIT or any(mine[name] <= klt[name] for name in mine):
        sys.exit("not fit to be shipped: too large, or no better than the linear code")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

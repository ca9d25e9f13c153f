"""Previews as PNG files: image grids, and clouds of points."""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

SMALLEST = 48
"""Pixels that a small image is enlarged to, so that an 8x8 digit can be seen."""


def grid(images: Tensor, columns: int = 0, border: int = 2, smallest: int = SMALLEST) -> Image.Image:
    """[N, C, H, W] in [-1, 1] -> one picture; whole-number nearest enlargement, a white border between images."""
    n, _, h, w = images.shape
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    factor = max(1, math.ceil(smallest / min(h, w)))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    h, w = h * factor, w * factor
    sheet = np.full((rows * (h + border) + border, columns * (w + border) + border, 3), 255, np.uint8)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        r, c = divmod(i, columns)
        tile = image.repeat(factor, 0).repeat(factor, 1)
        top, left = border + r * (h + border), border + c * (w + border)
        sheet[top : top + h, left : left + w] = tile
    return Image.fromarray(sheet)


def cloud(points: Tensor, size: int = 480) -> Image.Image:
    """[N, 2] points in a square that holds them all, as dots of additive ink."""
    xy = points.detach().float().cpu().numpy()
    reach = 1.05 * max(float(np.abs(xy).max()), 1e-6)
    bins, _, _ = np.histogram2d(-xy[:, 1], xy[:, 0], bins=size // 3, range=[[-reach, reach], [-reach, reach]])
    ink = np.clip(255 - 110 * bins, 0, 255).astype(np.uint8)
    return Image.fromarray(ink).resize((size, size), Image.Resampling.NEAREST)


def save_preview(folder: Path, step: int, pictures: dict[str, Tensor]) -> None:
    for name, x in pictures.items():
        folder.mkdir(parents=True, exist_ok=True)
        image = grid(x) if x.ndim == 4 else cloud(x)
        image.save(folder / f"step-{step:08d}-{name}.png")

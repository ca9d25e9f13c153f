"""Previews as pictures: image grids, and clouds of points."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = Any  # a torch tensor on any device, or whatever numpy takes


def array(x: Array) -> np.ndarray:
    """Tensors and arrays alike, without importing torch to draw."""
    return np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def grid(images: Array, columns: int = 0, tile: int = 48, gap: int = 2) -> Image.Image:
    """[N, 1 or 3, H, W] in [-1, 1] -> one picture. Small images grow by whole factors to at least `tile` pixels; gaps
    are clear; pixels that are not finite are magenta."""
    x = array(images)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(f"images have shape {list(x.shape)}; a grid shows [N, 1 or 3, H, W] with N > 0")
    x = np.broadcast_to(x, (len(x), 3, *x.shape[2:])).transpose(0, 2, 3, 1)  # -> [N, H, W, 3]
    colours = np.rint((np.nan_to_num(x).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    colours[~np.isfinite(x).all(-1)] = (255, 0, 255)
    factor = max(1, math.ceil(tile / min(x.shape[1:3])))
    colours = colours.repeat(factor, 1).repeat(factor, 2)
    count, high, wide, _ = colours.shape
    columns = columns or math.ceil(math.sqrt(count))
    lines = math.ceil(count / columns)
    sheet = np.zeros((lines * (high + gap) - gap, columns * (wide + gap) - gap, 4), np.uint8)
    for i, picture in enumerate(colours):
        top, left = i // columns * (high + gap), i % columns * (wide + gap)
        sheet[top : top + high, left : left + wide, :3] = picture
        sheet[top : top + high, left : left + wide, 3] = 255
    return Image.fromarray(sheet)


def cloud(points: Array, size: int = 480) -> Image.Image:
    """[N, 2] points as dots of ink. The window grows by halves of a doubling, so that most steps share one."""
    xy = array(points)
    xy = xy[np.isfinite(xy).all(1)]
    farthest = float(np.abs(xy).max()) if len(xy) else 1.0
    reach = 2 ** (math.ceil(2 * math.log2(max(1.05 * farthest, 1e-6))) / 2)
    counts, _, _ = np.histogram2d(-xy[:, 1], xy[:, 0], bins=size // 3, range=[[-reach, reach], [-reach, reach]])
    ink = np.clip(255 - 110 * counts, 0, 255).astype(np.uint8)
    return Image.fromarray(ink).resize((size, size), Image.Resampling.NEAREST)


def preview(x: Array) -> Image.Image | None:
    """Images and points as they are; of latents the first three channels, of longer points the first two coordinates;
    of anything else, tokens above all, nothing."""
    if x.ndim == 4:
        return grid(x if x.shape[1] in (1, 3) else x[:, : 1 if x.shape[1] == 2 else 3])
    return cloud(x[:, :2]) if x.ndim == 2 and x.shape[1] >= 2 else None


def save_previews(folder: Path, step: int, pictures: Mapping[str, Array]) -> None:
    for name, x in pictures.items():
        if (drawn := preview(x)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            drawn.save(folder / f"step-{step:08d}-{name}.png")

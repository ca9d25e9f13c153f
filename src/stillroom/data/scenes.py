"""Procedural pictures: dead leaves (the statistics of natural images) and simple labelled shapes.

A scene is drawn once as continuous parameters from its index, then rendered at any size: coverage of a pixel is the
signed distance to the edge in pixels, clipped, which is clean at 32 pixels and the same scene at 512. A `window` of
the scene can be drawn in its place.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillroom.data.batch import Batch
from stillroom.data.discs import Discs, as_levels, paint
from stillroom.data.images import Shelf, Shrink
from stillroom.settings import Refusal, nearest

TEST = 10**9                # test scenes are counted from here: no index is in both splits
LEAVES = 130
SIDE = 512                  # pixels that a scene is said to have where a law of cropping asks


class Window(NamedTuple):
    """A square of a scene; the whole scene is 1 x 1."""

    left: float
    top: float
    side: float


WHOLE = Window(0, 0, 1)


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y                                                                     # [S, S] each, in (0, 1)


_THIRDS = np.array([0, 1 / 3, 2 / 3], np.float32)


def _colour(hue, saturation, value) -> np.ndarray:
    """[3] of three numbers, [L, 3] of three columns."""
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hue - _THIRDS), dtype=np.float32)
    return value * (1 - saturation + saturation * wheel)


def _bar(x, y, a: float, b: float):
    return np.maximum(np.abs(x) - a, np.abs(y) - b)


def _polygon(x, y, corners: int, inner: float):
    """A regular polygon or star with its corners on the unit circle; `inner` is the inner corners' radius."""
    step = np.pi / corners
    angle = np.abs((np.arctan2(x, -y) + step) % (2 * step) - step)                  # folded onto half a spike
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle) - 1, radius * np.sin(angle)                     # from the spike's tip
    ex, ey = inner * np.cos(step) - 1, inner * np.sin(step)                         # edge: tip to inner corner
    return (px * ey - py * ex) / np.float32(np.hypot(ex, ey))


def _disc(x, y):
    return np.hypot(x, y) - 0.9


def _square(x, y):
    return _bar(x, y, 0.78, 0.78)


def _triangle(x, y):
    return _polygon(x, y, 3, 0.5)


def _ring(x, y):
    return np.abs(np.hypot(x, y) - 0.72) - 0.24


def _cross(x, y):
    return np.minimum(_bar(x, y, 1, 0.32), _bar(x, y, 0.32, 1))


def _star(x, y):
    return _polygon(x, y, 5, 0.42)


def _crescent(x, y):
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))


def _stripes(x, y):
    return np.maximum(_bar(x, y, 0.9, 0.9), np.abs((x + 0.9) % 0.72 - 0.18) - 0.18)


SHAPES: dict[str, Callable] = {
    "disc": _disc, "square": _square, "triangle": _triangle, "ring": _ring,
    "cross": _cross, "star": _star, "crescent": _crescent, "stripes": _stripes,
}
_EDGES = tuple(SHAPES.values())


def shapes(index: int, size: int, window: Window = WHOLE) -> Tensor:
    """uint8 [3, size, size]: one shape of class index % 8 on a shaded ground."""
    u = np.random.default_rng((1, index)).random(16).tolist()
    x, y = (g * np.float32(window.side) + np.float32(edge) for g, edge in zip(_grid(size), window[:2], strict=True))
    radius = 0.2 + 0.16 * u[0]
    margin = radius + 0.02
    cx, cy = margin + (1 - 2 * margin) * u[1], margin + (1 - 2 * margin) * u[2]
    cos, sin = np.cos(2 * np.pi * u[3]) / radius, np.sin(2 * np.pi * u[3]) / radius
    qx, qy = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin       # the shape's own frame
    cover = np.clip(0.5 - _EDGES[index % len(SHAPES)](qx, qy) * (radius * size / window.side), 0, 1)
    # Light on dark or dark on light, hues at least a sixth of the wheel apart.
    light, dark = 0.8 + 0.2 * u[4], 0.15 + 0.25 * u[5]
    top, ground = (light, dark) if u[6] < 0.5 else (dark, light)
    hue = u[7]
    other = hue + 1 / 6 + 2 / 3 * u[8]
    ink = _colour(other, 0.55 + 0.45 * u[9], top)[:, None, None]
    near = _colour(hue, 0.3 + 0.6 * u[10], ground)[:, None, None]
    far = _colour(hue + 0.2 * (u[11] - 0.5), 0.3 + 0.6 * u[12], ground * (0.7 + 0.6 * u[13]))[:, None, None]
    slope = np.cos(2 * np.pi * u[14]) * (x - 0.5) + np.sin(2 * np.pi * u[14]) * (y - 0.5) + 0.5
    back = near + slope * (far - near)                                              # [3, S, S]
    shade = 1 + 0.18 * qy
    return torch.from_numpy(as_levels(back + cover * (ink * shade - back)))


def leaves(index: int, size: int, window: Window = WHOLE) -> Tensor:
    """uint8 [3, size, size]: discs whose radii follow r^-3, back to front, shaded, some striped."""
    rng = np.random.default_rng((2, index))
    small, large = 0.05, 0.45
    radii = (small**-2 - rng.random(LEAVES) * (small**-2 - large**-2)) ** -0.5
    centres = rng.random((LEAVES, 2)) * 1.2 - 0.1
    hues, palette = rng.normal(0, 0.04, LEAVES), rng.random(4)                      # a few hues for each picture
    hues += palette[rng.integers(0, len(palette), LEAVES)]
    u = rng.random((LEAVES, 6))
    inks = _colour(hues[:, None], 0.25 + 0.7 * u[:, 4:5], 0.2 + 0.75 * u[:, 5:])    # [L, 3]
    left, top, side = window
    zoom = size / side                                                              # pixels per scene
    turn, wave = 2 * math.pi * u[:, 0], (0.1 + 0.15 * u[:, 3]) * zoom
    # np.sinc is the average of the wave over a pixel: fine stripes fade at low sizes and never alias.
    depth = np.where((u[:, 2] < 0.3) & (radii > 0.08), 0.25 * np.sinc(1 / wave), 0)
    rows = np.stack([
        (centres[:, 0] - left) * zoom, (centres[:, 1] - top) * zoom, radii * zoom, np.cos(turn), np.sin(turn),
        0.3 * u[:, 1] / (radii * zoom), depth, 2 * math.pi / wave, *inks.T,
    ])
    ground = [0, 0, np.inf, 1, 0, 0, 0, 0, *_colour(palette[0], 0.4, 0.5)]
    front = np.column_stack([rows[:, ::-1], ground]).astype(np.float32)             # [11, L + 1], the last drawn first
    return torch.from_numpy(paint(Discs(*front[:8], ink=front[8:]), size))


KINDS: dict[str, tuple[Callable[[int, int, Window], Tensor], tuple[str, ...] | None]] = {
    "shapes": (shapes, tuple(SHAPES)), "leaves": (leaves, None),
}


class Scenes:
    """Procedural pictures as a source; rendered on first use and kept while the set fits in memory.

    With `shrink` an item is a random square of its scene, as if the scene were a photograph of SIDE pixels: drawn
    anew in every epoch.
    """

    def __init__(
        self, kind: str, size: int, count: int = 10_000, split: str = "train", flip: bool = False,
        shrink: tuple[float, float] | None = None,
    ):
        if kind not in KINDS:
            raise Refusal(f"no scenes are called {kind!r}{nearest(kind, KINDS)}")
        if not 1 <= count < TEST or size < 4:
            raise Refusal(f"{kind}: {count} scenes of {size} pixels; give 1 to {TEST - 1} of at least 4")
        self._draw, self.classes = KINDS[kind]
        self.name, self.shape, self.flip = f"{kind}:{split}", (3, size, size), flip
        self.law = Shrink(size, *shrink) if shrink else None
        self._count, self._first = count, TEST if split == "test" else 0
        self._shelf = Shelf(count, self.shape, keep=shrink is None)

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        rows, x = self._shelf.shown(indices, key, self._make, self.flip)
        return Batch(x, None if self.classes is None else (rows + self._first) % len(self.classes))

    def _make(self, index: int, u: Sequence[float]) -> Tensor:
        side = self.law.side(SIDE, u[3]) / SIDE if self.law else 1
        return self._draw(self._first + index, self.shape[-1], Window(u[0] * (1 - side), u[1] * (1 - side), side))

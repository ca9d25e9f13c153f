"""Opaque discs, front to back, as a picture.

The picture is cut into tiles; discs that miss a tile, or lie wholly behind another there, are left out of it. What
remains is taken as a list of (tile, disc) pairs, so that the number of numpy calls does not grow with the discs:
at 32 pixels the calls themselves are what drawing costs.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 128                 # pixels painted at once: what that takes stays in cache and is used again


class Discs(NamedTuple):
    """The nearest first. All lengths are in pixels; the last one is the ground, of infinite radius."""

    x: np.ndarray           # [L] centre
    y: np.ndarray
    radius: np.ndarray
    cos: np.ndarray         # of the direction in which the disc is shaded and striped
    sin: np.ndarray
    slope: np.ndarray       # of the shade, per pixel along that direction
    depth: np.ndarray       # of the stripes; 0 for most
    wave: np.ndarray        # of the stripes: radians per pixel
    ink: np.ndarray         # [3, L]


def paint(discs: Discs, size: int) -> np.ndarray:
    """uint8 [3, size, size]. A disc's share of a pixel is the signed distance to its edge, clipped."""
    picture, block = np.empty((3, size, size), np.uint8), min(size, BLOCK)
    for top in range(0, size, block):
        for left in range(0, size, block):
            seen = _block(discs._replace(x=discs.x - left, y=discs.y - top), block)
            picture[:, top:top + block, left:left + block] = seen[:, :size - top, :size - left]
    return picture


def _block(discs: Discs, size: int) -> np.ndarray:
    """uint8 [3, size, size], the upper left corner of the picture."""
    tile = 8 if size <= 64 else 16                              # the fastest measured; 32 costs up to a half more
    n = -(-size // tile)
    inner, outer = np.where(discs.radius > 0.5, (discs.radius - 0.5) ** 2, -1), (discs.radius + 0.5) ** 2
    home, disc = _pairs(discs, inner, outer, tile, n)           # [N] each, sorted by tile, then front to back
    count, begin = len(disc), _starts(home)

    steps = np.arange(tile, dtype=np.float32)[:, None] + 0.5
    top, left = np.multiply(np.divmod(home, n), tile, dtype=np.float32)                             # [N]
    dx, dy = left + steps - discs.x[disc], top + steps - discs.y[disc]                              # [t, N]
    far2 = ((dy * dy)[:, None] + (dx * dx)[None]).reshape(-1, count)                                # [t t, N]
    order = np.arange(count, dtype=np.int32)
    full = np.where(far2 <= inner[disc], order, count)
    first = np.minimum.reduceat(full, begin, axis=1)            # [t t, T]: the nearest that fills the whole pixel
    edge = np.flatnonzero((far2 < outer[disc]) & (order < first[:, home]))      # parts of pixels, in front of that

    across, down = discs.cos[disc] * dx, discs.sin[disc] * dy   # [t, N]: their sum runs along the shade
    rows = np.arange(tile) * count                              # of `across` and `down`, laid flat
    ground = first.reshape(tile, tile, -1).astype(np.intp)      # [t, t, T]
    along = across.take(ground + rows[:, None])
    along += down.take(ground + rows[:, None, None])
    canvas = _shaded(discs, disc, ground.ravel(), along.ravel())                                # [3, t t T]
    if len(edge):
        place, pair = np.divmod(edge, count)
        along = across.take(rows[place % tile] + pair) + down.take(rows[place // tile] + pair)
        cover = (0.5 + discs.radius[disc[pair]] - np.sqrt(far2.take(edge))).clip(0, 1)
        _lay(canvas, place * (n * n) + home[pair], cover, _shaded(discs, disc, pair, along))
    levels = as_levels(canvas).reshape(3, tile, tile, n, n).transpose(0, 3, 1, 4, 2)
    return levels.reshape(3, n * tile, n * tile)[:, :size, :size]


def _pairs(discs: Discs, inner: np.ndarray, outer: np.ndarray, tile: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(tile, disc) [N] each: those that touch the tile and do not lie behind one that fills it."""
    middles, half = (np.arange(n, dtype=np.float32)[:, None] + 0.5) * tile, (tile - 1) / 2
    ax, ay = np.abs(discs.x - middles), np.abs(discs.y - middles)                               # [n, L]
    nearest = (np.maximum(ax - half, 0) ** 2)[None] + (np.maximum(ay - half, 0) ** 2)[:, None]  # [n, n, L]
    farthest = ((ax + half) ** 2)[None] + ((ay + half) ** 2)[:, None]
    last = (farthest <= inner).argmax(-1)                                                       # [n, n]
    seen = (nearest < outer) & (np.arange(len(discs.x)) <= last[..., None])
    home, disc = np.nonzero(seen.reshape(n * n, -1))
    return home, disc


def _shaded(discs: Discs, disc: np.ndarray, pair: np.ndarray, along: np.ndarray) -> np.ndarray:
    """[3, M]: the colours of M pixels, each of the disc of its pair."""
    shade = discs.slope[disc].take(pair)
    shade *= along              # in place: at 512 pixels fresh memory costs more than the sums
    shade += 1
    striped = np.flatnonzero((discs.depth[disc] != 0).take(pair))
    of = disc[pair[striped]]
    shade[striped] += discs.depth[of] * np.sin(along[striped] * discs.wave[of])
    colours = discs.ink[:, disc].take(pair, axis=1)
    colours *= shade
    return colours


def _lay(canvas: np.ndarray, place: np.ndarray, cover: np.ndarray, colours: np.ndarray) -> None:
    """Over the pixels at `place` (sorted, those of one pixel front to back), in one sum for all: what is seen of each
    is its cover times what those before it let through."""
    begin = _starts(place)
    let = np.log(np.maximum(1 - cover, 1e-6), dtype=np.float64)
    before = np.cumsum(let) - let
    before -= np.repeat(before[begin], np.diff(begin, append=len(place)))
    seen = (cover * np.exp(before)).astype(np.float32)
    left = np.exp(np.add.reduceat(let, begin)).astype(np.float32)
    at = place[begin]
    canvas[:, at] = canvas[:, at] * left + np.add.reduceat(seen * colours, begin, axis=1)


def as_levels(canvas: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, in the array's own memory as far as it goes."""
    canvas *= 255
    canvas += 0.5
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _starts(runs: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.diff(runs, prepend=-1))

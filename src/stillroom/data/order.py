"""Which items step k takes, and every draw an augmentation makes: pure functions of the seed and a few integers."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stillroom.settings import seed_of


def _scramble(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of 64 bits in which every input bit flips each output bit half the time."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _absorb(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    return _scramble((state ^ word) + np.uint64(0x9E3779B97F4A7C15))


def _words(numbers) -> np.ndarray:
    return np.array([int(n) & 0xFFFFFFFFFFFFFFFF for n in numbers], dtype=np.uint64)


def uniforms(indices: Sequence[int], key: int, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each index, float64 [B, count]: a pure function of (index, key)."""
    state = _absorb(np.full(len(indices), seed_of(key), np.uint64), _words(indices))             # [B]
    draws = _absorb(state[:, None], np.arange(count, dtype=np.uint64)[None])                     # [B, count]
    return torch.from_numpy((draws >> np.uint64(11)).astype(np.float64) / 2.0**53)


def mirror(x: Tensor, draw: Tensor) -> Tensor:
    """Turns the images left to right whose draw is below 1/2."""
    return torch.where((draw < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)


@lru_cache(maxsize=4)  # a batch touches two epochs at most unless the set is tiny; 8 bytes per item each
def permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def runs(count: int, seed: int, first: int, length: int) -> list[tuple[int, list[int]]]:
    """The items at positions [first, first + length) as (epoch, indices) pieces; each epoch has its own permutation."""
    pieces = []
    while length > 0:
        epoch, offset = divmod(first, count)
        taken = min(length, count - offset)
        pieces.append((epoch, permutation(count, seed, epoch)[offset:offset + taken].tolist()))
        first, length = first + taken, length - taken
    return pieces


def indices(count: int, seed: int, step: int, batch: int) -> list[int]:
    """The global batch of one step. Position p = step * batch + i lies in epoch p // count."""
    return [i for _, piece in runs(count, seed, step * batch, batch) for i in piece]

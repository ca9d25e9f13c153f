"""Several sources as one."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np
import torch

from stillroom.data.batch import Batch, Source, named
from stillroom.data.latents import Encoding
from stillroom.settings import Refusal, seed_of

LARGEST = 5 * 10**7         # items of an epoch; twelve bytes are kept for each


class Mixed:
    """Items of several sources, spread evenly by their shares: any run of indices holds them in proportion.

    An epoch is long enough that every source is seen whole. One that is smaller than its share comes round again
    within the epoch, with augmentations of its own. Labels are kept where all sources have the same classes.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float] | None = None, name: str | None = None):
        shares = [1.0] * len(sources) if shares is None else list(shares)
        if not sources or len(shares) != len(sources) or not all(0 < s < float("inf") for s in shares):
            raise Refusal(f"{name or 'mixture'}: {len(sources)} sources in shares of {shares}; give each one above 0")
        self.sources, self.name = list(sources), name or "+".join(s.name for s in sources)
        self.shape, self.classes = sources[0].shape, sources[0].classes
        for other in sources[1:]:
            if other.shape != self.shape:
                raise Refusal(f"{self.name}: {sources[0].name} holds {list(self.shape)} and {other.name} "
                              f"{list(other.shape)}; sources that are mixed must have one shape")
            if other.classes != self.classes:
                self.classes = None
        self.encoding = shared_encoding(self.sources, self.name)
        self.credits = tuple(c for s in sources for c in getattr(s, "credits", ()))
        self.in_memory = all(getattr(s, "in_memory", False) for s in sources)
        epoch = max(len(s) / share for s, share in zip(sources, shares, strict=True))
        counts = [round(epoch * share) for share in shares]
        if sum(counts) > LARGEST:
            raise Refusal(f"{self.name}: to see every source whole at these shares takes {sum(counts):,} items, more "
                          f"than {LARGEST:,}; bring the shares nearer to the sources' sizes")
        self._lengths = np.array([len(s) for s in sources])
        self._which, self._item = _spread(counts)

    def __len__(self) -> int:
        return len(self._which)

    def stamp(self) -> str:
        return "; ".join(named(source) for source in self.sources)

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        places = np.asarray(indices, np.int64)
        which = self._which[places]
        rounds, items = np.divmod(self._item[places], self._lengths[which])
        x = torch.empty(len(which), *self.shape)
        y = torch.empty(len(which), dtype=torch.int64)
        for number, again in sorted(set(zip(which.tolist(), rounds.tolist(), strict=True))):
            own = np.flatnonzero((which == number) & (rounds == again))
            batch = self.sources[number].fetch(items[own].tolist(), seed_of(key, again) if again else key)
            x[own] = batch.x
            if self.classes is not None and batch.y is not None:
                y[own] = batch.y
        return Batch(x, None if self.classes is None else y)


def shared_encoding(sources: Sequence[Source], name: str) -> Encoding | None:
    """None of pictures. Latents of two codecs are numbers of one shape, and two languages."""
    encodings: list[Encoding | None] = [getattr(source, "encoding", None) for source in sources]
    first = encodings[0]
    for source, encoding in zip(sources, encodings, strict=True):
        if encoding != first:
            how = (f"their latents were made otherwise: {first.differences(encoding)}" if first and encoding else
                   "one holds latents, the other pictures")
            raise Refusal(f"{name}: {sources[0].name} and {source.name} cannot be mixed: {how}")
    return first


def _spread(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, item of it) of every place: the j-th of n items belongs (j + 1/2) / n along the way."""
    along = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    order = np.argsort(along, kind="stable")
    which = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
    return which, np.concatenate([np.arange(n) for n in counts])[order]


def mixture(spec: str, known: Callable[[str], bool]) -> list[tuple[float, str]]:
    """`0.6*photos+0.4*leaves` as [(0.6, 'photos'), (0.4, 'leaves')]. A name that holds a plus itself is not taken
    apart where it is `known`."""
    if known(spec):
        return [(1.0, spec)]
    pieces, out = spec.split("+"), []
    while pieces:
        for length in range(len(pieces), 0, -1):
            weight, name = _weighed("+".join(pieces[:length]), known)
            if known(name) or length == 1:
                break
        out.append((weight, name))
        pieces = pieces[length:]
    return out


def mixed_name(parts: Sequence[tuple[float, str]]) -> str:
    """What `mixture` takes apart."""
    return "+".join(name if share == 1 else f"{Decimal(repr(share)):f}*{name}" for share, name in parts)


def _weighed(piece: str, known: Callable[[str], bool]) -> tuple[float, str]:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*\*(.+)", piece)
    return (1.0, piece.strip()) if match is None or known(piece) else (float(match[1]), match[2].strip())

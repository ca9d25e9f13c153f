"""Pictures of any size, tile by tile, in the memory of one tile.

A net of finite reach answers exactly as it does untiled: tiles read over their edges by that reach and are cut back,
and their origins lie on the latents' grid. Norms over the picture, attention and pooled statistics reach everywhere:
their tiles overlap and are blended linearly, and how visible the seams are depends on the net.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from stillroom.codecs.bits import InBfloat16
from stillroom.codecs.codec import Codec, checked

BOUND = 128     # latents: what is felt further than half of this counts as felt everywhere
OVERLAP = 0.25  # of a tile's side, where tiles are blended


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in latents: it reads [start, stop), and its answer counts with `weight` from `first`."""

    start: int
    stop: int
    first: int
    weight: Tensor


def exact_spans(length: int, side: int, margin: int) -> list[Span]:
    """Tiles that meet edge to edge and read over their edges by the margin."""
    count = -(-length // side)
    cuts = [length * i // count for i in range(count + 1)]
    return [Span(max(a - margin, 0), min(b + margin, length), a, torch.ones(b - a)) for a, b in pairwise(cuts)]


def blended_spans(length: int, side: int) -> list[Span]:
    """Tiles of one side that overlap; their weights are ramps that sum to 1 at every latent."""
    side = min(side, length)
    overlap = max(1, round(side * OVERLAP))
    count = 1 if length == side else -(-(length - side) // max(1, side - overlap)) + 1
    starts = [0] if count == 1 else [(length - side) * i // (count - 1) for i in range(count)]
    place = torch.arange(side) + 0.5
    # The outermost quarter of an overlap feels the tile's own padding: it counts only where no other tile reaches.
    ramp = (torch.minimum(place, side - place) - overlap / 4).clamp(1e-6 * overlap, 0.75 * overlap)
    total = torch.zeros(length)
    for a in starts:
        total[a : a + side] += ramp
    return [Span(a, a + side, a, ramp / total[a : a + side]) for a in starts]


def tiled(net: Callable[[Tensor], Tensor], x: Tensor, step: int, side: int, margin: int | None) -> Tensor:
    """net(x), asked in tiles of `side` latents; `step` positions of x make a latent, and the last may be cut short.
    The margin in latents, or None for a net that sees everything."""
    height, width = (-(-n // step) for n in x.shape[-2:])
    if max(height, width) <= side:
        return net(x)
    rows, columns = (blended_spans(n, side) if margin is None else exact_spans(n, side, margin)
                     for n in (height, width))
    out = None
    for row in rows:
        for column in columns:
            part = net(x[..., row.start * step : row.stop * step, column.start * step : column.stop * step])
            scale = part.shape[-1] // (column.stop - column.start)      # 1 for latents, the factor for pictures
            if out is None:
                out = part.new_zeros(*part.shape[:-2], height * scale, width * scale)
            _add(out, part, row, column, scale)
    assert out is not None
    return out


def _add(out: Tensor, part: Tensor, row: Span, column: Span, scale: int) -> None:
    (top, down), (left, across) = ((s.first * scale, s.weight.repeat_interleave(scale).to(part)) for s in (row, column))
    y, x = top - row.start * scale, left - column.start * scale
    part = part[..., y : y + len(down), x : x + len(across)]
    out[..., top : top + len(down), left : left + len(across)].add_(part * (down[:, None] * across))


def reach(net: Callable[[Tensor], Tensor], noise: Callable[[int, int], Tensor]) -> int | None:
    """How many latents away a cut is felt in the net's answer; None when it is felt everywhere.

    `noise(h, w)` is an input that covers h x w latents. A strip is answered whole and cut in two, which changes all
    that tiling changes: what lies beyond, and the padding of every layer. Measured: a declared one may be wrong.
    """
    felt = []
    for lying in (False, True):
        side, distance = 16, None
        while distance is None and side <= BOUND:
            distance = _felt(net, noise(4, side) if lying else noise(side, 4), -1 if lying else -2, side)
            side *= 2
        if distance is None:
            return None
        felt.append(distance)
    return max(felt) + 1        # one more for tails below the tolerance


def _felt(net: Callable[[Tensor], Tensor], x: Tensor, axis: int, side: int) -> int | None:
    def answers(x: Tensor, latents: int) -> Tensor:     # [latents, everything of one latent]
        y = net(x).movedim(axis, 0)
        return y.reshape(latents, -1, *y.shape[1:]).flatten(1)

    half, whole = side // 2, answers(x, side)
    tolerance = 32 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    first, second = x.tensor_split(2, axis)
    after = (answers(second, half) - whole[half:]).abs().amax(1) > tolerance
    before = ((answers(first, half) - whole[:half]).abs().amax(1) > tolerance).flip(0)
    distance = max(int(far.nonzero().max()) + 1 if far.any() else 0 for far in (before, after))
    return distance if distance < half - 1 else None


class Tiled:
    """A codec that encodes and decodes in tiles of `side` pixels, without gradients; a net of finite reach sees that
    reach more on every side, and its answers are the untiled ones to rounding."""

    def __init__(self, codec: Codec, side: int = 512):
        self.codec, self.space, self.device = codec, codec.space, codec.device
        self.side = max(1, side // codec.space.factor)
        self._margins: dict[str, int | None] = {}

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        x = checked(x)
        side, f = self.side, self.space.factor
        margin = self.margin("encoder") if max(x.shape[-2:]) > side * f else 0
        return _joined([tiled(self.codec.encode, one, f, side, margin) for one in x.split(1)])

    @torch.no_grad()
    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        margin = self.margin("decoder") if max(z.shape[-2:]) > self.side else 0
        x = _joined([tiled(self.codec.decode, one, 1, self.side, margin) for one in z.split(1)])
        return x if size is None else x[..., : size[0], : size[1]]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), (x.shape[-2], x.shape[-1])).clamp_(-1, 1)

    def margin(self, half: str) -> int | None:
        """Of the encoder or decoder, in latents; measured once."""
        if half not in self._margins:
            self._margins[half] = margins(self.codec)[half]()
        return self._margins[half]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)        # cat would copy a picture of 200 MB


def margins(codec: Codec) -> dict[str, Callable[[], int | None]]:
    """How far each half reaches, in latents, when asked. In float32: a coarser type's rounding would be felt too."""
    space, random = codec.space, torch.Generator().manual_seed(0)

    def of(half: nn.Module, noise: Callable[[int, int], Tensor]) -> int | None:
        if hasattr(half, "places"):             # it takes one size alone, so that there are no tiles of it
            return None
        exact = half.net if isinstance(half, InBfloat16) else half
        weight = next(chain(exact.parameters(), exact.buffers()), torch.zeros(()))
        if weight.dtype != torch.float32:
            exact = copy.deepcopy(exact).float()
        with torch.no_grad():
            return reach(exact, lambda h, w: noise(h, w).to(weight.device))

    def pixels(h: int, w: int) -> Tensor:
        return codec.into_range(torch.rand(1, 3, h * space.factor, w * space.factor, generator=random) * 2 - 1)

    def latents(h: int, w: int) -> Tensor:
        return space.denormalise(torch.randn(1, space.channels, h, w, generator=random))

    return {"encoder": lambda: of(codec.encoder, pixels), "decoder": lambda: of(codec.decoder, latents)}

"""Encoded pictures in, uint8 squares out. Whatever a file claims to be, it becomes RGB or an `Unreadable`."""

import io
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stillroom.data.batch import Batch
from stillroom.data.order import mirror, uniforms
from stillroom.data.tables import Rows
from stillroom.settings import Refusal

PIXEL_LIMIT = 178_000_000   # more is taken for a decompression bomb; Pillow itself refuses a little above
MEMORY_LIMIT = 2**30        # bytes of squares, or of decoded pictures, that a source keeps
ENOUGH = 100                # pictures seen before they are judged by how many of them are bad
# Named one by one: left to itself Pillow also tries formats that start other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

Image.init()                # once, here: the registry of formats is not filled safely from several threads


class Unreadable(Exception):
    """A picture that cannot be used: which, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def decode(data: bytes | Path, name: str | None = None) -> Image.Image:
    """An RGB image, upright by its EXIF tag, on white where it was transparent."""
    name = name or (str(data) if isinstance(data, Path) else "image")
    try:
        raw = data.read_bytes() if isinstance(data, Path) else data
        if not raw:
            raise Unreadable(name, "empty")
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:    # reads the header only
            if image.width * image.height > PIXEL_LIMIT:
                raise Unreadable(name, f"{image.width} x {image.height} pixels, over the limit of {PIXEL_LIMIT}")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (Unreadable, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(name, "not an image in a known format") from None
    except Exception as error:      # damaged files raise nearly anything from inside Pillow's plugins
        raise Unreadable(name, " ".join(str(error).split()) or type(error).__name__) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):                      # 16-bit grey; convert("L") would clip it at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels, which have no agreed white")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no agreed white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(
    image: Image.Image, size: int, crop: str = "centre", flip: bool = False, u: Sequence[float] = (0.5, 0.5, 1.0)
) -> Tensor:
    """uint8 [3, size, size]: the shorter side becomes `size`, then a crop.

    u = (x, y, mirror) in [0, 1): the place of a random crop, and a flip where mirror < 1/2.
    """
    law = Fit(size, random=crop == "random")
    pixels = law.cut(law.kept(image), u)
    return (pixels.flip(-1) if flip and u[2] < 0.5 else pixels).contiguous()


@dataclass(frozen=True)
class Fit:
    """The shorter side becomes `size` (halved by boxes, then bicubic, as ADM does), then a crop: central or random."""

    size: int
    random: bool = False

    def kept(self, image: Image.Image) -> Image.Image:
        """All of a picture that any crop may need."""
        size = self.size
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
        if width * height > PIXEL_LIMIT:
            raise Unreadable("image", f"too long and thin: {image.width} x {image.height} pixels")
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def cut(self, image: Image.Image, u: Sequence[float]) -> Tensor:
        """uint8 [3, size, size]; u = (x, y, ...) in [0, 1)."""
        spare = image.width - self.size, image.height - self.size
        left, top = (int(u[a] * (spare[a] + 1)) if self.random else spare[a] // 2 for a in (0, 1))
        return pixels_of(image.crop((left, top, left + self.size, top + self.size)))


@dataclass(frozen=True)
class Shrink:
    """A random square of the picture, `size` * f pixels wide, shrunk to `size` through an antialiasing filter: so the
    resolution at which a net is trained is drawn too. f is uniform in its logarithm from `least` to `most`, or to what
    the picture allows. Where even `least` does not fit, the square is as large as the picture."""

    size: int
    least: float = 1.0
    most: float = math.inf
    random = True

    def kept(self, image: Image.Image) -> Image.Image:
        return image

    def cut(self, image: Image.Image, u: Sequence[float]) -> Tensor:
        """uint8 [3, size, size]; u = (x, y, mirror, f) in [0, 1)."""
        side = max(1, round(self.side(min(image.size), u[3])))
        left, top = int(u[0] * (image.width - side + 1)), int(u[1] * (image.height - side + 1))
        box = (left, top, left + side, top + side)
        return pixels_of(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))

    def side(self, shortest: int, draw: float) -> float:
        """Of the square, for a picture whose shorter side is given."""
        most = min(self.most, shortest / self.size)
        return min(self.size * self.least * (max(most, self.least) / self.least) ** draw, shortest)


def crop_law(size: int, crop: str = "centre", shrink: tuple[float, float] = (1.0, 8.0)) -> Fit | Shrink:
    """From the settings of the same names."""
    return Shrink(size, *shrink) if crop == "shrink" else Fit(size, random=crop == "random")


def pixels_of(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def signed_picture(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1] of an RGB image."""
    return signed(pixels_of(image))


def signed(squares: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return squares.float().div_(127.5).sub_(1)


class Shelf:
    """Squares made once and kept while the whole set fits in memory, so that later epochs cost one gather."""

    def __init__(self, count: int, shape: tuple[int, ...], keep: bool = True):
        fits = keep and count * math.prod(shape) <= MEMORY_LIMIT
        self._kept = torch.empty(count, *shape, dtype=torch.uint8) if fits else None
        self._filled = torch.zeros(count, dtype=torch.bool)

    def shown(self, indices: Sequence[int], key: int, make: Callable[[int, Sequence[float]], Tensor],
              flip: bool) -> tuple[Tensor, Tensor]:
        """The indices [B], and squares in [-1, 1], mirrored by their draws where they may be."""
        rows, u = torch.as_tensor(indices, dtype=torch.int64), uniforms(indices, key, 4)
        squares = self.take(rows, u, make)
        return rows, signed(mirror(squares, u[:, 2]) if flip else squares)

    def take(self, rows: Tensor, u: Tensor, make: Callable[[int, Sequence[float]], Tensor]) -> Tensor:
        """uint8 [B, ...]; make(index, draws) is asked for those not kept."""
        items = zip(rows.tolist(), u.tolist(), strict=True)
        if self._kept is None:
            return torch.stack([make(i, draws) for i, draws in items])
        if not self._filled[rows].all():
            for i, draws in items:
                if not self._filled[i]:
                    self._kept[i] = make(i, draws)
                    self._filled[i] = True          # last, because other threads look at it first
        return self._kept[rows]


class Album:
    """Pictures decoded once and kept until they fill `limit` bytes, so that later epochs only cut and resize them."""

    def __init__(self, limit: int):
        self._limit, self._held, self._kept = limit, 0, dict[int, Image.Image]()
        self._lock = threading.Lock()

    def get(self, index: int) -> Image.Image | None:
        return self._kept.get(index)

    def add(self, index: int, image: Image.Image) -> None:
        cost = 4 * image.width * image.height               # Pillow keeps a pixel of RGB in four bytes
        with self._lock:                                    # two threads may have decoded the same picture
            if index not in self._kept and self._held + cost <= self._limit:
                self._kept[index] = image
                self._held += cost


class Tally:
    """Counts pictures and names the bad ones; stops the run when they are more than a share of those seen."""

    def __init__(self, name: str, share: float, count: int | None = None):
        self.name, self.share, self.seen, self.bad = name, share, 0, dict[str, str]()
        self._enough, self._different = min(ENOUGH, count or ENOUGH), set[str]()
        self._missed, self._refusal = 0, ""         # a stream misses a bad picture once in every epoch
        self._lock = threading.Lock()

    def record(self, title: str, reason: str | None = None) -> None:
        with self._lock:
            self.seen += 1
            if reason is not None:
                self.bad[title] = reason
                self._missed += 1
            if len(self._different) < ENOUGH:
                self._different.add(title)
            of = self.seen if len(self._different) == ENOUGH else len(self._different)  # a small stream comes round
            if self.seen >= self._enough and len(self.bad) > self.share * of:
                allowed = math.ceil(20 * len(self.bad) / of) / 20
                self._refusal = (
                    f"{self.name}: {len(self.bad)} of {of} images seen so far are unreadable "
                    f"({len(self.bad) / of:.1%}, more than {self.share:.1%}): {self.examples()}; "
                    f"put others in their places, or allow more: --bad-share {allowed:g}"
                )
        self.check()

    def check(self) -> None:
        """To be asked before every fetch: what a thread read ahead may have been thrown away, its refusal with it."""
        if self._refusal:
            raise Refusal(self._refusal)

    def told(self) -> str:
        """What was replaced, in a line; nothing, where nothing was."""
        with self._lock:
            if not self.bad:
                return ""
            return (f"{self.name}: {self._missed} of {self.seen} pictures seen could not be read, and others took "
                    f"their place: {self.examples()}")

    def examples(self) -> str:
        shown = [f"{title} ({reason})" for title, reason in list(self.bad.items())[:3]]
        return ", ".join(shown) + (f" and {len(self.bad) - 3} more" if len(self.bad) > 3 else "")


class ImageTable:
    """Pictures that can be read by number. An unreadable one is replaced by the next that can be read."""

    def __init__(
        self, rows: Rows, size: int, crop: str = "centre", flip: bool = False, bad_share: float = 0.01,
        shrink: tuple[float, float] = (1.0, 8.0),
    ):
        if rows.count < 1:
            raise Refusal(f"{rows.name}: holds no images")
        self.rows, self.name, self.classes, self.stamp = rows, rows.name, rows.classes, rows.stamp
        self.law, self.flip, self.shape = crop_law(size, crop, shrink), flip, (3, size, size)
        self.tally = Tally(rows.name, bad_share, rows.count)
        self._tried, self._lock = bytearray(rows.count), threading.Lock()
        self._stands_in = torch.arange(rows.count)                       # index -> the readable index shown for it
        self._shelf = Shelf(rows.count, self.shape, keep=not self.law.random)
        self._album = Album(MEMORY_LIMIT if self.law.random else 0)

    def __len__(self) -> int:
        return self.rows.count

    @property
    def bad(self) -> dict[str, str]:
        """Name of each unreadable picture met so far, and the reason."""
        return self.tally.bad

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        self.tally.check()
        rows, x = self._shelf.shown(indices, key, self._make, self.flip)
        return Batch(x, None if self.rows.labels is None else self.rows.labels[self._stands_in[rows]])

    def _make(self, index: int, u: Sequence[float]) -> Tensor:
        shown = int(self._stands_in[index])
        for _ in range(len(self)):
            title = self.rows.title(shown)
            if title not in self.bad:
                try:
                    image = self._picture(shown, title)
                except Unreadable as error:
                    self._record(shown, title, error.reason)
                else:
                    self._record(shown, title, None)
                    self._stands_in[index] = shown
                    return self.law.cut(image, u)
            shown = (shown + 1) % len(self)
        raise Refusal(f"{self.name}: none of the {len(self)} images is readable: {self.tally.examples()}")

    def _picture(self, index: int, title: str) -> Image.Image:
        image = self._album.get(index)
        if image is None:
            image = self.law.kept(decode(self.rows.read(index), title))
            self._album.add(index, image)
        return image

    def _record(self, index: int, title: str, reason: str | None) -> None:
        with self._lock:                            # two threads may have tried the same picture
            known, self._tried[index] = self._tried[index], 1
        if not known:
            self.tally.record(title, reason)


def unreadable(source: object) -> str:
    """One line on the pictures of a source, and of those that it is made of, that could not be read so far and were
    replaced by others; nothing, where all could be."""
    tally, parts = getattr(source, "tally", None), (*getattr(source, "sources", ()), getattr(source, "source", None))
    found = [tally.told() if isinstance(tally, Tally) else "", *(unreadable(p) for p in parts if p is not None)]
    return "; ".join(dict.fromkeys(filter(None, found)))

"""Small data that comes with scikit-learn and scikit-image, of clear licence.

| picture   | split | by                          | licence                                     |
|-----------|-------|-----------------------------|---------------------------------------------|
| astronaut | train | NASA                        | public domain                               |
| chelsea   | train | Stefan van der Walt         | CC0                                         |
| coffee    | train | Rachel Michetti             | CC0                                         |
| china     | train | danielbuechele              | CC BY 2.0                                   |
| camera    | train | Lav Varshney                | CC0                                         |
| brick     | train | CC0Textures                 | CC0                                         |
| grass     | train | linolafett                  | CC0                                         |
| hubble    | train | NASA, ESA                   | public domain                               |
| rocket    | test  | SpaceX                      | released into the public domain by SpaceX   |
| flower    | test  | see its credit              | CC BY 2.0                                   |
| gravel    | test  | CC0Textures                 | CC0                                         |
| clock     | test  | Stefan van der Walt         | public domain                               |
| digits    | both  | E. Alpaydin, C. Kaynak      | UCI Machine Learning Repository             |

Other pictures of those packages state no licence, or show the same scene twice, or no scene at all. Few natural
photographs of clear licence come in packages, so textures and a sky are among these. Weights trained on china or flower
must carry their `CREDITS`.
"""

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stillroom.data.batch import Batch
from stillroom.data.images import Shrink, decode, signed
from stillroom.data.order import mirror, uniforms
from stillroom.data.tensors import Tensors
from stillroom.settings import Refusal


@dataclass(frozen=True)
class Credit:
    name: str
    package: str            # where the file lies
    file: str
    split: str
    author: str
    licence: str
    source: str

    def __str__(self) -> str:
        return f"{self.name}: {self.author}, {self.licence}, {self.source}"


_SKIMAGE, _SKLEARN = "skimage.data", "sklearn.datasets.images"
_BY = "CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/)"
CREDITS = (
    Credit("astronaut", _SKIMAGE, "astronaut.png", "train", "NASA", "public domain", "https://flic.kr/p/r9qvLn"),
    Credit("chelsea", _SKIMAGE, "chelsea.png", "train", "Stefan van der Walt", "CC0", "scikit-image"),
    Credit("coffee", _SKIMAGE, "coffee.png", "train", "Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0",
           "scikit-image"),
    Credit("china", _SKLEARN, "china.jpg", "train", "danielbuechele", _BY,
           "https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/"),
    Credit("camera", _SKIMAGE, "camera.png", "train", "Lav Varshney", "CC0", "scikit-image"),
    Credit("brick", _SKIMAGE, "brick.png", "train", "CC0Textures", "CC0",
           "https://cc0textures.com/view.php?tex=Bricks25"),
    Credit("grass", _SKIMAGE, "grass.png", "train", "linolafett", "CC0",
           "https://www.deviantart.com/linolafett/art/Grass-01-434853879"),
    Credit("hubble", _SKIMAGE, "hubble_deep_field.jpg", "train", "NASA and ESA", "public domain",
           "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/"),
    Credit("rocket", _SKIMAGE, "rocket.jpg", "test", "SpaceX", "public domain",
           "https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/"),
    # scikit-learn's README names danielbuechele for this one as well, but its links lead to vultilion: credit both.
    Credit("flower", _SKLEARN, "flower.jpg", "test", "vultilion (scikit-learn's README: danielbuechele)", _BY,
           "https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/"),
    Credit("gravel", _SKIMAGE, "gravel.png", "test", "CC0Textures", "CC0",
           "https://cc0textures.com/view.php?tex=Gravel04"),
    Credit("clock", _SKIMAGE, "clock_motion.png", "test", "Stefan van der Walt", "public domain", "scikit-image"),
)
SMALLEST = 300              # pixels of the shorter side of the smallest picture
ALL_SCALES = (1.0, math.inf)


class Photos:
    """Random squares out of twelve photographs, split by picture. Few scenes: fit for codecs, not for claims
    about the distribution of natural images. Item i comes from picture i % n; its square is drawn from (index, key):
    by default every scale between `size` and the whole height is as likely."""

    def __init__(
        self, size: int, split: str = "train", count: int = 10_000, flip: bool = False,
        shrink: tuple[float, float] = ALL_SCALES,
    ):
        if not 1 <= size <= SMALLEST or count < 1:
            raise Refusal(f"photos: {count} squares of {size} pixels; give at least one of 1 to {SMALLEST} pixels")
        self.name, self.shape, self.classes = f"photos:{split}", (3, size, size), None
        self.credits = tuple(c for c in CREDITS if c.split == split)
        self.flip, self._count, self.law = flip, count, Shrink(size, *shrink)
        self._pictures = [image for _, image in photographs(split)]

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        u = uniforms(indices, key, 4)                                               # f, x, y, mirror
        draws = u[:, [1, 2, 3, 0]].tolist()
        squares = torch.stack([self._square(i, d) for i, d in zip(indices, draws, strict=True)])
        return Batch(signed(mirror(squares, u[:, 3]) if self.flip else squares))

    def _square(self, index: int, u: Sequence[float]) -> Tensor:
        return self.law.cut(self._pictures[index % len(self._pictures)], u)


def photographs(split: str) -> list[tuple[Credit, Image.Image]]:
    return [
        (c, decode((importlib.resources.files(c.package) / c.file).read_bytes(), c.file))
        for c in CREDITS if c.split == split
    ]


def every_fifth(y: Tensor) -> Tensor:
    """[N]: whether an item is a fifth one of its class."""
    rank = torch.empty_like(y)
    for c in y.unique():
        rank[y == c] = torch.arange(int((y == c).sum()))
    return rank % 5 == 4


WIDTH = 8                   # of a digit, in pixels


def digits(size: int = WIDTH, split: str = "train") -> Tensors:
    """1,797 handwritten digits, one grey channel. Every fifth of each class is the test set."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    x, y = torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target).long()
    chosen = every_fifth(y) == (split == "test")
    x = x[chosen]
    if size != WIDTH:
        x = functional.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return Tensors(x, y[chosen], [str(c) for c in range(10)], name=f"digits:{split}")

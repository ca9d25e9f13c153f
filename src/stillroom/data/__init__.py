"""Data in: pictures, latents and points, as batches that are pure functions of a seed and a step."""

from stillroom.data.batch import Batch, Item, Source, Stream, at_most, named
from stillroom.data.builtin import CREDITS, Photos, digits
from stillroom.data.images import ImageTable, Unreadable, decode, signed_picture, square, unreadable
from stillroom.data.latents import Encoding, Latents, LatentSpace, encoding_card, write_latents
from stillroom.data.loader import Loader
from stillroom.data.mixed import Mixed
from stillroom.data.open import BUILTIN, open_source
from stillroom.data.order import indices, uniforms
from stillroom.data.pairs import Pairs, write_pairs
from stillroom.data.pictures import Pictures, pictures, sample
from stillroom.data.scenes import SHAPES, Scenes, leaves, shapes
from stillroom.data.some import Parted, Some
from stillroom.data.streams import TarStream
from stillroom.data.tensors import Tensors

__all__ = [
    "BUILTIN", "CREDITS", "SHAPES", "Batch", "Encoding", "ImageTable", "Item", "LatentSpace", "Latents", "Loader",
    "Mixed", "Pairs", "Parted", "Photos", "Pictures", "Scenes", "Some", "Source", "Stream", "TarStream", "Tensors",
    "Unreadable", "at_most",
    "decode", "digits", "encoding_card", "indices", "leaves", "named", "open_source", "pictures", "sample", "shapes",
    "signed_picture", "square", "uniforms", "unreadable", "write_latents", "write_pairs",
]

"""One picture's latents as a file: safetensors whose metadata say which space they lie in and what they came from."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillroom.codecs.codec import Codec
from stillroom.data import LatentSpace
from stillroom.settings import Refusal
from stillroom.settings.files import file_written_atomically


class Encoded(NamedTuple):
    z: Tensor                           # [C, h, w], diffusion side
    space: LatentSpace
    size: tuple[int, int]               # of the picture
    scale: float                        # at which it was remapped


def write_encoded(path: Path, encoded: Encoded, codec: str) -> None:
    """`codec` is the hash of the one that made them."""
    z, space, size, scale = encoded
    metadata = {"space": json.dumps(dataclasses.asdict(space)), "codec": codec, "size": json.dumps(size),
                "scale": repr(scale)}
    with file_written_atomically(path) as new:
        save_file({"z": z.contiguous()}, new, metadata=metadata)


def read_encoded(path: Path) -> Encoded:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            about, z = file.metadata() or {}, file.get_tensor("z")
        height, width = json.loads(about["size"])
        return Encoded(z, LatentSpace(**json.loads(about["space"])), (height, width), float(about["scale"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise Refusal(f"{path}: not latents written by stillroom encode ({error})") from None


def require_space(encoded: Encoded, codec: Codec, name: str) -> None:
    """Latents are decoded by the codec that made them, or by another of the same space."""
    mine, theirs = encoded.space, codec.space
    differing = [f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) != getattr(theirs, f.name)]
    if differing:
        raise Refusal(f"{name}: its latents lie in another space than this codec's (another {', '.join(differing)}); "
                      "give the codec that encoded it")

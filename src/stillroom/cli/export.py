"""`stillroom export CODEC --to diffusers | taesd | onnx`: a codec for other people's programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.cli.flags import parse
from stillroom.settings import Refusal

ABOUT = """Writes a codec for other programs, with a model card.

diffusers: a folder that loads without stillroom, in AutoencoderTiny's layout or with a module of its own.
taesd: a pair of weight files as ComfyUI lists them; both halves must have that layout (--stem conv).
onnx: encoder.onnx and decoder.onnx of any size, checked against torch (needs the extra `onnx`)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    to: Literal["diffusers", "taesd", "onnx"]
    out: Path
    """The folder to write; it must not hold anything yet."""


def run(word: str, arguments: list[str]) -> int:
    command = "stillroom export CODEC"
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parse(Settings, ["--help"], command, ABOUT)
        raise Refusal(f"usage: {command} --to diffusers|taesd|onnx --out FOLDER")
    settings = parse(Settings, arguments[1:], command, ABOUT)
    from stillroom.codecs.export import to_diffusers, to_onnx, to_taesd
    from stillroom.train.teacher import open_codec

    write = {"diffusers": to_diffusers, "taesd": to_taesd, "onnx": to_onnx}[settings.to]
    codec, card, rows = open_codec(arguments[0]), card_of(Path(arguments[0])), figures_of(Path(arguments[0]))
    print(write(codec, settings.out, card, rows))
    return 0


def card_of(place: Path) -> dict[str, Any]:
    """What the product says of itself; another program's folder says nothing."""
    from stillroom.train.files import read_json
    from stillroom.train.product import product_folder
    from stillroom.train.teacher import BUNDLED, is_ours

    place = BUNDLED if str(place) == "bundled" else place
    return read_json(product_folder(place) / "product.json")["card"] if is_ours(place) else {}


def figures_of(place: Path) -> list[dict[str, Any]]:
    """Rows for the card from the run's sweep, if it has had one."""
    file = place / "sweep" / "card.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

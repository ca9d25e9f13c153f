"""`stillroom export RUN --to diffusers | taesd | onnx`: a codec, or a student of a pipeline, for other programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.cli.flags import parse
from stillroom.settings import Refusal, Where

ABOUT = """Writes a codec, or a student of a diffusers pipeline, for other programs, with a model card.

diffusers: a folder that loads without stillroom. A codec in AutoencoderTiny's layout or with a module of its own; a
generator or flow as the teacher's pipeline with the student in it, or as a LoRA file beside its scheduler.
taesd: a pair of weight files as ComfyUI lists them; both halves must have that layout (distilled with --stem conv).
onnx: encoder.onnx and decoder.onnx of any size, checked against torch (needs the extra `onnx`)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    to: Literal["diffusers", "taesd", "onnx"]
    out: Path
    """The folder to write; it must not hold anything yet."""
    teacher: Where = ""
    """Of a generator or flow: its teacher's folder, where that is not where it was."""


def run(word: str, arguments: list[str]) -> int:
    command = "stillroom export RUN|CODEC"
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parse(Settings, ["--help"], command, ABOUT)
        raise Refusal(f"usage: {command} --to diffusers|taesd|onnx --out FOLDER")
    settings = parse(Settings, arguments[1:], command, ABOUT)
    from stillroom.train.teacher import kind_of

    if (kind := kind_of(arguments[0])) in ("generator", "flow"):
        print(export_student(arguments[0], kind, settings))
        return 0
    if settings.teacher:
        raise Refusal(f"{arguments[0]}: --teacher is for generators and flows; leave it out")
    from stillroom.codecs.export import to_diffusers, to_onnx, to_taesd
    from stillroom.judge.places import codec_at

    write = {"diffusers": to_diffusers, "taesd": to_taesd, "onnx": to_onnx}[settings.to]
    codec, card, rows = codec_at(arguments[0]), card_of(Path(arguments[0])), figures_of(Path(arguments[0]))
    print(write(codec, settings.out, card, rows))
    return 0


def export_student(place: str, kind: str, settings: Settings) -> Path:
    from stillroom.flows.export import to_pipeline
    from stillroom.judge.places import know_recipe
    from stillroom.train.product import load_product
    from stillroom.train.teacher import pipeline_of

    if settings.to != "diffusers":
        raise Refusal(f"{place}: a {kind} is exported to diffusers, not to {settings.to}")
    if not (teacher := settings.teacher or pipeline_of(place)):
        raise Refusal(f"{place}: its teacher is no pipeline of diffusers, so there is none that could draw from it")
    teacher = str(Path(teacher).absolute()) if Path(teacher).is_dir() else teacher
    know_recipe(Path(place))
    product = load_product(place)
    return to_pipeline(product.parts[kind], settings.out, teacher, product.card, place)     # pyright: ignore


def card_of(place: Path) -> dict[str, Any]:
    """What the product says of itself; another program's folder says nothing."""
    from stillroom.settings.files import read_json
    from stillroom.train.product import product_folder
    from stillroom.train.teacher import BUNDLED, is_ours

    place = BUNDLED if str(place) == "bundled" else place
    return read_json(product_folder(place) / "product.json")["card"] if is_ours(place) else {}


def figures_of(place: Path) -> list[dict[str, Any]]:
    """Rows for the card from the run's sweep, if it has had one."""
    file = place / "sweep" / "card.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

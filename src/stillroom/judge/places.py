"""What the words of a command name: codecs, runs, and runs of the user's own recipe."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.recipes import find
from stillroom.settings import Refusal, read_toml
from stillroom.settings.files import read_json

if TYPE_CHECKING:
    from stillroom.codecs import Codec

CODECS = "a run, `bundled`, a TAESD weight file, or a diffusers folder or hub id"


def require_there(place: str, takes: str, is_name: bool = False) -> None:
    """What is mistyped is refused as such, before anything else is said of it. `is_name`: no path need lie there."""
    if not is_name and not Path(place).exists():
        raise Refusal(f"{place}: no such file or folder; give {takes}")


def is_codec_name(text: str) -> bool:
    """`bundled`, or what may be a hub id: owner/model, unless a folder of that owner holds runs of ours."""
    from stillroom.train.teacher import is_ours

    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None
    return text == "bundled" or (hub and not any(map(is_ours, Path(text).parent.glob("*"))))


def know_recipe(place: Path) -> None:
    """Imports the user's own recipe file, if the run is of one: the product's classes are in it."""
    for run in (place, place.parent):
        if (run / "settings.toml").is_file():
            name = str(read_toml(run / "settings.toml").get("recipe", ""))
            if ".py:" in name and names_others(place):
                find(name)
            return


def record_at(place: Path) -> dict[str, Any]:
    """What the run that a product is of recorded of itself; {} where the product lies alone."""
    file = next((f / "run.json" for f in (place, place.parent) if (f / "run.json").is_file()), None)
    return {} if file is None else read_json(file)


def names_others(place: Path) -> bool:
    """Whether a product names classes that are not of this package: for no other one is a user's file run."""
    file = next((f / "product.json" for f in (place / "product", place) if (f / "product.json").is_file()), None)
    return file is not None and re.search(rb'"class": "(?!stillroom\.)', file.read_bytes()) is not None


def codec_at(spec: str) -> "Codec":
    """As `open_codec`, of a run of the user's own recipe too."""
    from stillroom.train.teacher import open_codec

    know_recipe(Path(spec))
    return open_codec(spec)

"""Teachers by name, frozen: flows (a closed-form mixture, one of our runs, a diffusers folder) and codecs."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stillroom.codecs import Codec
from stillroom.data import Source, Stream, encoding_card
from stillroom.flows import Flow, Mixture
from stillroom.settings import Refusal
from stillroom.settings.files import read_json, sha256
from stillroom.train.product import load_product, product_folder, product_hash

_MIXTURE = re.compile(r"(ring|grid):(\d+)(?::(\d+\.?\d*|\.\d+))?")


def is_mixture(spec: str) -> bool:
    """Whether a closed form is meant."""
    return spec.startswith(("ring:", "grid:"))


def open_teacher(spec: str, prompts: str = "") -> Flow:
    """`ring:MODES[:STD]`, `grid:SIDE[:STD]`, a run or product folder, a diffusers folder, or a hub id. A text-to-image
    pipeline is asked with `prompts`, the folder that `stillroom cache --prompts` wrote."""
    if match := _MIXTURE.fullmatch(spec):
        require_prompts(None, spec, prompts)
        form, modes, std = match[1], int(match[2]), float(match[3] or 0.15)
        if modes < 1 or std <= 0:
            raise Refusal(f"teacher {spec!r}: a {form} needs at least one mode and a positive spread")
        return Flow(Mixture.ring(modes, std=std) if form == "ring" else Mixture.grid(modes, std=std), (2,))
    if is_mixture(spec) or not spec:
        raise Refusal(f"teacher {spec!r}: a closed form is ring:MODES[:STD] or grid:SIDE[:STD], in plain numbers; else "
                      "give a run, a product or a diffusers folder")
    if is_ours(Path(spec)):
        flow = part_of(spec, "flow")
        require_prompts(flow, spec, prompts)
        return flow
    require_there(f"teacher {spec}", spec)
    from stillroom.flows.folders import from_diffusers
    from stillroom.flows.prompted import from_pipeline, makes_pictures_of_prompts

    if prompts or makes_pictures_of_prompts(spec):
        return frozen(from_pipeline(spec, prompts))
    return frozen(from_diffusers(spec))


def require_there(name: str, spec: str) -> None:
    """A whole path is no hub name."""
    if Path(spec).is_absolute() and not Path(spec).exists():
        raise Refusal(f"{name}: nothing is there; if it was moved, say where it is now")


def require_prompts(flow: Flow | None, spec: str, prompts: str) -> None:
    """Those that it has in it, or none."""
    if not prompts:
        return
    from stillroom.flows.prompted import prompted
    from stillroom.flows.prompts import open_prompts

    if flow is None or (net := prompted(flow)) is None:
        raise Refusal(f"teacher {spec}: knows no prompts; leave out --prompts")
    if open_prompts(prompts)[0].sha256 != net.prompts.sha256:
        raise Refusal(f"prompts {prompts}: {spec} has others in it; leave out --prompts")


def open_teacher_of(spec: str, data: Source | Stream, prompts: str = "") -> Flow:
    """A flow whose samples are of the data's shape, classes and latent space."""
    flow, name = open_teacher(spec, prompts), f"teacher {spec}"
    require_space(flow, spec, data, name)
    if flow.classes != (None if data.classes is None else len(data.classes)):
        raise Refusal(f"{name}: it knows {flow.classes or 'no'} classes, and {data.name} has "
                      f"{len(data.classes or ()) or 'none'}")
    return flow


class Samples(Protocol):
    """What is asked of samples before a flow stands beside them; `encoding` too, where they are latents."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def require_space(flow: Flow, spec: str, data: Samples, name: str) -> None:
    """A flow, opened from `spec`, that makes samples of the shape and latent space of others."""
    if flow.shape != tuple(data.shape):
        raise Refusal(f"{name}: it makes {list(flow.shape)}, and {data.name} holds {list(data.shape)}")
    if is_ours(Path(spec)):
        require_encoding(load_product(spec).card, data, name)


def teacher_card(spec: str) -> dict[str, Any]:
    """Who taught, for a card: another may come to its place, or it may move."""
    return {"teacher": spec} | ({"teacher_hash": product_hash(spec)} if is_ours(Path(spec)) else {})


def encoding_of(spec: str) -> dict[str, Any]:
    """Of the latents that a flow makes, for a card; {} for points, pictures and other people's models."""
    card = load_product(spec).card if is_ours(Path(spec)) else {}
    return {"encoding": card["encoding"]} if "encoding" in card else {}


def require_encoding(card: Mapping[str, Any], data: Samples, name: str) -> None:
    """Latents of another codec or normaliser are numbers of the same shape, and another language."""
    theirs, mine = card.get("encoding"), encoding_card(data).get("encoding")
    if theirs == mine:
        return
    if theirs is None or mine is None:
        raise Refusal(f"{name}: made on {'pictures' if theirs is None else 'latents'}, and {data.name} holds "
                      f"{'pictures' if mine is None else 'latents'}")
    other = [k for k in ("codec", "space", "crop") if theirs.get(k) != mine.get(k)]
    raise Refusal(f"{name}: made on other latents than those of {data.name}: another {', another '.join(other)}")


def size_of(codec: str) -> int | None:
    """Pixels a side of the squares that a codec's run learned from."""
    return read_json(product_folder(codec) / "product.json")["card"].get("size") if is_ours(Path(codec)) else None


def pipeline_of(spec: str) -> str:
    """The diffusers folder or hub id that a teacher is, or that our run's teacher was; "" of a closed form, and of a
    flow that was trained here."""
    while spec and is_ours(Path(spec)):
        spec = str(read_json(product_folder(spec) / "product.json")["card"].get("teacher", ""))
    return "" if is_mixture(spec) else spec


def codec_beside(spec: str) -> Codec | None:
    """The codec of a teacher that lies in one folder with it."""
    place = pipeline_of(spec)
    return open_codec(place) if place and (Path(place) / "vae" / "config.json").is_file() else None


BUNDLED = Path(__file__).parents[1] / "codecs" / "bundled"
"""A product that comes with the package: trained by `stillroom train codec --preset bundled`."""


def open_codec(spec: str) -> Codec:
    """`bundled`, a run or product folder, a TAESD weight file, a diffusers folder, or a hub id."""
    path = BUNDLED if spec == "bundled" else Path(spec)
    if is_ours(path):
        return part_of(path, "codec")
    require_there(f"codec {spec}", str(path))
    if path.suffix.lower() in (".safetensors", ".pth"):
        from stillroom.codecs.taesd import from_taesd

        return frozen(from_taesd(path))
    from stillroom.codecs.folders import from_diffusers

    return frozen(from_diffusers(spec))


def frozen(module):
    return module.requires_grad_(False).eval()


def is_ours(path: Path) -> bool:
    return (path / "settings.toml").is_file() or (path / "product.json").is_file()


def weights_digest(place: str) -> str | None:
    """Names what a place holds by its weights, wherever they lie. None where no weights are: a closed form, a name on
    the hub."""
    if is_ours(Path(place)):
        return product_hash(place)
    sums = sorted(map(sha256, weight_files(Path(place))))
    return hashlib.sha256(" ".join(sums).encode()).hexdigest() if sums else None


def weight_files(place: Path) -> list[Path]:
    """Of other people: a file, with the other half of a codec that its name tells of; or all in a folder, of a
    pipeline's those of its model and its VAE alone: text encoders do not answer in training, and are large."""
    if place.is_file():
        halves = {place.name.replace(*words) for words in (("encoder", "decoder"), ("decoder", "encoder"))}
        found = [place.with_name(name) for name in halves | {place.name}]
    else:
        homes = [home for part in ("unet", "transformer", "vae") if (home := place / part).is_dir()] or [place]
        found = [p for home in homes for p in home.rglob("*")]
    return [p for p in found if p.suffix in (".safetensors", ".pth") and p.is_file()]


def kind_of(place: Path | str) -> str:
    """Of the product of a run or folder of ours; "" of what is none."""
    path = Path(place)
    if not is_ours(path) and not is_ours(path / "product"):
        return ""
    return str(read_json(product_folder(path) / "product.json").get("kind", ""))


def part_of(place: Path | str, kind: str) -> Any:
    """The one part that a product of this kind is about."""
    product = load_product(place)
    if product.kind != kind:
        raise Refusal(f"teacher {place}: a product of kind {product.kind!r}, not a {kind}; see: stillroom train {kind}")
    return product.parts[kind]

"""Products on disk: `product.json` says what the parts are, safetensors hold their weights. Loading knows no recipe."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillroom.nets.build import build, describe
from stillroom.settings import Refusal
from stillroom.train.checkpoint import fill, full, load_tensors, match_names
from stillroom.train.files import folder_written_atomically, read_json, sha256
from stillroom.train.recipe import Product, Ref

FORMAT = 1


def save_product(product: Product, folder: Path, writes: bool = True) -> None:
    """Every process gathers its shards; the first one writes."""
    parts, weights = {}, {}
    for name, part in product.parts.items():
        if isinstance(part, Tensor):
            parts[name], tensors = {"tensor": True}, {"": part}
        else:
            parts[name], tensors = describe(part), part.state_dict()
        weights[name] = {k: full(v.detach()).cpu().clone().contiguous() for k, v in tensors.items()}
    if not writes:
        return
    with folder_written_atomically(folder) as new:
        for name, tensors in weights.items():
            save_file(tensors, new / f"{name}.safetensors")
        base = None if product.base is None else {"path": product.base.path, "sha256": product.base.sha256}
        sums = {f"{name}.safetensors": sha256(new / f"{name}.safetensors") for name in weights}
        content = {"format": FORMAT, "kind": product.kind, "card": dict(product.card), "base": base, "parts": parts,
                   "sha256": sums}
        (new / "product.json").write_text(json.dumps(content, indent=1))


def product_folder(path: Path | str) -> Path:
    """The product of a run, or a product folder itself."""
    path = Path(path)
    for folder in (path / "product", path):
        if (folder / "product.json").is_file():
            return folder
    if (path / "settings.toml").is_file():
        raise Refusal(f"{path}: this run has no product yet; finish it with: stillroom resume {path}")
    raise Refusal(f"{path}: no run and no product; expected {path}/product/product.json")


def load_product(path: Path | str) -> Product:
    folder = product_folder(path)
    content = read_json(folder / "product.json")
    try:
        if content["format"] != FORMAT:
            raise Refusal(f"{folder}: a product of format {content['format']}; this stillroom reads format {FORMAT}")
        base = Ref(**content["base"]) if content["base"] else None
        parts = {name: _load_part(folder, name, d, content["sha256"]) for name, d in content["parts"].items()}
        return Product(content["kind"], parts, content["card"], base)
    except (KeyError, TypeError) as error:
        raise Refusal(f"{folder}/product.json: not a product this stillroom understands: {error!r}") from None


def _load_part(folder: Path, name: str, description: Any, sums: dict[str, str]) -> nn.Module | Tensor:
    path = folder / f"{name}.safetensors"
    tensors = load_tensors(path)
    if sha256(path) != sums[path.name]:
        raise Refusal(f"{path}: its checksum is not the one in product.json; the file was damaged or exchanged")
    if "tensor" in description:
        return tensors[""]
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and overwritten; the caller sees no draw
        part = build(description)
    state = part.state_dict(keep_vars=True)
    match_names(state, tensors, str(path))
    for key, mine in state.items():
        fill(mine, tensors[key])
    return part.requires_grad_(False).eval()


def load(path: Path | str) -> Any:
    """The product itself: the flow of a flow run, the points of a particle run, the codec of a codec run. A product
    none of whose parts is named like its kind comes as all its parts."""
    product = load_product(path)
    return product.parts.get(product.kind, product.parts)


def product_hash(path: Path | str) -> str:
    """Names a product by the weights of all its parts, for a `Ref` to it."""
    sums = read_json(product_folder(path) / "product.json")["sha256"]
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

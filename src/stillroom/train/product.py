"""Products on disk: `product.json` says what the parts are, safetensors hold their weights. Loading knows no recipe.

A product with a base stores only what the base has not: tensors that are the base's, byte for byte, are named in
`borrowed` and taken from it again. So a LoRA leaves its adapters, and cannot be put on another model than its own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillroom.nets.build import NotImported, build, describe
from stillroom.settings import Refusal, nearest, read_toml
from stillroom.settings.files import folder_written_atomically, read_json, sha256, write_atomically
from stillroom.train.checkpoint import fill, full, load_tensors, match_names
from stillroom.train.folder import resuming
from stillroom.train.recipe import Product, Ref

FORMAT = 1


def save_product(product: Product, folder: Path, writes: bool = True, readme: str = "") -> None:
    """Every process gathers its shards; the first one writes. `readme` is for people, and nothing reads it again."""
    parts, weights, borrowed = {}, {}, {}
    owned = {} if product.base is None else {_digest(v): k for k, v in base_tensors(product.base).items()}
    for name, part in product.parts.items():
        if isinstance(part, Tensor):
            parts[name], tensors = {"tensor": True}, {"": part}
        else:
            parts[name], tensors = describe(part), part.state_dict()
        whole = {k: full(v.detach()).cpu().clone().contiguous() for k, v in tensors.items()}
        borrowed[name] = {k: owned[d] for k, v in whole.items() if (d := _digest(v)) in owned} if owned else {}
        weights[name] = {k: v for k, v in whole.items() if k not in borrowed[name]}
    if not writes:
        return
    with folder_written_atomically(folder) as new:
        for name, tensors in weights.items():
            save_file(tensors, new / f"{name}.safetensors")
        sums = {f"{name}.safetensors": sha256(new / f"{name}.safetensors") for name in weights}
        content = {"format": FORMAT, "kind": product.kind, "card": dict(product.card),
                   "base": product.base and written_base(product.base, folder), "parts": parts,
                   "borrowed": borrowed, "sha256": sums}
        (new / "product.json").write_text(json.dumps(content, indent=1))
        if readme:
            (new / "README.md").write_text(readme, encoding="utf-8")


def amend_product(path: Path | str, arguments: Mapping[str, Mapping[str, Any]], card: Mapping[str, Any]) -> None:
    """Other constructor arguments, numbers and strings, for parts that have them, and more on the card. The weights
    stay, and so does what names the product by its weights."""
    folder = product_folder(path)
    content = read_json(folder / "product.json")
    for part, changed in arguments.items():
        known = content["parts"].get(part, {}).get("arguments", {})
        for name in changed:
            if name not in known:
                raise Refusal(f"{folder}: part {part!r} was not made with an argument {name!r}{nearest(name, known)}")
        known.update(changed)
    content["card"].update(card)
    write_atomically(folder / "product.json", json.dumps(content, indent=1))


def product_folder(path: Path | str) -> Path:
    """The product of a run, or a product folder itself."""
    path = Path(path)
    for folder in (path / "product", path):
        if (folder / "product.json").is_file():
            return folder
    if (path / "settings.toml").is_file():
        raise Refusal(f"{path}: this run has no product yet; finish it with: {resuming(path)}")
    raise Refusal(f"{path}: no run and no product; expected {path}/product/product.json")


def load_product(path: Path | str) -> Product:
    folder = product_folder(path)
    content = read_json(folder / "product.json")
    try:
        if content["format"] != FORMAT:
            raise Refusal(f"{folder}: a product of format {content['format']}; this stillroom reads format {FORMAT}")
        base = content["base"] and found_base(content["base"], folder)
        base_has = {} if base is None else base_tensors(base)
        parts = {
            name: _load_part(folder, name, description, content["sha256"],
                             {k: base_has[v] for k, v in content["borrowed"][name].items()})
            for name, description in content["parts"].items()
        }
        return Product(content["kind"], parts, content["card"], base)
    except NotImported as unknown:
        raise Refusal(f"{folder}: {unknown}{own_file_of(folder)}") from None
    except (KeyError, TypeError) as error:
        raise Refusal(f"{folder}/product.json: not a product this stillroom understands: {error!r}") from None


def own_file_of(folder: Path) -> str:
    """What else makes a run's own classes known: the file of its recipe, as it recorded it. To be run by who says so:
    no file is run because it is written in what is loaded."""
    settings = folder.parent / "settings.toml"
    recipe = str(read_toml(settings).get("recipe", "")) if settings.is_file() else ""
    return f", or: from stillroom.recipes import find; find({recipe!r})" if ".py:" in recipe else ""


def written_base(base: Ref, folder: Path) -> dict[str, str]:
    """`beside`: from the product's folder to its base, which finds it where both have moved."""
    return {"path": base.path, "sha256": base.sha256, "beside": os.path.relpath(base.path, folder)}


def found_base(base: Mapping[str, str], folder: Path) -> Ref:
    beside = Path(os.path.normpath(folder / base["beside"]))
    moved = not Path(base["path"]).exists() and beside.exists()
    return Ref(str(beside) if moved else base["path"], base["sha256"])


def base_tensors(base: Ref) -> dict[str, Tensor]:
    """Every tensor of a base by "part/name", when it is still the model that the product was made on."""
    try:
        found = product_hash(base.path)
    except Refusal as refusal:
        raise Refusal(f"the base of this product is gone: {refusal}; put it back, or beside the product as it "
                      "was") from None
    if found != base.sha256:
        raise Refusal(f"{base.path}: not the base that this product was made on; its weights have another hash")
    folder = product_folder(base.path)
    content = read_json(folder / "product.json")
    return {
        f"{part}/{k}": v for part in content["parts"] for k, v in _own_tensors(folder, part, content["sha256"]).items()
    }


def _own_tensors(folder: Path, name: str, sums: dict[str, str]) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    tensors = load_tensors(path)
    if sha256(path) != sums[path.name]:
        raise Refusal(f"{path}: its checksum is not the one in product.json; the file was damaged or exchanged")
    return tensors


def _digest(x: Tensor) -> str:
    """Names a tensor by shape, type and bytes."""
    digest = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_part(folder: Path, name: str, description: Any, sums: dict[str, str],
               borrowed: dict[str, Tensor]) -> nn.Module | Tensor:
    tensors = _own_tensors(folder, name, sums) | borrowed
    if "tensor" in description:
        return tensors[""]
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and overwritten; the caller sees no draw
        part = build(description)
    state = part.state_dict(keep_vars=True)
    match_names(state, tensors, f"{folder}/{name}.safetensors")
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

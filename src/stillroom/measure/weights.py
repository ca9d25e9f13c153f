"""Public weight files from a local path: tensors only, and every one of them accounted for."""

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillroom.settings import Refusal


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU; a .pth is read without running what may be in it."""
    path = Path(file)
    if not path.is_file():
        raise Refusal(f"{path}: no such weight file; give the path of a local one")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise Refusal(f"{path}: weights are read from .safetensors, .pth or .pt files")
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise Refusal(f"{path}: not a file of weights alone ({str(error).partition('.')[0]})") from error
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise Refusal(f"{path}: holds more than named tensors; save the module's state_dict() alone")
    return {str(name): x.detach() for name, x in found.items()}


def fill(module: nn.Module, weights: Mapping[str, Tensor], name: str, beside: Collection[str] = ()) -> None:
    """Every tensor of the module from `weights`, in its own precision; `beside` names others that may be there."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in weights]
    unknown = [k for k in weights if k not in wanted and k not in beside]
    shapes = [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    for problem, keys in (("missing", missing), ("not known here", unknown), ("of another shape", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise Refusal(f"{name}: weights {problem}: {', '.join(keys[:3])}{more}; is it the file of another network?")
    module.load_state_dict({k: weights[k] for k in wanted})

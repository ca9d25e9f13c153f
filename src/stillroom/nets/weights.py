"""Weight files from a local path: tensors only, and every one of them accounted for."""

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
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise Refusal(f"{path}: a weight file ends in .safetensors, .pth or .pt")
    if not path.is_file():
        raise Refusal(f"{path}: the weight file is missing; give the path of a local one")
    if suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise Refusal(f"{path}: damaged or no safetensors file ({error}); download it again") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # its unpickler says no in a dozen ways
        raise Refusal(f"{path}: holds more than tensors, or is damaged ({type(error).__name__}); save it as "
                      "safetensors in an environment that you trust") from error
    if not isinstance(found, Mapping) or not all(isinstance(w, Tensor) for w in found.values()):
        raise Refusal(f"{path}: holds more than tensors by name; save the model's state_dict() alone")
    return {str(name): w.detach() for name, w in found.items()}


def require_same(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], model: str, where: str | Path,
                 cure: str = "the config.json and the weights must be of the same model") -> None:
    """Every key, no other, each of its shape: `own` are the model's, `weights` those of the file."""
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    odd = [f"{k} {tuple(w.shape)} for {tuple(own[k].shape)}" for k, w in weights.items()
           if k in own and w.shape != own[k].shape]
    told = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", odd)) if keys]
    if told:
        raise Refusal(f"{where}: the weights do not fit {model}: {'; '.join(told)}; {cure}")


def fill_all(module: nn.Module, weights: Mapping[str, Tensor], where: str | Path,
             beside: Collection[str] = ()) -> None:
    """Every tensor of the module from `weights`, in its own precision; `beside` names others that may be there."""
    own = module.state_dict()
    kept = {k: w for k, w in weights.items() if k in own or k not in beside}
    require_same(own, kept, type(module).__name__, where,
                 "is it the file of another network?")
    module.load_state_dict(kept)

"""Folders of diffusers models, read strictly: a local folder or a hub name, a configuration understood to its last key,
weights that are all there, no other, each of its shape. diffusers is imported on first use: that takes seconds.
"""

import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as File
from typing import Any

from torch import Tensor

from stillroom.nets.weights import read_weights
from stillroom.settings import Refusal, nearest

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = ("bin", "pt", "pth", "ckpt", "pkl", "pickle")
UNBUILDABLE = (ValueError, TypeError, NotImplementedError, KeyError, IndexError, AssertionError, ZeroDivisionError,
               RuntimeError)
"""What diffusers raises at configurations that fit no model."""


def local_folder(folder: str | File, wanted: Sequence[str]) -> File:
    """The folder itself, or what the hub has under that name: `wanted` are the patterns of files to fetch."""
    if File(folder).is_dir():
        return File(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)):
        raise Refusal(f"no folder {folder}: give a local diffusers folder, or a hub name like owner/model")
    import huggingface_hub

    try:
        return File(huggingface_hub.snapshot_download(
            str(folder), allow_patterns=list(wanted), ignore_patterns=["*.bin"]
        ))
    except Exception as error:
        raise Refusal(
            f"nothing lies at {folder} here, and as a name on the hub it could not be fetched "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); give the folder of one that was "
            "downloaded elsewhere"
        ) from error


def read_json(file: File) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refusal(f"{file} is missing: give a folder written by save_pretrained") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} is not JSON ({error}); write it again with save_pretrained") from error


def understood(model_class: str, config: Mapping[str, Any], silent: Collection[str] = ()) -> dict[str, Any]:
    """The keys that the class takes. Any other is refused, unless it is empty or one of `silent`, which say nothing
    of what the model computes."""
    import diffusers

    known = inspect.signature(getattr(diffusers, model_class).__init__).parameters
    for key, value in config.items():
        # null and false say nothing: configs of older versions are full of them
        if key not in known and key not in silent and value not in (None, False):
            raise Refusal(f"{model_class}: its config.json sets {key}, which this diffusers does not know"
                          f"{nearest(key, known)}")
    return {k: v for k, v in config.items() if k in known}


def built(model_class: str, config: Mapping[str, Any]) -> Any:
    """The model with fresh weights; its `config` has the defaults filled in."""
    import diffusers

    try:
        return getattr(diffusers, model_class).from_config(dict(config))
    except UNBUILDABLE as error:
        raise Refusal(f"{model_class}: diffusers cannot build it from its config.json: "
                      f"{type(error).__name__}: {error}") from error


def folder_weights(home: File) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in _weight_files(home):
        weights |= read_weights(file)
    return weights


def _weight_files(home: File) -> list[File]:
    index = home / f"{WEIGHTS}.index.json"
    if (home / WEIGHTS).is_file():
        return [home / WEIGHTS]
    if index.is_file():
        files = [home / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        for file in files:
            if not file.is_file():
                raise Refusal(f"{file} is missing: {index.name} names it; download the folder again")
        return files
    pickled = [f.name for suffix in PICKLES for f in sorted(home.glob(f"*.{suffix}"))]
    if pickled:
        raise Refusal(f"{home}: {pickled[0]} is a pickle, which is never opened; convert it to safetensors "
                      "(from_pretrained, then save_pretrained, in an environment you trust)")
    others = [f.name for f in sorted(home.glob("*.safetensors"))]
    raise Refusal(f"{home}: {WEIGHTS} is missing" + (f"; there is {', '.join(others)}: rename it" if others else
                  "; give the folder with its weights"))

"""Frozen representation encoders as encoder halves: a transformer of the `transformers` package answers the map of its
patch tokens [B, C, h, w]. transformers is imported on first use: that takes seconds."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.nets.build import buildable
from stillroom.nets.folders import PICKLES, UNBUILDABLE, local_folder, read_json
from stillroom.nets.vit import as_map
from stillroom.nets.weights import read_weights
from stillroom.settings import Refusal, nearest

HUB = {"dinov2": "facebook/dinov2-with-registers-base", "siglip2": "google/siglip2-base-patch16-256",
       "mae": "facebook/vit-mae-base"}
"""The encoders of the paper, by the names that it calls them."""
WANTED = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5,) * 3, (0.5,) * 3


def plain(model: Any, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


def interpolating(model: Any, x: Tensor) -> Tensor:
    return model(x, interpolate_pos_encoding=True).last_hidden_state


def unshuffled(model: Any, x: Tensor) -> Tensor:
    """A masked autoencoder's, of all patches in their own order: it hides none (mask_ratio 0) and sorts by `noise`."""
    count = x.shape[-2] * x.shape[-1] // model.config.patch_size**2
    order = torch.arange(count, device=x.device, dtype=torch.float32).expand(x.shape[0], -1)
    return model(x, noise=order, interpolate_pos_encoding=True).last_hidden_state


def in_rows(model: Any, x: Tensor) -> Tensor:
    """SigLIP 2 of any resolution takes patches in rows, each as [p, p, 3]."""
    p, (height, width) = model.config.patch_size, x.shape[-2:]
    rows = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[height // p, width // p]], device=x.device).expand(x.shape[0], -1)
    return model(rows, None, shapes).last_hidden_state


class Family(NamedTuple):
    model: str                                  # the class in transformers
    norm: str                                   # its last LayerNorm
    ask: Callable[[Any, Tensor], Tensor]
    extra: Callable[[Any], int]                 # tokens before those of the patches
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET      # where the folder does not say
    others: tuple[str, ...] = ()                # prefixes of other parts that a checkpoint of the whole model has


def _registers(config: Any) -> int:
    return 1 + config.num_register_tokens


_TEXT = ("text_model.", "logit_", "classifier.")
_SIGLIP = Family("SiglipVisionModel", "post_layernorm", interpolating, lambda _: 0, HALF, _TEXT)
_SIGLIP2 = Family("Siglip2VisionModel", "post_layernorm", in_rows, lambda _: 0, HALF, _TEXT)
FAMILIES = {        # by `model_type` of their config.json
    "dinov2": Family("Dinov2Model", "layernorm", plain, lambda _: 1, others=("classifier.",)),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm", plain, _registers,
                                    others=("classifier.",)),
    "dinov3_vit": Family("DINOv3ViTModel", "norm", plain, _registers),
    "siglip": _SIGLIP, "siglip_vision_model": _SIGLIP, "siglip2": _SIGLIP2, "siglip2_vision_model": _SIGLIP2,
    "vit_mae": Family("ViTMAEModel", "layernorm", unshuffled, lambda _: 1, others=("decoder.",)),
}


def transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise Refusal("encoders of pictures and of prompts need transformers: pip install 'stillroom[rae]'") from None
    return transformers


@buildable
class TokenEncoder(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to tokens [B, C, H / patch, W / patch]; class and register tokens are dropped.

    Pictures are brought to the encoder's own patch size first, bicubically as the released code does it: 256 pixels in
    patches of 16 are 224 in patches of 14. The last LayerNorm has lost its affine part: a token has mean 0 and variance
    1 over the channels. Always in eval mode, because it never learns.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, family: str, config: Mapping[str, Any], patch: int, mean: tuple[float, ...] = IMAGENET[0],
                 std: tuple[float, ...] = IMAGENET[1]):
        super().__init__()
        self.kind, self.family, self.patch, self.pixels = family, FAMILIES[family], patch, (tuple(mean), tuple(std))
        self.model = _empty(self.family, config)
        (norm,) = (m for name, m in self.model.named_modules() if name.rpartition(".")[2] == self.family.norm)
        norm.weight = norm.bias = None                                  # pyright: ignore[reportAttributeAccessIssue]
        self.channels = int(self.model.config.hidden_size)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TokenEncoder":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        own, (height, width) = self.model.config.patch_size, (n // self.patch for n in x.shape[-2:])
        size = height * own, width * own
        x = x if tuple(x.shape[-2:]) == size else functional.interpolate(x, size, mode="bicubic", align_corners=False)
        tokens = self.family.ask(self.model, (x - self.mean) / self.std)
        return as_map(tokens[:, self.family.extra(self.model.config) :].float(), height, width)


def _empty(family: Family, config: Mapping[str, Any]) -> Any:
    """With fresh weights."""
    model = getattr(transformers(), family.model, None)
    if model is None:
        raise Refusal(f"{family.model}: this transformers does not have it; install a newer one")
    try:
        return model(model.config_class(**config))
    except (*UNBUILDABLE, AttributeError) as error:
        raise Refusal(f"{family.model}: transformers cannot build it from its config.json: "
                      f"{type(error).__name__}: {str(error)[:200]}") from error


def own_fields(config: Any) -> dict[str, Any]:
    """What the configuration says of the model itself, defaults filled in; not which program wrote it."""
    common = transformers().PreTrainedConfig().to_dict().keys() | {"out_features", "out_indices", "stage_names"}
    return json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k not in common}))


def token_encoder(folder: str | Path, patch: int) -> TokenEncoder:
    """Of a folder written by save_pretrained, a hub name, or a name of `HUB`; `patch` is how many pixels of a picture
    a token shall span."""
    home = local_folder(HUB.get(str(folder), folder), WANTED)
    config = read_json(home / "config.json")
    name = str(config.get("model_type") or config.get("_class_name") or "model without model_type")
    if name not in FAMILIES:
        raise Refusal(f"{home / 'config.json'}: a {name} is no known representation encoder{nearest(name, FAMILIES)}")
    family, fields = FAMILIES[name], config.get("vision_config", config)
    with refusing(f"{home / 'config.json'}", family):
        parsed = getattr(transformers(), family.model).config_class.from_dict(dict(fields))
    fields = own_fields(parsed) | ({"mask_ratio": 0.0} if name == "vit_mae" else {})
    encoder = TokenEncoder(name, fields, patch, *_pixels(home, family))
    fill(encoder, _weights(home), home)
    return encoder


def _pixels(home: Path, family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1] that the encoder was trained with."""
    file = home / "preprocessor_config.json"
    told = read_json(file) if file.is_file() else {}
    mean, std = (told.get(f"image_{name}", default) for name, default in zip(("mean", "std"), family.pixels,
                                                                             strict=True))
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        raise Refusal(f"{file}: image_mean {mean} and image_std {std} must be three numbers each, the latter above 0")
    return tuple(map(float, mean)), tuple(map(float, std))


def _weights(home: Path) -> dict[str, Tensor]:
    index = home / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if (home / name).is_file():
            continue
        pickled = [f.name for suffix in PICKLES for f in sorted(home.glob(f"*.{suffix}"))]
        raise Refusal(f"{home}: {name} is missing" + (
            f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors (from_pretrained, then "
            "save_pretrained, in an environment you trust)" if pickled else "; give the folder with its weights"))
    return {key: w for name in names for key, w in read_weights(home / name).items()}


def fill(encoder: TokenEncoder, weights: Mapping[str, Tensor], where: Path) -> None:
    """Every weight of the encoder, and no other; the affine part of its last norm may be there, and is dropped. Names
    of other versions are translated by transformers' own table, which is why it does the loading."""
    family, model = encoder.family, encoder.model
    kept = {k: w.float() for k, w in weights.items() if not k.startswith(family.others)}
    with refusing(str(where), family), quiet():
        loaded, told = type(model).from_pretrained(
            None, config=model.config, state_dict=kept, output_loading_info=True, ignore_mismatched_sizes=True,
            dtype=torch.float32)
    wrong = {"missing": {k for k in told["missing_keys"] if k.split(".")[-2:-1] != [family.norm]},
             "unexpected": told["unexpected_keys"], "of another shape": {str(k[0]) for k in told["mismatched_keys"]}}
    lines = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
             for what, keys in wrong.items() if keys]
    if lines:
        raise Refusal(f"{where}: the weights do not fit {family.model}: {'; '.join(lines)}; the config.json and the "
                      "weights must be of the same model")
    state = loaded.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})


@contextmanager
def refusing(where: str, family: Family):
    try:
        yield
    except (*UNBUILDABLE, AttributeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise Refusal(f"{where}: transformers cannot read it as {family.model}: {type(error).__name__}: {text}"
                      ) from error


@contextmanager
def quiet():
    """transformers draws a bar and prints a table where it loads; what is wrong is said in one line instead."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

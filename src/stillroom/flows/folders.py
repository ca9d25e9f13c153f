"""Teachers from local diffusers folders: the model, its weights to the last key, and its scheduler read as a path.

What concerns only the scheduler's own sampler (clipping, spacing of steps, Karras grids) is not taken. A latent-space
model makes latents, on the diffusion side of its VAE. diffusers is imported on first use: that takes seconds.
"""

import math
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.flows.denoiser import Denoiser
from stillroom.flows.flow import Flow
from stillroom.nets.build import buildable
from stillroom.nets.embed import one_time_per_sample
from stillroom.nets.folders import built, folder_weights, local_folder, read_json, understood
from stillroom.nets.last import LAST, in_float32
from stillroom.nets.weights import require_same
from stillroom.paths import Kind, Linear, Path, Tabulated
from stillroom.settings import Refusal, nearest

MODELS = ("UNet2DModel", "DiTTransformer2DModel")
CHAINS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
    "LMSDiscreteScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler",
)
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
PREDICTIONS: Mapping[str, Kind] = {"epsilon": "eps", "sample": "x0", "v_prediction": "angular"}
WANTED = ("model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model*", "unet/*",
          "transformer/*", "scheduler/*")


@buildable
class DiffusersNet(nn.Module):
    """A diffusers model under the contract net(x_t, t, y, r): it is asked at its own timestep, t * scale + offset."""

    two_times = False

    def __init__(self, model_class: str, config: Mapping[str, Any], scale: float = 1000.0, offset: float = -1.0):
        super().__init__()
        self.model = model = _empty(model_class, config)
        self.scale, self.offset, self.last = scale, offset, LAST[model_class]
        settings = model.config
        size = settings["sample_size"]
        self.channels = settings["in_channels"]
        self.shape = (self.channels, *(size if isinstance(size, list | tuple) else (size, size)))
        if model_class == "DiTTransformer2DModel":
            self.classes, self.null = settings["num_embeds_ada_norm"], settings["num_embeds_ada_norm"]
            for module in model.modules():  # else labels would be dropped at random inside the model in training
                if hasattr(module, "class_embedder"):
                    module.class_embedder.dropout_prob = 0.0
        else:
            self.classes, self.null = settings["num_class_embeds"], None

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        if r is not None:
            raise ValueError("a diffusers model takes one time: r was given")
        one_time_per_sample(x_t, t)
        if y is not None and self.classes is None:
            raise ValueError("this diffusers model takes no labels")
        k = (t * self.scale + self.offset).clamp(min=0)
        with in_float32(self.model, self.last):
            answer = self.model(x_t, k, class_labels=self._labels(x_t, y), return_dict=False)[0]
        return answer[:, : self.channels]  # the rest is a learned variance

    def _labels(self, x_t: Tensor, y: Tensor | None) -> Tensor | None:
        if self.classes is None or self.null is not None:
            return torch.full((len(x_t),), self.null, device=x_t.device) if y is None and self.null is not None else y
        if y is None or bool((y >= self.classes).any()):
            raise Refusal(
                f"this UNet2DModel has no null class, all {self.classes} of its embeddings are classes: "
                "give every sample a label and use guidance 1"
            )
        return y


def from_diffusers(folder: str | File) -> Flow:
    """The flow of a pipeline folder, or of a model's folder with scheduler/scheduler_config.json in it."""
    root = local_folder(folder, WANTED)
    home = _model_folder(root)
    config = read_json(home / "config.json")
    model_class = _model_class(config, home)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    path, prediction, scale, offset, shift = scheduler_of(root, home)
    net = DiffusersNet(model_class, config, scale, offset)
    load_weights(net.model, home)
    return flow_of(net, net.shape, path, prediction, shift)


def flow_of(net: nn.Module, shape: tuple[int, ...], path: Path, prediction: Kind, shift: float) -> Flow:
    sampler, steps = ("euler", 25) if isinstance(path, Linear) else ("ddim", 50)
    return Flow(Denoiser(net, path, prediction), shape, sampler, steps, shift).eval()


def _model_folder(root: File) -> File:
    """Subfolders as pipelines write them; or flat, as the first pipelines did and as a model alone is saved."""
    for home in (root / "unet", root / "transformer", root):
        if (home / "config.json").is_file():
            return home
    raise Refusal(f"{root} holds no model: neither unet/config.json, transformer/config.json nor config.json is there")


def _model_class(config: Mapping[str, Any], home: File) -> str:
    name = config.get("_class_name", "")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"  # as the DiT checkpoints on the hub were saved
    if name not in MODELS:
        raise Refusal(f"{home / 'config.json'}: a {name or 'model without _class_name'} cannot be a teacher"
                      f"{nearest(name, MODELS)}")
    return name


def _empty(model_class: str, config: Mapping[str, Any]) -> Any:
    """The model with fresh weights, its configuration understood to the last key."""
    if model_class not in MODELS:
        raise Refusal(f"no teacher is made from a {model_class!r}{nearest(model_class, MODELS)}")
    config = understood(model_class, config)
    if config.get("time_embedding_type", "positional") != "positional":
        raise Refusal(f"{model_class}: time_embedding_type {config['time_embedding_type']!r} has no times between the "
                      "discrete ones; only 'positional' can be a teacher")
    if config.get("class_embed_type") is not None:
        raise Refusal(f"{model_class}: class_embed_type {config['class_embed_type']!r} is not a class label; "
                      "only num_class_embeds can be used")
    model = built(model_class, config)
    settings = model.config
    if settings["sample_size"] is None:
        raise Refusal(f"{model_class}: its config.json has no sample_size; add the size of what it makes")
    into, out = settings["in_channels"], settings["out_channels"]
    if out not in (None, into, 2 * into):
        raise Refusal(f"{model_class}: it answers {out} channels for {into}; a teacher answers as many as it is given, "
                      "or twice as many with a learned variance")
    return model


def load_weights(model: Any, home: File) -> None:
    # diffusers' own table of the attention names it has since changed; it renames in place
    weights = model._fix_state_dict_keys_on_load(folder_weights(home))
    require_same(model.state_dict(), weights, type(model).__name__, home)
    model.load_state_dict(weights)


def scheduler_of(root: File, home: File, tokens: int | None = None) -> tuple[Path, Kind, float, float, float]:
    """(path, prediction, scale and offset of the net's timestep, shift of the sampler's times). `tokens`: of the
    picture as the model's pipeline counts them, where the shift may depend on its size."""
    return _scheduler(_scheduler_config(root, home), tokens)


def _scheduler_config(root: File, home: File) -> dict[str, Any]:
    places = [root / "scheduler", home / "scheduler", root, home]
    for place in places:
        if (place / "scheduler_config.json").is_file():
            return read_json(place / "scheduler_config.json")
    raise Refusal(f"{root}: scheduler/scheduler_config.json is missing: it says what the model predicts and on which "
                  "path; save the scheduler there")


def _scheduler(config: Mapping[str, Any], tokens: int | None) -> tuple[Path, Kind, float, float, float]:
    name = config.get("_class_name", "")
    if name not in CHAINS + FLOWS:
        raise Refusal(f"scheduler_config.json: no path is known for a {name or 'scheduler without _class_name'}"
                      f"{nearest(name, CHAINS + FLOWS)}")
    import diffusers

    kind = getattr(diffusers, name)
    try:
        scheduler = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Refusal(f"scheduler_config.json: diffusers cannot build a {name} from it: {error}") from error
    settings = scheduler.config  # with the defaults of its class filled in
    steps = float(settings["num_train_timesteps"])
    for key in ("use_dynamic_shifting", "invert_sigmas", "use_flow_sigmas"):
        if settings.get(key) and not (key == "use_dynamic_shifting" and name in FLOWS and tokens):
            raise Refusal(f"scheduler_config.json: {_WHY[key]}")
    if name in FLOWS:
        return Linear(), "v", steps, 0.0, _shift(settings, tokens)
    if settings.get("timestep_type", "discrete") != "discrete":
        raise Refusal("scheduler_config.json: timestep_type 'continuous' asks the model at log sigma / 4, and only "
                      "models asked at discrete times can be teachers")
    if config.get("predict_epsilon") is False:  # a key of the first versions, which diffusers now passes over
        raise Refusal("scheduler_config.json: predict_epsilon false is now called prediction_type 'sample': write that")
    prediction = settings["prediction_type"]
    if prediction not in PREDICTIONS:
        raise Refusal(f"scheduler_config.json: no prediction_type {prediction!r} on this path"
                      f"{nearest(str(prediction), PREDICTIONS)}")
    return _chain(scheduler), PREDICTIONS[prediction], steps, -1.0, 1.0


def _shift(settings: Mapping[str, Any], tokens: int | None) -> float:
    """Fixed, or by the pipelines' own formula: mu is linear in the number of tokens."""
    if not settings.get("use_dynamic_shifting") or tokens is None:
        return float(settings["shift"])
    (a, low), (b, high) = ((settings[f"{end}_image_seq_len"], settings[f"{end}_shift"]) for end in ("base", "max"))
    mu = low + (high - low) * (tokens - a) / (b - a)
    return math.exp(mu) if settings["time_shift_type"] == "exponential" else mu


def _chain(scheduler: Any) -> Tabulated:
    """The path of a scheduler's betas: by the schedule's name where we know it, else written out."""
    settings = scheduler.config
    start, end, steps = (settings[k] for k in ("beta_start", "beta_end", "num_train_timesteps"))
    schedule, betas = settings["beta_schedule"], scheduler.betas.double()
    if settings.get("rescale_betas_zero_snr"):
        # As diffusers' own solvers do: alpha_bar ends at 2^-24, not at 0, where eps would say nothing of x0.
        betas[-1] = 1 - 2.0**-24 / (1 - betas[:-1]).prod()
    elif settings["trained_betas"] is None and schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        return Tabulated(schedule, steps, start, end)
    if len(betas) != steps:
        raise Refusal(f"scheduler_config.json: {len(betas)} trained_betas for {steps} num_train_timesteps; "
                      "they must be as many")
    return Tabulated(betas=tuple(betas.tolist()))


_WHY = {
    "use_dynamic_shifting": "use_dynamic_shifting makes the shift depend on the size of the image; set it to false "
                            "and shift to the value for the size you want (exp(mu) for the exponential kind)",
    "invert_sigmas": "invert_sigmas runs time backwards, which is no path here; only false can be a teacher",
    "use_flow_sigmas": "use_flow_sigmas is flow matching under another scheduler; "
                       "save a FlowMatchEulerDiscreteScheduler with shift set to flow_shift instead",
}

"""The last layers of models of diffusers, in float32 even under autocast, as those of our own nets are (`embed.final`):
scores that are subtracted differ by little, and rounded to bfloat16 their difference would be rounding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from stillroom.paths import at_least_float32

LAST: Mapping[str, tuple[str, ...]] = {
    "UNet2DModel": ("conv_norm_out", "conv_out"), "UNet2DConditionModel": ("conv_norm_out", "conv_out"),
    "DiTTransformer2DModel": ("proj_out_1", "norm_out", "proj_out_2"),
    "SD3Transformer2DModel": ("norm_out", "proj_out"), "FluxTransformer2DModel": ("norm_out", "proj_out"),
}
"""The final norm and projection, by the model's class."""


@contextmanager
def in_float32(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Inside, the model's layers of these names are asked without autocast. They are looked up at each forward:
    adapters may have come to stand in their place, and are asked so too."""
    asked: list[torch.autocast] = []

    def begin(_, inputs):
        asked.append(torch.autocast(inputs[0].device.type, enabled=False))
        asked[-1].__enter__()
        return tuple(at_least_float32(x) for x in inputs)

    def end(*_) -> None:
        asked.pop().__exit__(None, None, None)

    layers = [layer for name in names if (layer := getattr(model, name)) is not None]
    hooks = [hook for layer in layers for hook in (layer.register_forward_pre_hook(begin),
                                                   layer.register_forward_hook(end, always_call=True))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

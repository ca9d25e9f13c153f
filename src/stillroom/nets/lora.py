"""Low-rank adapters, W x + (alpha / rank) B A x with B = 0 at the start, through peft: standard LoRA files.

One set of weights then answers twice, with the adapters (a student, a fake) and without them (the teacher).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from stillroom.nets.build import buildable
from stillroom.settings import Refusal


def peft():
    try:
        import peft
    except ImportError as error:
        raise Refusal("low-rank adapters need peft, which is not installed; pip install stillroom[lora]") from error
    return peft


def adapters(net: nn.Module) -> list:
    return [m for m in net.modules() if isinstance(m, peft().tuners.lora.LoraLayer)]


def adaptable(net: nn.Module) -> list[str]:
    """Names of the layers that can carry an adapter."""
    # nn.MultiheadAttention reads the weight of its output layer without calling it: an adapter there would be dead.
    return [
        name for name, m in net.named_modules()
        if name and isinstance(m, nn.Linear | nn.Conv2d) and not isinstance(m, NonDynamicallyQuantizableLinear)
    ]


def add_lora(net: nn.Module, rank: int, alpha: float | None = None, targets: str | None = None) -> nn.Module:
    """Puts adapters into `net`, in place, on every Linear and Conv2d whose name matches the regex `targets`.

    alpha=None takes alpha = rank, a scale of 1. The weights of `net` are frozen; only the adapters take gradients.
    `describe(net)` still tells the net without adapters: what is to be saved as a product goes through `Lora`.
    """
    if adapters(net):
        raise Refusal(f"{type(net).__name__} carries adapters already: add them once, to the bare net")
    if not (known := adaptable(net)):
        raise Refusal(f"lora: a {type(net).__name__} has no Linear or Conv2d layer that could carry an adapter; learn "
                      "all of it, with rank 0")
    names = [name for name in known if targets is None or re.search(targets, name)]
    if not names:
        raise Refusal(f"no layer matches targets={targets!r}; layers that can carry an adapter: {', '.join(known)}")
    config = peft().LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType]
        # One regex, matched in full: peft reads a list as suffixes, and `out` would reach `blocks.0.out` too.
        target_modules="|".join(map(re.escape, names)),
    )
    return peft().inject_adapter_in_model(config, net)


def tie(copied: nn.Module, original: nn.Module) -> None:
    """Gives the copy the original's own parameters wherever they say the same: what is frozen in both is held once."""
    known = dict(original.named_parameters())
    for path, part in copied.named_modules():
        for name, p in part.named_parameters(recurse=False):
            same = known.get(f"{path}.{name}" if path else name)
            if same is not None and same.shape == p.shape and torch.equal(same, p):
                setattr(part, name, same)


@contextmanager
def without_lora(net: nn.Module) -> Iterator[nn.Module]:
    """Inside, `net` answers as its base."""
    layers = adapters(net)
    if not layers:
        raise Refusal(f"{type(net).__name__} carries no adapters: without_lora would change nothing")
    were_off = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            switch(layer, off=True)
        yield net
    finally:
        for layer, off in zip(layers, were_off, strict=True):
            switch(layer, off)


def switch(layer, off: bool):
    # peft also sets requires_grad here; a graph built outside the context would lose its leaves.
    flags = {p: p.requires_grad for p in layer.parameters()}
    layer.enable_adapters(not off)
    for p, flag in flags.items():
        p.requires_grad_(flag)


@buildable
class Lora(nn.Module):
    """A net with adapters that can be written down and built again. It shares the weights of `net`, and changes it."""

    def __init__(self, net: nn.Module, rank: int, alpha: float | None = None, targets: str | None = None):
        super().__init__()
        self.net = add_lora(net, rank, alpha, targets)
        self.classes: int | None = getattr(net, "classes", None)
        self.two_times: bool = getattr(net, "two_times", False)
        self.guided: bool = getattr(net, "guided", False)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        return self.net(x_t, t, y, r) if w is None else self.net(x_t, t, y, r, w)

    def base(self):
        """`with student.base(): student(x_t, t)` answers as the net did before it had adapters."""
        return without_lora(self.net)

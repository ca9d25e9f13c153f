"""Frozen weights that lie in the processor's memory, and are on the accelerator only while their network answers."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn

WORKS_ON = "works_on"


def offload(net: nn.Module) -> None:
    """In place. Its parameters are to be frozen, and no other network's. A graph that goes through an answer keeps the
    weights that were brought for it until it is gone itself."""
    device, at_rest = device_of(net), {id(p): resting(p) for p in net.parameters()}
    places = [(module, name, at_rest[id(p)]) for module in net.modules()
              for name, p in module.named_parameters(recurse=False, remove_duplicate=False)]

    def bring(*_) -> None:
        brought = {id(p): nn.Parameter(p.to(device, non_blocking=True), False) for p in at_rest.values()}
        for module, name, p in places:
            setattr(module, name, brought[id(p)])

    def leave(*_) -> None:
        for module, name, p in places:
            setattr(module, name, p)

    leave()
    vars(net)[WORKS_ON] = device
    net.register_forward_pre_hook(bring)
    net.register_forward_hook(leave, always_call=True)


def resting(p: nn.Parameter) -> nn.Parameter:
    """Page-locked where that makes the way to the accelerator shorter."""
    here = p.detach().cpu()
    return nn.Parameter(here.pin_memory() if p.is_cuda else here, False)


def device_of(module: nn.Module) -> torch.device:
    """Where it answers; its weights may rest elsewhere."""
    return next(chain(working(module), (p.device for p in chain(module.parameters(), module.buffers()))),
                torch.device("cpu"))


def working(module: nn.Module) -> Iterator[torch.device]:
    return (vars(each)[WORKS_ON] for each in module.modules() if WORKS_ON in vars(each))

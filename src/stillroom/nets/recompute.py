"""Gradient checkpointing: activations of a network's blocks are computed again in the backward pass, not kept."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stillroom.nets.ddt import TokenBlock
from stillroom.nets.dit import Block
from stillroom.settings import Refusal


class Recomputed:
    """Before a block's class: what it computes where gradients are asked for is computed twice."""

    def forward(self, x, c):
        plain = super().forward     # pyright: ignore[reportAttributeAccessIssue]
        return checkpoint(plain, x, c, use_reentrant=False) if torch.is_grad_enabled() else plain(x, c)


class RecomputedBlock(Recomputed, Block):
    pass


class RecomputedTokenBlock(Recomputed, TokenBlock):
    pass


OURS = {Block: RecomputedBlock, TokenBlock: RecomputedTokenBlock}


def recompute(net: nn.Module) -> None:
    """In place, of our transformers' blocks and of models of diffusers; names of weights stay as they are."""
    found = False
    for module in net.modules():
        if isinstance(module, Recomputed):
            found = True
        elif type(module) in OURS:
            module.__class__, found = OURS[type(module)], True
        elif getattr(module, "_supports_gradient_checkpointing", False):
            module.enable_gradient_checkpointing()      # pyright: ignore[reportCallIssue]
            found = True
    if not found:
        raise Refusal(f"checkpointing: a {type(net).__name__} has no blocks that could be computed again; leave it out")

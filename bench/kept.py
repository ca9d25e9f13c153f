"""What a sample of a text-to-image teacher keeps between forward and backward, with `--checkpointing` and without.

Counted in float32 on tensors that hold no numbers, so that any machine can; attention is the processor's fused one.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prompted import CASES, Case
from stillroom.flows.prompted import PromptedNet
from stillroom.flows.prompts import Prompts
from stillroom.nets.recompute import recompute


def kept(net: nn.Module, *given: torch.Tensor) -> int:
    """Bytes that are saved for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        saved[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        answer = net(*given)  # held, and its graph, until all is counted
    total = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    del answer
    return total


def of_a_sample(case: Case, checkpointing: bool) -> int:
    shape = (4, case.side, case.side)
    with FakeTensorMode():
        told = Prompts(case.pipeline, 8 * case.side, shape, (2, *case.tokens), (2, case.pooled) if case.pooled else (),
                       "", "", ("a",))
        net = PromptedNet("UNet2DConditionModel", case.unet, told)
        if checkpointing:
            recompute(net)
        return kept(net, torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


if __name__ == "__main__":
    for name, case in CASES.items():
        without, again = (of_a_sample(case, checkpointing) / 2**30 for checkpointing in (False, True))
        print(f"{name.split(' pixels')[0]} pixels: {without:.2f} GiB a sample, {again:.2f} with --checkpointing")

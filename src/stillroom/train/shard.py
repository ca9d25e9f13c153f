"""FSDP2 as a setting: every network that learns, and each of its repeated blocks, sharded over the processes.

What is sharded is whole only while its own forward runs. So it is networks that are sharded, and not what is put
around them: a denoiser and a generator are asked in several ways, and are made anew around the same network.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from stillroom.flows import Bare, Denoiser, FewStep, Flow, OneStep
from stillroom.nets.heads import Critic, Heads
from stillroom.nets.resnet import MaskedResNet
from stillroom.settings import Refusal
from stillroom.train.recipe import Role
from stillroom.train.world import World

AROUND = (Denoiser, Bare, OneStep, FewStep, Flow, nn.ModuleList, nn.ModuleDict)
# Small; and their parts are asked one by one, or gradients of gradients taken, for which FSDP2 does not gather again.
WHOLE = (Heads, Critic, MaskedResNet)


def shard(roles: Mapping[str, Role], world: World) -> None:
    if world.size == 1:
        raise Refusal("shard needs several processes: start with torchrun or accelerate launch, or leave it off")
    for name, role in roles.items():
        if role.optimizer.name == "adamw8bit":
            raise Refusal(f"role {name}: adamw8bit works on whole tensors; leave out --shard, or take adamw")
        if not all(p.is_contiguous() for p in role.module.parameters()):
            raise Refusal(f"role {name}: its weights lie channels last, as those of codecs do, and FSDP2 shards none "
                          "such; leave out --shard")
    for role in roles.values():
        for module in (role.module, role.average and role.average.module):
            for net in () if module is None else networks(module):
                by_blocks(net)


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """What is asked by its own forward, whoever asks, and nothing of what stays whole."""
    if isinstance(module, AROUND):
        for child in module.children():
            yield from networks(child)
    elif not isinstance(module, WHOLE):
        yield module


def by_blocks(net: nn.Module) -> None:
    """Blocks within blocks first, as FSDP2 wants it; a single layer is no block."""
    from torch.distributed.fsdp import fully_shard

    lists = [each for each in reversed(list(net.modules())) if isinstance(each, nn.ModuleList)]
    blocks = [block for each in lists for block in each if any(block.children())]
    for part in (*blocks, net):
        if not all(is_sharded(p) for p in part.parameters()):
            # resharded after every forward: averages and optimizers work on the shards
            fully_shard(part, reshard_after_forward=True)


def is_sharded(p: Tensor) -> bool:
    return hasattr(p, "device_mesh")


@contextmanager
def gathered(roles: Iterable[Role]) -> Iterator[None]:
    """What lies beside blocks is whole inside: FSDP2 gathers it when a gradient comes by the net's answer, as that of
    heads on a hidden layer never does."""
    from torch.distributed.fsdp import FSDPModule

    nets = [net for role in roles for net in networks(role.module) if isinstance(net, FSDPModule)]
    for net in nets:
        net.unshard()
    yield
    for net in nets:
        net.reshard()

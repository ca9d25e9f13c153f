"""FSDP2 as a setting: each role's module, and each of its repeated blocks, sharded over the processes."""

from collections.abc import Mapping

from torch import nn

from stillroom.settings import Refusal
from stillroom.train.recipe import Role
from stillroom.train.world import World


def shard(roles: Mapping[str, Role], world: World) -> None:
    if world.size == 1:
        raise Refusal("shard needs several processes: start with torchrun or accelerate launch, or leave it off")
    for name, role in roles.items():
        if role.optimizer.name == "adamw8bit":
            raise Refusal(f"role {name}: adamw8bit works on whole tensors; leave out --shard, or take adamw")
    from torch.distributed.fsdp import fully_shard

    def by_blocks(module: nn.Module) -> None:
        # resharded after every forward: averages and optimizers work on the shards
        for child in module.modules():
            if isinstance(child, nn.ModuleList):
                for block in child:
                    fully_shard(block, reshard_after_forward=True)
        fully_shard(module, reshard_after_forward=True)

    for role in roles.values():
        by_blocks(role.module)
        if role.average is not None:
            by_blocks(role.average.module)

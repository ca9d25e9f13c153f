"""Run by a launcher in tests/test_processes.py: the three roles, sharded or copied, or recipes that were found broken
when they were sharded."""

import sys
from pathlib import Path

import torch

from stepping import few_ends
from stillroom.data import Tensors
from stillroom.flows import Denoiser, Flow
from stillroom.nets import MLP
from stillroom.paths import Linear
from stillroom.recipes import find
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.dmvae import ScoreNet
from stillroom.settings import Optimizer
from stillroom.train import Product, Silent, start
from stillroom.train.product import save_product
from stillroom.train.world import open_world
from three_roles import Settings, ThreeRoles, points

# Moves weights by far more than the tests allow for rounding, which Adam would make much of where gradients vanish.
FAST = Optimizer(lr=0.05, name="sgd", clip=1.0)
HEADS = Adversarial(weight=1.0, head=FAST)
CASES = {
    "dmd": ("dmd", {"student": FAST, "score": FAST, "every": 2}),
    "dmd, heads": ("dmd", {"student": FAST, "score": FAST, "adversarial": HEADS}),
    "dmd, heads on what learns": ("dmd", {"student": FAST, "score": FAST, "adversarial": HEADS, "fake_lora": 2}),
    "dmd, heads that teach": ("dmd", {"student": FAST, "score": FAST, "adversarial": HEADS, "judge": "fake",
                                      "judge_weight": 1.0}),
    "sid, heads on what learns": ("sid", {"student": FAST, "score": FAST, "adversarial": HEADS}),
    "boot": ("boot", {"student": FAST}),
    "gdd": ("gdd", {"student": FAST, "critic": FAST, "lazy": 2, "width": 16}),
    "sds": ("sds", {"particles": FAST, "conditional": True}),
    "vsd": ("vsd", {"particles": FAST, "score": FAST, "conditional": True, "fake": "lora", "rank": 2}),
    "msd": ("msd", {"student": FAST, "students": 2}),
    "msd, smaller": ("msd", {"student": FAST, "students": 2, "width": 8, "match_steps": 2, "matching": FAST,
                              "teacher_samples": 16}),
    "endpoint": ("endpoint", {"student": FAST, "pairs": 16, "teacher_steps": 2}),
    "drifting": ("drifting", {"student": FAST, "data": "clusters", "size": 1, "support": 4, "bank": 8, "groups": 4,
                              "early": 0.5}),
    "decoupled-dmd, statistics": ("decoupled-dmd", {"student": FAST, "guidance": 2.0,
                                                    "shield": "statistics"}),
}
SPREAD = ("dmd, heads on what learns", "dmd, heads that teach", "gdd", "sds", "msd, smaller", "drifting",
          "decoupled-dmd, statistics")
"""Over two processes too; the last two carry gradients back through what is gathered."""

SMALL = {"data": "given", "size": 8, "steps": 4, "batch": 16, "precision": "float32", "device": "cpu", "log_every": 1,
         "perceptual": 0.0, "critic_width": 4, "adversarial": 0.5, "critic_from": 0.0, "adversarial_from": 0.0,
         "model": FAST, "critic": FAST}
BALANCED = {
    "tokenizer": {"encoder": "conv", "patch": 4, "latent": 3, "params": 4000, "decoder_params": 4000},
    "dmvae": {"reference": "gaussian", "every": 2, "fake_steps": 1, "decoder_steps": 2, "decoder": FAST, "score": FAST,
              "score_net": ScoreNet(width=16, depth=1)},
}
"""Recipes whose critic's term is weighed by gradients of all processes together; the second begins with what the first
leaves."""


class NoDropout(ThreeRoles):
    """A mask belongs to a process's own samples, so two processes draw other masks than one."""

    def __init__(self, settings, data):
        super().__init__(settings, data)
        self.student.net[2].p = 0.0
        self.mean.module.net[2].p = 0.0


def save_teacher(place: Path) -> None:
    """Of random weights: what is asked is whether two runs agree, and not whether they learn."""
    draw = torch.Generator().manual_seed(1)
    net = MLP(2, 16, 2, classes=4)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    flow = Flow(Denoiser(net, Linear(), "v"), (2,), "heun", 4)
    save_product(Product("flow", {"flow": flow}, {"shape": [2], "classes": 4}), place)


def run(case: str, out: Path, teacher: Path, shard: bool) -> Path:
    """A few steps of a recipe, without the gate, which such a teacher would not pass."""
    name, told = CASES[case]
    recipe = find(name)
    ungated = type(recipe.__name__, (recipe,), {"check": lambda self, batch: None})
    few = {} if "data" in told else few_ends(recipe, told, 16)
    settings = recipe.Settings(**{"out": out, "teacher": str(teacher), "steps": 4, "batch": 16, "precision": "float32",
                                  "device": "cpu", "log_every": 1, "shard": shard, **few, **told})
    data = Tensors(torch.randn(64, 2, generator=torch.Generator().manual_seed(2)), torch.arange(64) % 4)
    start(ungated, settings, name, {"data": data} if "data" in told else None, Silent())
    return out


def balanced(name: str, out: Path, codec: Path | None) -> Path:
    """A few steps beside a critic, on noise for pictures."""
    recipe = find(name)
    ungated = type(recipe.__name__, (recipe,), {"check": lambda self, batch: None})
    more = {} if name == "tokenizer" else {"codec": str(codec)}
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    start(ungated, recipe.Settings(**{"out": out, **SMALL, **BALANCED[name], **more}), name, {"data": Tensors(x)},
          Silent())
    return out


if __name__ == "__main__":
    out, how = Path(sys.argv[1]), sys.argv[2]
    if how == "balanced":
        with open_world("cpu"):
            for name in BALANCED:
                balanced(name, out / name, Path(sys.argv[3]))
        sys.exit()
    if how == "recipes":
        with open_world("cpu") as world:
            assert world.each(f"process {world.rank}") == ["process 0", "process 1"]
            for case in SPREAD:
                run(case, out / case, Path(sys.argv[3]), shard=True)
    else:
        settings = Settings(out=out, steps=20, precision="float32", log_every=1, checkpoint_every=10,
                            shard=how == "shard", accumulate=2 if how == "accumulate" else 1)
        start(NoDropout, settings, "three", {"data": points()}, Silent())

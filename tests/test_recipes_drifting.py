"""Drifting's options, each against what it should be by hand; what is told of a run, and how one ends that runs off."""

import pytest
import torch

from stillroom.data import Tensors
from stillroom.recipes.drifting import Drifting
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Silent, Turn, start
from stillroom.train.loop import Diverged
from stillroom.train.turn import Noise
from stillroom.train.world import World

PLAIN = {"data": "given", "size": 1, "width": 16, "depth": 1, "precision": "float32", "device": "cpu", "log_every": 1,
         "out": "unused"}


def points(count=600, classes=2, seed=0):
    """Class c lies around (c, -c)."""
    y = torch.arange(count) % classes
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return Tensors(x + torch.stack([y, -y], 1), y, [f"class {c}" for c in range(classes)], "points")


def unlabelled(count=600):
    return Tensors(points(count).x, name="points")


def made(data, **more):
    torch.manual_seed(0)
    return Drifting(Drifting.Settings(**{"batch": 64, "support": 16, **PLAIN, **more}), data)


def turn_at(step=0, batch=64, watched=False):
    return Turn(step=step, stage="train", roles=frozenset({"student"}), batch=batch, micros=1, micro=0,
                watched=watched, world=World(0, 1, torch.device("cpu")), noise=Noise(0, step, torch.device("cpu")))


# ---- how a run ends that runs off ----

@pytest.mark.parametrize(("more", "term"), [
    ({}, "identity"), ({"noising": "query"}, "query"), ({"strongest": 3.0}, "identity"),
    ({"coverage": 1.0}, "identity"),
], ids=str)
def test_samples_that_run_off_stop_the_run_as_any_loss_does(tmp_path, more, term):
    far = Optimizer(lr=1e30, clip=0.0, warmup=0)
    settings = Drifting.Settings(**{**PLAIN, "out": tmp_path / "run", "batch": 32, "support": 16, "steps": 5,
                                    "checkpoint_every": 1, "student": far, **more})
    with pytest.raises(Diverged, match=f"role student: {term} became nan at step 1; the checkpoint of step 1 is kept"):
        start(Drifting, settings, "drifting", {"data": points()}, Silent())


def test_data_that_are_no_numbers_are_refused_still():
    recipe = made(points())
    recipe.bank.x[:, ::2] = torch.nan
    with pytest.raises(Refusal, match="look at what made them") as error:
        recipe.losses(None, turn_at(watched=True))
    assert not isinstance(error.value, Diverged)

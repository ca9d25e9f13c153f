"""Moments of AdamW in 8 bits: they take a quarter, train, and survive a stop bit for bit."""

import dataclasses

import pytest
import torch

from stillroom.data import Tensors
from stillroom.recipes.flow import FlowMatching
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Silent, load_product, resume, start
from stillroom.train.folder import read_rows
from stillroom.train.loop import Trainer
from stillroom.train.run import prepared
from stillroom.train.shard import shard
from stillroom.train.world import World, open_world

pytest.importorskip("bitsandbytes", reason="adamw8bit needs bitsandbytes: pip install stillroom[memory]")
POINTS = {"data": Tensors(torch.randn(512, 2, generator=torch.Generator().manual_seed(0)) / 4)}


def settings(out, name, **more):
    return FlowMatching.Settings(out=out, data="given", size=1, width=96, depth=2, steps=60, batch=64, device="cpu",
                                 precision="float32", log_every=10, model=Optimizer(lr=2e-3, name=name), **more)


def kept(name, tmp_path) -> int:
    """Bytes of the optimizer's state after a step."""
    with open_world("cpu") as world, prepared(FlowMatching, settings(tmp_path, name), POINTS, None, Silent(),
                                              world) as trainer:
        assert isinstance(trainer, Trainer)
        with trainer.loaders({}) as loaders:
            trainer.train_step(trainer.device_batch({"data": loaders["data"].at(0)}))
        return sum(value.nbytes for state in trainer.learners["model"].optimizer.state.values()
                   for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key)


def test_it_keeps_a_quarter(tmp_path):
    assert kept("adamw8bit", tmp_path) < 0.3 * kept("adamw", tmp_path)


def test_it_trains_and_goes_on_bit_for_bit_after_a_stop(tmp_path):
    class Stopped(Silent):
        def row(self, row):
            if row["step"] == 40:
                raise KeyboardInterrupt

    asked = settings(tmp_path / "whole", "adamw8bit", checkpoint_every=20)
    whole = start(FlowMatching, asked, "flow", POINTS, Silent())
    with pytest.raises(KeyboardInterrupt):
        start(FlowMatching, dataclasses.replace(asked, out=tmp_path / "cut"), "flow", POINTS, Stopped())
    cut = resume(tmp_path / "cut", lambda _: FlowMatching, POINTS, Silent())
    first, second = (load_product(run).parts["flow"].state_dict() for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [row["model/flow"] for row in read_rows(whole / "metrics.jsonl")]
    assert losses[-1] < 0.95 * losses[0]


def test_shards_are_refused(tmp_path):
    with (open_world("cpu") as world, prepared(FlowMatching, settings(tmp_path, "adamw8bit"), POINTS, None, Silent(),
                                               world) as trainer, pytest.raises(Refusal, match="adamw8bit works on")):
        shard(trainer.roles, World(0, 2, world.device))

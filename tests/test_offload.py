"""Weights that rest off the accelerator: where they lie and when, that nothing else changes, and refusals."""

import copy

import pytest
import torch
from torch import nn

from stillroom.flows import Denoiser, Flow
from stillroom.nets import MLP
from stillroom.nets.offload import WORKS_ON, device_of, offload
from stillroom.nets.recompute import Recomputed
from stillroom.paths import Linear
from stillroom.recipes.dmd import DMD
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.hyper_sd import HyperSD
from stillroom.recipes.sid import SiD
from stillroom.recipes.swiftbrush import SwiftBrush
from stillroom.recipes.twinflow import TwinFlow
from stillroom.settings import Refusal
from stillroom.train import Silent, load, start
from students import PLAIN, POINTS, flow_of_points, points  # noqa: F401
from test_recipes_gap_scores import run


class Twice(nn.Module):
    """Two layers of one weight; it notes what it was given to answer with."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.seen: list[torch.Tensor] = []
        self.fails = False

    def forward(self, x):
        assert self.one.weight is self.two.weight
        self.seen.append(self.one.weight)
        if self.fails:
            raise RuntimeError("out of memory")
        return self.two(self.one(x).tanh())


def test_weights_are_brought_for_each_answer_and_leave_after_it_even_when_it_fails():
    net = Twice().requires_grad_(False)
    plain, x = copy.deepcopy(net), torch.randn(5, 3, requires_grad=True)
    offload(net)
    resting = dict(net.named_parameters())
    answer = net(x)
    (mine,) = torch.autograd.grad(answer.square().sum(), x)
    (its,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert torch.equal(answer, plain(x)) and torch.equal(mine, its)
    net.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        net(x)
    assert len({id(p) for p in net.seen}) == 2 and not {id(p) for p in net.seen} & {id(p) for p in resting.values()}
    assert all(p is resting[name] and not p.requires_grad for name, p in net.named_parameters())
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_samples_are_made_where_the_network_answers():
    net = MLP(2, 8, 1).requires_grad_(False)
    flow = Flow(Denoiser(net, Linear(), "v"), (2,))
    before = flow.sample(4)
    offload(net)
    vars(net)[WORKS_ON] = torch.device("cpu", 0)
    assert device_of(flow) == torch.device("cpu", 0)
    assert torch.equal(flow.sample(4), before)


@pytest.mark.parametrize("recipe", [DMD, SiD])      # SiD's gradient goes through the teacher
def test_a_run_ends_at_the_same_bits(recipe, tmp_path, teacher):
    weights = [load(run(recipe, tmp_path / str(offloaded), teacher, steps=6, offload=offloaded)).state_dict()
               for offloaded in (False, True)]
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())


def test_it_is_refused_where_nothing_could_leave(tmp_path, teacher, data):
    for recipe, more in ((SwiftBrush, {}), (DMD, {"lora": 2, "fake_lora": 2})):
        with pytest.raises(Refusal, match="offload: this run holds no network"):
            run(recipe, tmp_path / recipe.__name__, teacher, steps=6, offload=True, **more)
    settings = FlowMatching.Settings(out=tmp_path / "flow", steps=2, batch=16, offload=True, **POINTS, **PLAIN)
    with pytest.raises(Refusal, match="offload"):
        start(FlowMatching, settings, "flow", {"data": data}, Silent())


def test_what_rests_elsewhere_is_not_computed_again(tmp_path):
    x = torch.randn(20, 3, 8, 8)
    place = start(FlowMatching, FlowMatching.Settings(
        out=tmp_path / "flow", data="given", size=8, net="dit", width=8, depth=1, steps=2, batch=8, **PLAIN), "flow",
        {"data": x}, Silent())
    for offloaded in (False, True):
        made = DMD(DMD.Settings(out=tmp_path / "run", teacher=str(place), checkpointing=True, offload=offloaded,
                                **PLAIN))
        again = [any(isinstance(m, Recomputed) for m in net.modules())
                 for net in (made.origin, made.student, made.fake)]
        assert again == [not offloaded, True, True]


@pytest.mark.parametrize(("recipe", "more"), [(TwinFlow, {}), (HyperSD, {"told": True})])
def test_a_network_that_was_given_another_input_is_computed_again_too(tmp_path, recipe, more):
    place = start(FlowMatching, FlowMatching.Settings(
        out=tmp_path / "flow", data="given", size=8, net="dit", width=8, depth=1, steps=2, batch=8, **PLAIN), "flow",
        {"data": torch.randn(20, 3, 8, 8)}, Silent())
    made = recipe(recipe.Settings(out=tmp_path / "run", teacher=str(place), checkpointing=True, **more, **PLAIN))
    assert any(isinstance(m, Recomputed) for m in made.student.modules())

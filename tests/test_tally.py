"""Evaluations: that each network is counted under its own name, however it is asked, and that runs say what they took.
"""

from collections import Counter

import pytest
import torch

import stillroom
from closed_forms import plan
from stillroom.data import Tensors
from stillroom.flows import Bare, Denoiser, FewStep, Flow, Guided, Mixture, OneStep, Routed, Tally
from stillroom.nets import MLP, Lora
from stillroom.paths import Linear
from stillroom.recipes.consistency import Consistency
from stillroom.recipes.disback import DisBack
from stillroom.recipes.dmd import DMD
from stillroom.recipes.drifting import Drifting
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.msd import MSD
from stillroom.settings import Optimizer
from stillroom.settings.files import read_json
from stillroom.train import Silent, start
from stillroom.train.loop import Trainer
from stillroom.train.world import World

PLAIN = {"precision": "float32", "device": "cpu", "log_every": 5}


def student(**more) -> Denoiser:
    return Denoiser(MLP(2, 16, 1, classes=3, **more), Linear(), "v")


def counted(module, draw) -> dict[str, int]:
    tally = Tally()
    tally.watch("it", module)
    with tally.counting():
        draw()
    return dict(tally.counts)


@pytest.mark.parametrize(("sampler", "steps", "each"),
                         [("euler", 5, 5), ("ddim", 5, 5), ("heun", 5, 9), ("heun", 1, 1)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_flow_costs_its_samplers_steps_and_guidance_twice_that(sampler, steps, each, guidance):
    for denoiser in (student(), Mixture.ring(3)):
        flow = Flow(denoiser, (2,), sampler, steps)
        times = 1 if guidance == 1 else 2
        assert counted(flow, lambda flow=flow: flow.sample(7, guidance=guidance, batch=3)) == {"it": 7 * each * times}


def test_generators_cost_one_evaluation_a_step():
    one = OneStep(student().net, Linear(), "v", (2,))
    few = FewStep([student()], (2,), [plan(4), plan(2)], "renoise")
    assert counted(one, lambda: one.sample(5)) == {"it": 5}
    assert counted(few, lambda: few.sample(5)) == {"it": 20}
    assert counted(few, lambda: few.sample(5, steps=2)) == {"it": 10}
    routed = Routed([OneStep(student().net, Linear(), "v", (2,)) for _ in range(3)], (0, 1, 2))
    assert counted(routed, lambda: routed.sample(9)) == {"it": 9}


def test_a_network_without_its_adapters_counts_as_the_teacher_that_it_then_is():
    fake = student()
    fake.net = Lora(fake.net, 2)
    bare, tally = Bare(fake), Tally()
    tally.watch("fake", fake)
    tally.watch("teacher", Flow(bare, (2,)))
    x, t, y = torch.randn(4, 2), torch.full((4,), 0.5), torch.zeros(4, dtype=torch.long)
    with tally.counting():
        fake(x, t, y)
        Guided(bare, 2.0)(x, t, y)
        with tally.counting(False):
            fake(x, t, y)
    assert dict(tally.counts) == {"fake": 4, "teacher": 8}


# ---- runs ----


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    x, y = Mixture.ring(4, std=0.1).draw(800, torch.Generator().manual_seed(0))
    settings = FlowMatching.Settings(out=tmp_path_factory.mktemp("flow") / "run", data="given", size=1, width=32,
                                     depth=1, steps=300, batch=128, average=0.98,
                                     model=Optimizer(lr=5e-3, clip=1.0, decay="cosine"), **PLAIN)
    return str(start(FlowMatching, settings, "flow", {"data": Tensors(x, y, list("abcd"), "ring")}, Silent()))


def evaluations(recipe, out, **more) -> dict[str, int]:
    settings = recipe.Settings(out=out, batch=20, **PLAIN, **more)
    return read_json(start(recipe, settings, recipe.__name__.lower(), None, Silent()) / "run.json")["evaluations"]


def test_a_run_says_what_each_network_was_asked(tmp_path, teacher):
    """DMD, one step: the fake score learns in every step, and in every second one it and the teacher are compared."""
    found = evaluations(DMD, tmp_path / "dmd", teacher=teacher, steps=10, every=2)
    assert found == {"student": 10 * 20, "fake": 10 * 20 + 5 * 20, "teacher": 5 * 20}
    guided = evaluations(DMD, tmp_path / "guided", teacher=teacher, steps=10, every=2, guidance=2.0, sample_every=5)
    assert guided == {**found, "teacher": 2 * 5 * 20}                           # pictures for people are not counted
    lora = evaluations(DMD, tmp_path / "lora", teacher=teacher, steps=10, every=2, fake_lora=2)
    assert lora == found


def test_samples_that_stand_for_data_are_counted_too(tmp_path, teacher):
    steps = stillroom.load(teacher).steps
    found = evaluations(Consistency, tmp_path, teacher=teacher, steps=6, teacher_samples=50)
    assert found == {"student": 2 * 6 * 20, "teacher": 50 * (2 * steps - 1) + 6 * 20}


def test_positives_of_the_teacher_are_counted_and_once(tmp_path, teacher):
    data = {"data": Tensors(*Mixture.ring(4, std=0.1).draw(80, torch.Generator().manual_seed(0)), list("abcd"), "ring")}
    settings = Drifting.Settings(out=tmp_path / "run", teacher=teacher, data="given", size=1, positives="teacher",
                                 teacher_samples=40, groups=4, support=4, bank=8, steps=4, batch=20, checkpoint_every=2,
                                 **PLAIN)
    place = start(Drifting, settings, "drifting", data, Silent())
    steps = stillroom.load(teacher).steps
    assert (whole := read_json(place / "run.json")["evaluations"]) == {"student": 80, "teacher": 40 * (2 * steps - 1)}
    (place / "checkpoints" / "step-00000004").rename(place / "gone")
    (place / "product").rename(place / "old")
    stillroom.train.resume(place, lambda _: Drifting, data, Silent())
    assert read_json(place / "run.json")["evaluations"] == whole


def test_every_student_has_a_line_of_its_own(tmp_path, teacher):
    found = evaluations(MSD, tmp_path, teacher=teacher, students=2, steps=4)
    assert found == {"student 0": 80, "student 1": 80, "fake 0": 120, "fake 1": 120, "teacher": 80}


def test_what_recipes_within_a_recipe_hold_is_counted(tmp_path, teacher):
    """The kept networks of DisBack's way, which are no roles."""
    way = {"teacher": teacher, "steps": 16, "every": 2}
    options = {"record": 6, "kept": 1, "advance": 2}
    alone = evaluations(DisBack, tmp_path / "alone", **way, **options)
    two = evaluations(MSD, tmp_path / "two", inner="disback", students=2, teacher=teacher, steps=16,
                      options=tuple(f"{k}={v}" for k, v in {**options, "every": 2}.items()))
    assert alone["teacher"] == 5 * 20       # of 10 steps that follow the record, every second
    assert sum(two.values()) == 2 * sum(alone.values()) and two["teacher"] == 2 * alone["teacher"]


def test_evaluations_are_of_all_processes_whatever_their_number_was_before():
    trainer = Trainer.__new__(Trainer)
    trainer.world, trainer.tally = World(0, 2, torch.device("cpu")), Tally()
    trainer.tally.counts["student"] = 5
    trainer.asked_before = Counter({"student": 100, "teacher": 3})
    assert trainer.evaluations() == {"student": 110, "teacher": 3}


def test_a_resumed_run_counts_as_one_that_never_stopped(tmp_path, teacher):
    settings = DMD.Settings(out=tmp_path / "run", teacher=teacher, steps=12, batch=20, checkpoint_every=6, **PLAIN)
    place = start(DMD, settings, "dmd", None, Silent())
    whole = read_json(place / "run.json")["evaluations"]
    (place / "checkpoints" / "step-00000012").rename(place / "gone")
    (place / "product").rename(place / "old")
    stillroom.train.resume(place, lambda _: DMD, watch=Silent())
    record = read_json(place / "run.json")
    assert record["evaluations"] == whole and record["memory_gib"] > 0
    assert record["trained"] == sum(record["parameters"].values())

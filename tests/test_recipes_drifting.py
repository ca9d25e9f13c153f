"""Drifting's options, each against what it should be by hand; what is told of a run, and how one ends that runs off."""

import re

import pytest
import torch

from stillroom.data import Tensors
from stillroom.recipes.drifting import Drifting, Field
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


# ---- the field beside its floor ----

CASES = {
    "labels": (points, {}), "no labels": (unlabelled, {}), "no labels, by default": (
        unlabelled, {"batch": 512, "support": 64}),
    "noised": (points, {"noising": "both"}), "query": (points, {"noising": "query"}),
    "guided": (points, {"strongest": 3.0}), "any class": (points, {"drop": 0.5}),
}


@pytest.mark.parametrize(("source", "more"), CASES.values(), ids=CASES)
def test_real_samples_in_the_place_of_generated_ones_are_at_the_floor(source, more):
    data, ratios = source(3000), []
    recipe = made(data, **more)
    for step in range(60):
        turn = turn_at(step, recipe.settings.batch)
        group = recipe.draw_groups(turn)
        x = torch.cat([others_of(data, label, recipe.n, step) for label in group.label])
        real = recipe.bank.draw(group.label, recipe.settings.support, turn.rand((recipe.groups, 256)))
        field, floor = recipe.beside_floor(x, real.flatten(0, 1), group, turn)
        ratios += [field[name] / floor[name] for name in floor]
    assert len(ratios) > 30 and float(sum(ratios) / len(ratios)) == pytest.approx(1, abs=0.1)


def others_of(data, label, n, seed):
    """Samples of a class, of any where it is past the last, that the bank was not filled with at the start."""
    rest = torch.arange(len(data))[1200:]
    mine = rest if data.y is None or label == 2 else rest[data.y[1200:] == label]
    return data.x[mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))[:n]]]


@pytest.mark.parametrize(("source", "more", "n", "p"), [
    (points, {}, 32, 16), (unlabelled, {"batch": 512, "support": 64}, 192, 64), (unlabelled, {}, 64, 16),
    (lambda: points(40), {}, 10, 10), (unlabelled, {"noising": "query", "batch": 300}, 240, 16),
], ids=str)
def test_field_and_floor_are_of_as_many_samples_and_positives(source, more, n, p):
    recipe, asked = made(source(), **more), []
    raw = recipe.raw
    recipe.raw = lambda x, real, group, turn: asked.append((len(x), len(real))) or raw(x, real, group, turn)
    turn = turn_at(0, recipe.settings.batch, watched=True)
    recipe.losses(None, turn)
    assert asked == [(recipe.groups * n, recipe.groups * p)] * 2 and not turn.notes
    names = {name for name in turn.told if name.startswith("field/")}
    assert names >= ({"field/query", "field/query, floor"} if "noising" in more else
                     {"field/identity", "field/identity, floor", "field/identity, gate"})


def test_guided_groups_take_no_part_in_what_is_told():
    recipe, asked = made(points(classes=8), strongest=3.0, groups=8), []
    recipe.raw = lambda x, real, group, turn: asked.append((group, x, real)) or {}
    turn = turn_at(3)
    group = recipe.draw_groups(turn)
    plain = group.w == 1
    assert 0 < int(plain.sum()) < 8
    x, real = torch.arange(64.0).repeat(2, 1).T, torch.arange(128.0).repeat(2, 1).T
    recipe.beside_floor(x, real, group, turn)
    (mine, generated, positives), (same, others, more) = asked
    assert torch.equal(mine.label, group.label[plain]) and torch.equal(same.label, mine.label)
    assert torch.equal(generated, x.unflatten(0, (8, 8))[plain].flatten(0, 1)) and others.shape == generated.shape
    assert torch.equal(positives, real.unflatten(0, (8, 16))[plain].flatten(0, 1)) and more.shape == positives.shape


def test_a_floor_is_of_different_samples():
    """A bank larger than the data holds each of them more than once."""
    data = unlabelled(40)
    recipe = made(data)
    for _ in range(6):
        recipe.bank.push(data.x, None)
    turn = turn_at()
    found = recipe.real_ones(recipe.draw_groups(turn), turn)[0]
    assert len(found.unique(dim=0)) == len(found) > 25


@pytest.mark.parametrize(("data", "more", "says"), [
    (points(), {"strongest": 3.0, "plain": 0.0}, "no group of strength 1.*higher plain"),
    (unlabelled(3), {"bank": 16}, "a group of points has 3 different samples"),
    (unlabelled(3), {"bank": 16, "noising": "query"}, "a group of points has 3 different samples"),
], ids=str)
def test_where_no_floor_can_be_told_a_line_says_so(data, more, says):
    recipe, turn = made(data, **more), turn_at(watched=True)
    recipe.losses(None, turn)
    (note,) = turn.notes
    assert re.search(says, note) and "\n" not in note
    assert any(name.startswith("field/") for name in turn.told) and not any("floor" in name for name in turn.told)


@pytest.mark.parametrize("more", [
    {"field": Field(temperatures=(0.2,), coupling="joint", x_softmax=True)}, {"noising": "query", "noise": (0.05, 0.1)},
], ids=["joint", "query"])
def test_contraction_is_told_of_without_labels_too(more):
    recipe, notes = made(unlabelled(3000), **more), []
    recipe.student.forward = lambda z, y, w: 0.05 * z + torch.tensor([0.5, -0.5])
    for step in range(12):
        turn = turn_at(step, watched=True)
        recipe.losses(None, turn)
        notes += turn.notes
    assert notes and "below that of real samples" in notes[0]

"""Drifting's options, each against what it should be by hand; what is told of a run, and how one ends that runs off."""

import math
import re

import pytest
import torch

import stillroom
from stillroom import match
from stillroom.data import Tensors
from stillroom.recipes.drifting import Drifting, Field, Group
from stillroom.recipes.flow import FlowMatching
from stillroom.settings import Optimizer, Refusal, seed_of
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
    (points, {}, 32, 16), (unlabelled, {"batch": 512, "support": 64, "groups": 1}, 192, 64),
    (unlabelled, {"groups": 1}, 64, 16), (unlabelled, {}, 8, 16), (lambda: points(40), {}, 10, 10),
    (unlabelled, {"noising": "query", "batch": 300, "groups": 1}, 240, 16),
], ids=["labels", "a group larger than the bank", "one without labels", "no labels", "few samples", "query"])
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
    recipe = made(data, groups=1)
    for _ in range(6):
        recipe.bank.push(data.x, None)
    turn = turn_at()
    found = recipe.real_ones(recipe.draw_groups(turn), turn)[0]
    assert len(found.unique(dim=0)) == len(found) > 25


@pytest.mark.parametrize(("data", "more", "says"), [
    (points(), {"strongest": 3.0, "plain": 0.0}, "no group of strength 1.*higher plain"),
    (unlabelled(3), {"bank": 16}, "a group of points has 3 different samples"),
    (unlabelled(3), {"bank": 16, "noising": "query"}, "a group of points has 3 different samples"),
], ids=["guided", "few samples", "few for query"])
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


# ---- each option by hand ----

class Step:
    """The losses of one step whose generated samples are given, and what took part: the groups, real samples [G, P, D],
    others [G, U, D], what the net was told, the last noise. `slope` is the gradient in the samples [G, n, D]."""

    def __init__(self, recipe, x, step=0):
        turn, self.asked = turn_at(step, recipe.settings.batch), {}
        bank, draw_groups, x = recipe.bank, recipe.draw_groups, x.clone().requires_grad_()

        def keep(name, of):
            def kept(*args, **more):
                self.asked[name] = of(*args, **more)
                return self.asked[name]
            return kept

        recipe.student.forward = lambda z, y=None, w=None: self.asked.update(y=y, w=w) or x
        recipe.draw_groups = keep("group", draw_groups)
        bank.draw, bank.draw_any = keep("real", bank.draw), keep("others", bank.draw_any)
        turn.randn = keep("noise", turn.randn)
        self.losses = recipe.losses(None, turn)["student"]
        slope, = torch.autograd.grad(sum(loss.sum() for loss in self.losses.values()), x)
        self.group, self.slope = self.asked["group"], slope.unflatten(0, (recipe.groups, -1))


def generated(n=64, d=2, seed=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def push_and_pull(x, t, wanted, weights=None, floor=0.0):
    """A mean shift written out: of samples x [n, D] to targets [m, D] by a Laplace kernel of width t; a sample at x_i
    itself is not seen where `wanted` says so."""
    k = (-torch.cdist(x, wanted[0]) / t).masked_fill(wanted[1], -torch.inf).softmax(1).clamp(min=floor)
    k = k if weights is None else k * weights
    return k @ wanted[0] / k.sum(1, keepdim=True) - x


def test_guidance_pushes_off_any_class_w_less_one_times_as_hard():
    """The force on a guided sample, from its parts: n - 1 samples of weight one, U others of (w - 1)(n - 1) / U."""
    field = Field(temperatures=(0.5,), normalise=False)
    recipe, x = made(points(classes=4), groups=4, strongest=3.0, unconditional=6, field=field), generated()
    found = Step(recipe, x)
    q, p, u = x.unflatten(0, (4, 16)), found.asked["real"], found.asked["others"]
    w = found.group.w
    assert u.shape == (4, 6, 2) and float(w.max()) > 1 and float(w.min()) == 1
    assert torch.equal(found.asked["w"], w.repeat_interleave(16)) and torch.equal(
        found.asked["y"], found.group.label.repeat_interleave(16))
    side = [torch.cat([torch.ones(16), torch.full((6,), (float(w[g]) - 1) * 15 / 6)]) for g in range(4)]
    negatives = [torch.cat([q[g], u[g]]) for g in range(4)]
    every = [torch.cdist(q[g], torch.cat([negatives[g], p[g]])) * torch.cat([side[g], torch.ones(16)])
             for g in range(4)]
    mean = sum(float(d.sum()) for d in every) / sum(16 * float(s.sum() + 16) for s in side)
    own, none = torch.eye(16, 22, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.bool)
    for g in range(4):
        v = push_and_pull(q[g], 0.5 * mean, (p[g], none), floor=1e-3) - push_and_pull(
            q[g], 0.5 * mean, (negatives[g], own), side[g], 1e-3)
        assert torch.allclose(found.slope[g], -2 * v / (mean**2 / 2) / 32, rtol=1e-3, atol=1e-5)


def test_places_of_a_sample_share_the_strength_of_its_group():
    recipe = made(points(classes=2), strongest=3.0, unconditional=6)
    recipe.phi = lambda x, t, y: {"places": x[:, :, None]}                              # [B, 2, 1]
    turn, w = turn_at(), torch.tensor([1.0, 2.5])
    group = Group(torch.tensor([1, 0]), w, torch.zeros(2))
    found = recipe.fields(generated(), generated(32, seed=6), generated(12, seed=7), group, turn)["places"]
    assert found.negatives.shape == (4, 6, 1)
    expected = torch.tensor([0, 0, 1.5 * 31 / 6, 1.5 * 31 / 6])[:, None].expand(4, 6)
    assert torch.allclose(found.weights.negatives, expected)
    assert torch.equal(found.negatives[1, :, 0], generated(12, seed=7)[:6, 1])


def test_both_sides_are_noised_at_the_time_of_their_group():
    recipe, seen, x = made(points(), noising="both", noise=(0.1, 0.9)), [], generated()
    phi = recipe.phi
    recipe.phi = lambda x, t, y: seen.append((x.detach(), t)) or phi(x, t, y)
    found = Step(recipe, x)
    t, clean = found.group.t, (x.unflatten(0, (2, 32)), found.asked["real"])
    assert abs(float(t[0] - t[1])) > 0.1 and ((t >= 0.1) & (t <= 0.9)).all()
    eps = []
    for (x_t, told), x0 in zip(seen, clean, strict=True):
        assert torch.equal(told, t.repeat_interleave(x0.shape[1]))
        eps.append((x_t.view_as(x0) - (1 - t[:, None, None]) * x0) / t[:, None, None])
        assert float(eps[-1].mean()) == pytest.approx(0, abs=0.3) and float(eps[-1].std()) == pytest.approx(1, abs=0.2)
    assert not torch.allclose(eps[0][:, :16], eps[1], atol=0.1)
    q, p = (x_t.unflatten(0, (2, -1)) for x_t, _ in seen)
    v = match.drift(q, p, **recipe.form)
    assert torch.allclose(found.slope, (1 - t[:, None, None]) * -2 * v.vector / (v.scale * 64), rtol=1e-4, atol=1e-6)


def test_query_follows_the_difference_of_the_ideal_denoisers():
    recipe, x = made(points(), noising="query", noise=(0.2, 0.7)), generated()
    found = Step(recipe, x)
    q, real, eps = x.double().view(2, 32, 2), found.asked["real"].double(), found.asked["noise"].double()

    def answer(x_t, t, among):
        weight = torch.stack([(-(x_t - (1 - t) * one).square().sum() / (2 * t**2)).exp() for one in among])
        return (weight[:, None] * among).sum(0) / weight.sum()

    for g, t in enumerate(found.group.t.double()):
        for i in range(32):
            x_t = (1 - t) * q[g, i] + t * eps[g, i]
            fake = answer(x_t, t, torch.cat([q[g, :i], q[g, i + 1:]]))
            target = answer(x_t, t, real[g])
            slope = (fake - target) / (q[g, i] - target).abs().mean() / 2               # the mean over D = 2 elements
            assert torch.allclose(found.slope[g, i].double(), slope, rtol=1e-3, atol=1e-5)


def test_positives_of_the_teacher_are_its_samples(tmp_path):
    far = Tensors(points().x + 50, points().y, ["a", "b"], "far")
    taught = FlowMatching.Settings(**{**PLAIN, "out": tmp_path / "flow", "steps": 2, "batch": 16})
    flow = start(FlowMatching, taught, "flow", {"data": far}, Silent())
    mine = {"teacher": str(flow), "positives": "teacher", "teacher_samples": 600, "batch": 64, "support": 16}
    settings = Drifting.Settings(**{k: v for k, v in PLAIN.items() if k not in ("width", "depth")}, **mine)
    recipe = Drifting(settings, **Drifting.prepare(settings, {"data": far}, lambda text: None))
    drawn = stillroom.load(flow).sample(600, seed_of(0, "positives"))                   # of classes 0, 1, 0, 1, ...
    for label, positives in zip((found := Step(recipe, generated())).group.label, found.asked["real"], strict=True):
        assert (positives[:, None] == drawn[int(label)::2]).all(2).any(1).all()
        assert float(torch.cdist(positives, far.x).amin()) > 10


def test_a_teacher_is_held_against_the_data_and_not_its_own_samples(tmp_path):
    taught = FlowMatching.Settings(**{**PLAIN, "out": tmp_path / "flow", "steps": 300, "batch": 256,
                                      "model": Optimizer(lr=1e-2), "average": 0.9})
    flow = start(FlowMatching, taught, "flow", {"data": points()}, Silent())
    other = Tensors(3 * points().x.flip(0), points().y, ["a", "b"], "other")
    mine = {"teacher": str(flow), "positives": "teacher", "teacher_samples": 600, "batch": 64, "support": 16}
    plain = {k: v for k, v in PLAIN.items() if k not in ("width", "depth")}
    for data in (points(), other):
        settings = Drifting.Settings(**plain, **mine)
        recipe = Drifting(settings, **Drifting.prepare(settings, {"data": data}, lambda text: None))
        x, y = recipe.data.x[:64], recipe.data.y[:64]
        if data is other:
            with pytest.raises(Refusal, match="fails the teacher gate"):
                recipe.check({"data": (x, y)})
        else:
            recipe.check({"data": (x, y)})


def test_groups_without_a_class_are_asked_as_any_and_meet_any_and_are_not_guided():
    data = Tensors(points().x + 20 * points().y[:, None], points().y, ["a", "b"], "apart")
    recipe = made(data, drop=0.5, strongest=3.0, plain=0.0, support=32)
    assert recipe.student.unlabelled
    dropped = 0
    for step in range(30):
        found = Step(recipe, generated(), step)
        group, real = found.group, found.asked["real"]
        assert torch.equal(found.asked["y"], group.label.repeat_interleave(32))
        for label, w, x in zip(group.label.tolist(), group.w.tolist(), real, strict=True):
            high = int((x.mean(1) > 10).sum())
            assert (w == 1) == (label == 2)
            assert 4 < high < 28 if label == 2 else high == (0, 32)[label]
            dropped += label == 2
        assert sorted(group.label.tolist()) in ([0, 1], [0, 2], [1, 2], [2, 2])
    assert 18 <= dropped <= 42
    assert all(2 not in made(data, drop=0.0).draw_groups(turn_at(step)).label for step in range(9))


def test_coverage_is_what_anchors_miss_of_each_other_among_samples_of_their_class():
    recipe, x = made(points(), coverage=3.0), 0.2 * generated()
    found = Step(recipe, x)
    terms = []
    for q, a in zip(x.view(2, 32, 2), found.asked["real"], strict=True):
        far = [[float((one - two).norm()) for two in a] for one in a]
        apart = sorted(far[i][j] for i in range(16) for j in range(16) if i != j)
        h = apart[(len(apart) - 1) // 2]
        for i in range(16):
            own = sum(math.exp(-(far[i][j] / h) ** 2 / 2) for j in range(16) if j != i) / 15
            theirs = sum(math.exp(-(float((a[i] - one).norm()) / h) ** 2 / 2) for one in q) / 32
            terms.append(max(0.0, 0.5 * own - theirs))
    assert min(sum(terms[:16]), sum(terms[16:])) > 0
    assert found.losses["coverage"].tolist() == pytest.approx([3 * sum(terms[:16]) / 16, 3 * sum(terms[16:]) / 16],
                                                              rel=1e-4)


def test_without_labels_samples_come_in_groups_that_are_as_many_as_their_positives(tmp_path):
    """In one group of all samples, of which there were many more than positives, they pushed each other out: to a
    deviation of 1.9."""
    rate = Optimizer(lr=3e-3, clip=2.0, warmup=20)
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    settings = Drifting.Settings(**{**PLAIN, "out": tmp_path / "run", "batch": 256, "groups": 8, "support": 32,
                                    "width": 64, "steps": 250, "average": 0.95, "log_every": 50, "student": rate})
    start(Drifting, settings, "drifting", {"data": Tensors(x, name="normal")}, Silent())
    std = stillroom.load(tmp_path / "run").sample(2000, 0).std(0)
    assert ((std > 0.9) & (std < 1.1)).all(), std


def test_automatic_temperatures_are_those_of_a_class_spread():
    """One class spreads in eight dimensions, one in two, far apart: five on the mean, about one over all."""
    x = torch.randn(1200, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(1200) % 2
    x[y == 1, 2:] *= 1e-3
    x[:, 0] += 100 * y
    recipe = made(Tensors(x, y, ["wide", "narrow"], "two"), field=Field(temperatures=()), support=16)
    expected = [1 / math.sqrt(2 * 5 * math.log(16 / heard)) for heard in (2, 4, 12.8)]      # two at the least
    assert list(recipe.temperatures) == pytest.approx(expected, rel=0.03)
    assert recipe.form["temperatures"] == recipe.temperatures == tuple(recipe.product().card["temperatures"])

"""One-step students: that each moves its samples towards the data, what it measures, and what it refuses."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import stillroom
from stillroom.data import Encoding, LatentSpace, Tensors
from stillroom.paths import Tabulated, Uniform
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.consistency import Consistency
from stillroom.recipes.dmd import DMD
from stillroom.recipes.drifting import Drifting, Field, Group, power_law
from stillroom.recipes.endpoint import Endpoint
from stillroom.recipes.flow import FlowMatching
from stillroom.settings import Refusal
from stillroom.train import Silent, Turn, load, load_product, start
from stillroom.train.folder import read_rows
from stillroom.train.turn import Noise
from stillroom.train.world import World
from students import PLAIN, POINTS, RATE, clusters, far, flow_of_points, moved, points  # noqa: F401


def run(recipe, out, data, **more):
    given = {"data": data} if recipe.inputs else None
    shape = POINTS if recipe is Drifting else {"data": "given", "size": 1} if recipe.inputs else {}
    settings = recipe.Settings(out=out, **{"batch": 64, "student": RATE, "average": 0.98, **shape, **PLAIN, **more})
    return start(recipe, settings, recipe.__name__.lower(), given, Silent())


@pytest.mark.parametrize("recipe", [Drifting, DMD, Endpoint, Consistency])
def test_a_student_comes_nearer_than_its_teachers_one_step(tmp_path, teacher, data, recipe):
    extra = {"pairs": 500, "teacher_steps": 10} if recipe is Endpoint else {}
    start_of = far(stillroom.load(run(recipe, tmp_path / "none", data, teacher=teacher, steps=1, **extra)), data)
    student = stillroom.load(run(recipe, tmp_path / "run", data, teacher=teacher, steps=300, **extra))
    assert far(student, data) < 0.5 * start_of
    product = load_product(tmp_path / "run")
    assert product.kind == "generator" and product.card["shape"] == [2] and product.card["classes"] == 2


def test_drifting_learns_from_data_alone(tmp_path, data):
    student = stillroom.load(run(Drifting, tmp_path / "run", data, steps=300))
    assert far(student, data) < 0.1


@pytest.mark.parametrize("more", [
    {"field": Field(coupling="separate")}, {"field": Field(kernel="gauss", temperatures=(0.2, 0.5))},
    {"field": Field(temperatures=())}, {"noising": "both"}, {"noising": "query", "noise": (0.1, 0.6)},
    {"coverage": 1.0}, {"positives": "teacher", "teacher_samples": 300}, {"strongest": 3.0, "unconditional": 8},
    {"drop": 0.3},
], ids=lambda m: "-".join(m))
def test_every_option_of_drifting_trains(tmp_path, teacher, data, more):
    place = run(Drifting, tmp_path / "run", data, teacher=teacher, steps=60, **more)
    assert stillroom.load(place).sample(8).isfinite().all() and moved(place, teacher)
    last = read_rows(place / "metrics.jsonl")[-1]
    own = "student/query" if more.get("noising") == "query" else "student/identity"
    assert last[own] > 0 and {"student/query", "student/identity"} & last.keys() == {own}
    assert ("student/coverage" in last) == ("coverage" in more)


def test_taps_of_maps_and_of_the_teachers_hidden_states(tmp_path):
    x = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    data = Tensors(x, torch.arange(64) % 2, None, "maps")
    net = {"data": "given", "size": 4, "net": "dit", "width": 32, "depth": 2, "patch": 2}
    flow = FlowMatching.Settings(out=tmp_path / "flow", steps=2, batch=16, **net, **PLAIN)
    start(FlowMatching, flow, "flow", {"data": data}, Silent())

    class Ungated(Drifting):
        def check(self, batch):
            """A teacher of two steps passes no gate, and none is needed here."""

    settings = Ungated.Settings(out=tmp_path / "run", teacher=str(tmp_path / "flow"), steps=2, batch=16, bank=32,
                                support=8, taps=("identity", "tokens", "pooled", "patches2", "hidden"),
                                layers=("blocks.0", "blocks.1"), noising="both", data="given", size=4,
                                **PLAIN | {"log_every": 1})
    start(Ungated, settings, "drifting", {"data": data}, Silent())
    terms = {k.removeprefix("student/") for k in read_rows(tmp_path / "run" / "metrics.jsonl")[0] if "student/" in k}
    assert terms >= {"identity", "tokens", "mean", "deviation", "mean 2x2", "deviation 2x2", "blocks.0 tokens",
                     "blocks.1 mean", "blocks.1 deviation"}


def told_of_the_field(place):
    rows = read_rows(place / "metrics.jsonl")
    return rows, [row["field/identity"] / row["field/identity, floor"] for row in rows]


def test_what_is_told_is_the_field_beside_that_of_real_samples(tmp_path, data):
    rows, ratios = told_of_the_field(run(Drifting, tmp_path / "run", data, steps=300))
    assert ratios[0] > 3                                        # generated samples are far from real ones at first
    assert max(r["student/identity"] for r in rows) < 1.5 * min(r["student/identity"] for r in rows)   # stands still


def test_generated_samples_come_as_near_as_real_ones_are(tmp_path, data):
    """Many samples and rows: of few, one ratio in ten is beyond 3."""
    _, ratios = told_of_the_field(run(Drifting, tmp_path / "run", data, steps=500, batch=192, support=128))
    assert ratios[0] > 3 and 0.5 < sum(ratios[-10:]) / 10 < 2


def test_samples_that_have_contracted_are_told_of(data):
    recipe = Drifting(Drifting.Settings(out="unused", batch=64, **POINTS), data)

    class Turn:
        def __init__(self):
            self.said = []

        def note(self, text):
            self.said.append(text)

    turn = Turn()
    for ratio in (1.0,) * 15 + (0.1,) * 3:                          # a mean of 0.73 over the last ten
        recipe.warn_if_contracted("identity", ratio, turn)
    assert not turn.said
    recipe.warn_if_contracted("identity", 0.1, turn)                # 0.64
    assert len(turn.said) == 1 and "noising = both" in turn.said[0]


def test_how_often_a_row_is_written_changes_nothing(tmp_path, data):
    a, b = (stillroom.load(run(Drifting, tmp_path / str(k), data, steps=12, log_every=k)) for k in (2, 5))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_resumed_run_ends_the_same(tmp_path, data):
    whole = run(Drifting, tmp_path / "whole", data, steps=20, early=0.3, checkpoint_every=10)
    part = run(Drifting, tmp_path / "part", data, steps=20, early=0.3, checkpoint_every=10)
    for path in (part / "checkpoints").glob("*20*"):
        path.rename(part / "gone")
    (part / "product").rename(part / "old")
    stillroom.train.resume(part, lambda _: Drifting, {"data": data}, Silent())
    a, b = load_product(whole).parts, load_product(part).parts
    assert set(a) == {"generator", "early"}
    for name in a:
        pairs = zip(a[name].state_dict().values(), b[name].state_dict().values(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    assert not torch.equal(a["early"].net.final.weight, a["generator"].net.final.weight)


def test_strengths_follow_their_power_law():
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    w = power_law(u, 4.0, 3.0)
    assert w[0] == 1 and abs(float(w[-1]) - 4) < 1e-9
    # of a density c w^-3 on [1, 4], c = 2 / (1 - 1/16): the share below 2 is c/2 (1 - 1/4)
    assert abs(float((w < 2).double().mean()) - (1 - 1 / 4) / (1 - 1 / 16)) < 1e-4
    assert torch.allclose(power_law(u, 4.0, 1.0).log(), u * torch.tensor(4.0, dtype=torch.float64).log())


@pytest.mark.parametrize(("more", "says"), [
    ({"batch": 63}, "does not divide into 2 groups"),
    ({"batch": 2}, "which nothing pushes"),
    ({"support": 300}, "bank of 256"),
    ({"taps": ("identiti",)}, "did you mean 'identity'"),
    ({"taps": ()}, "name at least one"),
    ({"taps": ("features",)}, "come together"),
    ({"taps": ("hidden",)}, "come together"),
    ({"strongest": 0.5}, "begin at 1"),
    ({"noising": "query", "strongest": 2.0}, "strongest: noising = query .* without a field or guidance"),
    ({"noising": "query", "field": Field(kernel="gauss")}, "field: noising = query compares samples themselves"),
    ({"noise": (0.0, 0.3)}, "noise: noising = none compares samples as they are"),
    ({"noising": "both", "noise": (0.9, 0.1)}, "noise = 0.9 0.1: give the lower time first"),
    ({"power": 2.0, "plain": 0.1}, "power, plain: of strengths of guidance, and only 1 is drawn"),
    ({"positives": "teacher"}, "name the teacher too"),
    ({"groups": 4}, "groups = 4: a step takes every class once at most, and the data have 2"),
    ({"taps": ("patches2",)}, "no whole number"),
])
def test_what_cannot_be_is_refused_in_a_line(tmp_path, data, more, says):
    with pytest.raises(Refusal, match=says) as error:
        run(Drifting, tmp_path / "run", data, steps=2, **more)
    assert "\n" not in str(error.value)


def test_layers_that_have_no_output_are_refused(tmp_path, data, teacher):
    """A list of modules is in the network and is never asked itself: nothing would be learned from it."""
    for name, says in (("layer", "no module 'layer'"), ("layers", "never asks 'layers' itself.*layers.0")):
        for recipe, more in ((Drifting, {"taps": ("hidden",), "layers": (name,)}),
                             (DMD, {"adversarial": Adversarial(weight=1.0, layers=(name,))})):
            with pytest.raises(Refusal, match=says):
                run(recipe, tmp_path / "run", data, teacher=teacher, steps=2, **more)


def test_an_early_average_at_the_very_end_is_the_average(tmp_path, data):
    parts = load_product(run(Drifting, tmp_path / "run", data, steps=4, early=1.0)).parts
    a, b = (parts[name].state_dict() for name in ("early", "generator"))
    assert all(torch.equal(a[k], v) for k, v in b.items())


@pytest.mark.parametrize("every", [1, 2])
def test_labels_are_balanced_over_steps_where_a_batch_is_not(tmp_path, teacher, every):
    """Batches of 3 for 2 classes: a student that moves on every second step is to meet both as often."""
    recipe = DMD(DMD.Settings(out=tmp_path, teacher=teacher, batch=3, **PLAIN))
    told = torch.stack([recipe.labels(turn_at(step)) for step in range(every - 1, 600 * every, every)])
    assert (told.diff(dim=1).abs() == 1).all()              # in turn: as balanced as three can be
    assert abs(float(told.double().mean()) - 0.5) < 0.02
    assert torch.equal(recipe.labels(turn_at(5)), recipe.labels(turn_at(5)))


def turn_at(step):
    return Turn(step=step, stage="distil", roles=frozenset(), batch=3, micros=1, micro=0, watched=False,
                world=World(0, 1, torch.device("cpu")), noise=Noise(0, step, torch.device("cpu")))


def test_no_time_is_exactly_that_of_clean_data(monkeypatch):
    monkeypatch.setattr(Turn, "rand", lambda self, like: torch.zeros(like))
    path = Tabulated.ddpm()
    t = turn_at(0).draw(Uniform(0, 1))
    assert (t > 0).all() and all(part.isfinite().all() for part in path.at(t))


@pytest.mark.parametrize("more", [{"drop": 0.2}, {"strongest": 2.0}])
def test_without_labels_nothing_is_guided(tmp_path, data, more):
    with pytest.raises(Refusal, match="no labels"):
        run(Drifting, tmp_path / "run", Tensors(data.x, name="alone"), steps=2, **more)


def test_a_class_of_one_sample_is_refused(tmp_path):
    x, y = clusters(40)
    data = Tensors(torch.cat([x, x[:1]]), torch.cat([y, torch.tensor([2])]), ["low", "high", "lonely"], "clusters")
    with pytest.raises(Refusal, match="fewer than two samples of lonely"):
        run(Drifting, tmp_path / "run", data, steps=2, batch=48)


def test_a_teacher_of_other_latents_is_refused(tmp_path, teacher, data):
    other = Tensors(data.x, data.y, data.classes, "latents")
    other.encoding = Encoding(LatentSpace(1, 1, (0.0,), (1.0,)), "abc", "centre 2")
    with pytest.raises(Refusal, match="made on pictures, and latents holds latents"):
        run(Drifting, tmp_path / "run", other, teacher=teacher, steps=2)
    wide = Tensors(torch.randn(20, 3), torch.arange(20) % 2, None, "wide")
    with pytest.raises(Refusal, match=r"it makes \[2\], and wide holds \[3\]"):
        run(Drifting, tmp_path / "run", wide, teacher=teacher, steps=2)
    alone = Tensors(data.x, name="alone")
    with pytest.raises(Refusal, match="it knows 2 classes, and alone has none"):
        run(Consistency, tmp_path / "run", alone, teacher=teacher, steps=2)


def test_the_encoding_is_on_the_card(tmp_path, data):
    other = Tensors(data.x, data.y, data.classes, "latents")
    other.encoding = Encoding(LatentSpace(1, 1, (0.0,), (1.0,)), "abc", "centre 2")
    card = load_product(run(Drifting, tmp_path / "run", other, steps=2)).card
    assert card["encoding"] == json.loads(json.dumps(dataclasses.asdict(other.encoding)))


def test_samples_of_a_teacher_of_latents_are_latents_of_its_codec(tmp_path, data):
    latents = Tensors(data.x, data.y, data.classes, "latents")
    latents.encoding = Encoding(LatentSpace(1, 1, (0.0,), (1.0,)), "abc", "centre 2")
    settings = FlowMatching.Settings(out=tmp_path / "teacher", steps=600, batch=256, model=RATE, average=0.99, **POINTS,
                                     **PLAIN)
    teacher = start(FlowMatching, settings, "flow", {"data": latents}, Silent())
    out = run(Drifting, tmp_path / "run", latents, teacher=str(teacher), steps=2, positives="teacher",
              teacher_samples=300)
    assert load_product(out).card["encoding"] == load_product(teacher).card["encoding"] != {}


@pytest.mark.parametrize("recipe", [DMD, Endpoint])
def test_a_teacher_without_a_network_is_refused(tmp_path, recipe):
    with pytest.raises(Refusal, match="no network for a student to start from"):
        run(recipe, tmp_path / "run", None, teacher="ring:4", steps=2)


def test_heads_stand_on_the_teacher_whatever_adapters_its_weights_carry(teacher):
    settings = DMD.Settings(out="unused", teacher=teacher, fake_lora=2, adversarial=Adversarial(weight=1.0), **PLAIN)
    recipe = DMD(settings)
    x, t, y = torch.randn(6, 2), torch.full((6,), 0.5), torch.arange(6) % 2
    before = recipe.adversary.features(x, t, y)
    with torch.no_grad():
        for name, p in recipe.fake.named_parameters():
            if "lora_" in name:
                p.fill_(0.3)
    after = recipe.adversary.features(x, t, y)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.allclose(recipe.fake.v(x, t, y), recipe.teacher.v(x, t, y), atol=1e-3)


@pytest.mark.parametrize(("recipe", "more"), [(DMD, {"fake_lora": 2}), (Consistency, {"data": "none"})])
def test_adapters_and_their_average_hold_the_teachers_weights_once(recipe, more, teacher, tmp_path):
    settings = recipe.Settings(out=tmp_path / "run", teacher=teacher, lora=2, steps=4, batch=16, **PLAIN, **more)
    made = recipe(settings)
    modules = [part for part in vars(made).values() if isinstance(part, torch.nn.Module)]
    held = {id(p): p.numel() for part in modules for name, p in part.named_parameters() if "lora_" not in name}
    assert sum(held.values()) == sum(p.numel() for p in load(teacher).parameters())
    before = {name: p.clone() for name, p in made.mean.named_parameters() if "lora_B" in name}
    start(recipe, settings, "lora", watch=Silent())
    saved = load_file(sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1] / "averages.safetensors")
    assert {name for name in saved if "lora_" not in name} == {"student/updates"}
    assert len(saved) == 1 + 2 * len(before) and all(saved[f"student/{name}"].any() for name in before)


def test_data_without_their_size_are_refused_in_a_line(teacher, tmp_path):
    with pytest.raises(Refusal, match="shapes: say how large its pictures shall be: --size PIXELS"):
        start(DMD, DMD.Settings(out=tmp_path / "run", teacher=teacher, data="shapes", steps=1, **PLAIN), "dmd")


@pytest.mark.parametrize(("recipe", "more"), [(DMD, {}), (Endpoint, {"pairs": 8}), (Drifting, {})])
def test_what_sees_nothing_in_pure_noise_cannot_begin_a_student(tmp_path, data, recipe, more):
    blind = FlowMatching.Settings(out=tmp_path / "blind", steps=2, batch=16, prediction="eps", **POINTS, **PLAIN)
    start(FlowMatching, blind, "flow", {"data": data}, Silent())
    with pytest.raises(Refusal, match="says nothing of data in pure noise"):
        run(recipe, tmp_path / "run", data, teacher=str(tmp_path / "blind"), steps=2, **more)


def test_an_origin_of_another_path_is_refused(tmp_path, data):
    bent = FlowMatching.Settings(out=tmp_path / "bent", steps=2, batch=16, path="cosine", **POINTS, **PLAIN)
    start(FlowMatching, bent, "flow", {"data": data}, Silent())
    with pytest.raises(Refusal, match="its path is Cosine"):
        run(DMD, tmp_path / "run", data, teacher="ring:2:0.1", origin=str(tmp_path / "bent"), steps=2)


def test_hidden_states_of_clean_samples_are_those_of_time_zero(tmp_path, teacher, data):
    made = Drifting(Drifting.Settings(out=tmp_path, teacher=teacher, batch=64, **POINTS, **PLAIN), data)
    asked = []
    made.phi = lambda x, t, y: asked.append(t) or {"x": x}
    group = Group(torch.tensor([0, 1]), torch.ones(2), torch.tensor([0.3, 0.6]))
    made.groups = 2
    made.vectors(torch.zeros(4, 2), group, None)
    assert torch.equal(asked[0], torch.zeros(4))

"""GDD's adversarial game, and several students by class: the mathematics, a run of each, and what they refuse."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import stillroom
from stepping import same, state, steps_of, trainer_of
from stillroom.data import Tensors
from stillroom.flows import Denoiser, Routed
from stillroom.match.adversarial import critic_softplus, maker_softplus, r1
from stillroom.nets import UNet
from stillroom.nets.heads import Critic, Heads, Layers
from stillroom.recipes._sets import routes_of
from stillroom.recipes.endpoint import Endpoint
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.gdd import GDD, anew, unfrozen
from stillroom.recipes.msd import MSD
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Silent, load_product, start
from stillroom.train.folder import read_rows
from stillroom.train.schedule import ends
from students import PLAIN, RATE, clusters, far, points  # noqa: F401

GAME = Optimizer(lr=1e-3, name="adam", betas=(0.0, 0.99), clip=1.0, decay="cosine")


def flow_of(place, data, **more) -> str:
    settings = FlowMatching.Settings(out=place, data="given", size=1, width=64, depth=2, steps=600, batch=256,
                                     model=RATE, average=0.99, **PLAIN, **more)
    return str(start(FlowMatching, settings, "flow", {"data": data}, Silent()))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    return flow_of(tmp_path_factory.mktemp("teacher") / "run", data)


def settings_of(recipe, out, **more):
    return recipe.Settings(out=out, **{"batch": 64, "student": RATE, "average": 0.98, **PLAIN, **more})


def run(recipe, out, given=None, **more):
    shape = {"data": "given", "size": 1} if given is not None else {}
    return start(recipe, settings_of(recipe, out, **shape, **more), recipe.__name__.lower(),
                 None if given is None else {"data": given}, Silent())


def built(recipe, settings, data=None):
    return trainer_of(recipe(settings) if data is None else recipe(settings, data), settings)


# ---- the game ----


def test_the_best_critic_knows_the_ratio_of_densities():
    """p log-likely real, q made: least at log p / q, where the maker's gradient is -sigmoid(-D)."""
    logits = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    p, q = 0.8, 0.3
    expected = p * critic_softplus(logits, torch.full_like(logits, -60)) + q * critic_softplus(
        torch.full_like(logits, 60), logits)
    assert abs(float(logits[expected.argmin()]) - float(torch.log(torch.tensor(p / q)))) < 2e-3
    x = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(maker_softplus(x).sum(), x)
    assert torch.allclose(slope, -torch.sigmoid(-x), atol=1e-12)


def test_the_penalty_is_exact_and_has_a_gradient_of_its_own():
    """Against finite differences, in the samples and then in a weight of the critic."""
    torch.manual_seed(0)
    critic = Critic(Layers(3, 16, 2), (3,), 2).double()
    with torch.no_grad():
        critic.heads.labels.weight.normal_()
    x, y, h = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2, 1e-5

    def penalty() -> torch.Tensor:
        z = x.clone().requires_grad_()
        return r1(critic(z, y), z)

    steps = h * torch.eye(3).double()
    numbers = torch.stack([(critic(x + e, y) - critic(x - e, y)).mean(1) / (2 * h) for e in steps], 1)
    assert torch.allclose(penalty(), numbers.square().sum(1) / 2, atol=1e-8)
    weight = critic.heads.layers[1][1].weight
    (slope,) = torch.autograd.grad(penalty().sum(), weight)
    with torch.no_grad():
        weight[0, 0] += h
        with torch.enable_grad():
            above = penalty().sum()
        weight[0, 0] -= 2 * h
        with torch.enable_grad():
            below = penalty().sum()
    assert torch.allclose(slope[0, 0], (above - below) / (2 * h), rtol=1e-5)


def test_heads_know_labels_by_how_they_go_with_features():
    torch.manual_seed(0)
    heads = Heads([4, 6], 8, classes=3)
    features = [torch.randn(5, 4), torch.randn(5, 6, 3, 3)]
    y = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(heads(features, y), heads(features))             # at first they say nothing
    nn.init.normal_(heads.labels.weight)
    added = (heads(features, y) - heads(features)).detach()
    inner = [nn.Sequential(*list(layer.children())[:-1]) for layer in heads.layers]
    seen = [inner[0](features[0]), inner[1](features[1].movedim(1, -1)).flatten(1, 2).mean(1)]
    by_hand = torch.stack([(a * b).sum(1) for a, b in zip(seen, heads.labels.weight[y].chunk(2, 1), strict=True)], 1)
    assert torch.allclose(added, by_hand.detach(), atol=1e-6)


def test_every_head_plays_the_game_by_itself():
    """As in the release: a softplus of each, which one that is fooled cannot hide behind the others."""
    real, made = torch.tensor([[3.0, -3.0]]), torch.tensor([[-3.0, 3.0]])
    once, twice = float(softplus(torch.tensor(-3.0))), float(softplus(torch.tensor(3.0)))
    assert float(critic_softplus(real, made)) == pytest.approx(once + twice)
    assert float(maker_softplus(made)) == pytest.approx((once + twice) / 2)
    assert Critic(Layers(2, 8, 3), (2,))(torch.randn(5, 2)).shape == (5, 3)


def test_the_penalty_comes_on_every_so_many_steps(tmp_path, teacher):
    assert [step for step in range(12) if ends(step, 4)] == [3, 7, 11]
    trainer = built(GDD, settings_of(GDD, tmp_path, teacher=teacher, steps=8, lazy=4, teacher_samples=100))
    penalised = []
    for step in steps_of(trainer, 8):
        if step:
            penalised.append("critic/r1" in trainer.window)
        trainer.window = {}
    assert [i for i, p in enumerate(penalised) if p] == [3]
    recipe = trainer.recipe
    x, y = recipe.ends.ends[:16].clone(), torch.arange(16) % 2
    terms = recipe.judged(x, y, torch.randn(16, 2), y, 3)
    real = x.requires_grad_()
    assert torch.allclose(terms["r1"], 0.1 * 4 * r1(recipe.critic(real, y), real), rtol=1e-5)
    assert "r1" not in recipe.judged(x, y, torch.randn(16, 2), y, 4)


# ---- what stays frozen ----


def test_convolutions_of_a_u_net_stay_and_the_rest_learns():
    student = Denoiser(UNet(1, 16, (1, 2)), stillroom.paths.Linear(), "v")
    names = [name for name, _ in student.named_parameters()]
    learned = [n for n in names if re.search(unfrozen(student, "conv|grow|shrink|out"), n)]
    assert learned and not [n for n in learned if ".conv" in n or "grow" in n or "shrink" in n or "out" in n]
    assert {n for n in names if "norm" in n or "film" in n or "qkv" in n} <= set(learned)
    assert {"net.enter.weight", "net.final.weight"} <= set(learned)        # outside of the blocks
    share = sum(p.numel() for n, p in student.named_parameters() if n in learned) / sum(
        p.numel() for p in student.parameters())
    assert share < 0.4


def test_a_run_moves_what_is_not_frozen_and_nothing_else(tmp_path, teacher):
    settings = settings_of(GDD, tmp_path, teacher=teacher, steps=3, freeze="layers", teacher_samples=64)
    trainer = built(GDD, settings)
    before, frozen = state(trainer.recipe.student), state(trainer.recipe.flow.denoiser)
    for _ in steps_of(trainer, 3):
        pass
    after = state(trainer.recipe.student)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and not [name for name in moved if "layers" in name] and any("final" in name for name in moved)
    assert same(frozen, state(trainer.recipe.flow.denoiser))


def test_a_network_begun_anew_is_the_same_with_other_weights_and_none_of_them_zero():
    net = UNet(1, 16, (1, 1))
    again = anew(net)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert not net.final.weight.any() and again.final.weight.any() and again.low.conv2.weight.any()
    assert not torch.equal(net.enter.weight, again.enter.weight)


# ---- several students ----


def test_classes_are_parted_into_neighbours():
    assert routes_of(3, 6, "t") == (0, 0, 1, 1, 2, 2) and routes_of(1, 3, "t") == (0, 0, 0)


@pytest.mark.parametrize(("batch", "steps"), [(12, 2), (3, 20)])      # also with more classes than samples
def test_each_student_is_asked_for_its_own_classes_alone(tmp_path, batch, steps):
    settings = settings_of(MSD, tmp_path, teacher="ring:6:0.1", origin=flow_of_ring(tmp_path), students=3, steps=steps,
                           batch=batch, options=("every=1", "adversarial.weight=0.1", "teacher_samples=60"))
    trainer = built(MSD, settings)
    recipe, asked = trainer.recipe, []

    def watching(k, denoiser):
        hook = denoiser.forward
        denoiser.forward = lambda x, t, y=None, r=None: (asked.append((k, set(y.tolist()))), hook(x, t, y, r))[1]

    for k, student in enumerate(recipe.students):
        for each in (student.student, student.fake):
            watching(k, each)
    for _ in steps_of(trainer, steps):
        pass
    assert {k for k, _ in asked} == {0, 1, 2}
    assert all(y <= {2 * k, 2 * k + 1} for k, y in asked)
    assert set.union(*(y for _, y in asked)) == set(range(6))
    for k, student in enumerate(recipe.students):               # what stands for data is of these classes too
        y = student.ends.labels
        assert set(y.tolist()) == {2 * k, 2 * k + 1}
        near = torch.cdist(student.ends.ends, recipe.flow.denoiser.means).argmin(1)
        assert float((near == y).float().mean()) > 0.9


def flow_of_ring(tmp_path) -> str:
    x, y = stillroom.flows.Mixture.ring(6, std=0.1).draw(600, torch.Generator().manual_seed(0))
    place = tmp_path / "ring"
    settings = FlowMatching.Settings(out=place, data="given", size=1, width=32, depth=1, steps=20, batch=64, **PLAIN)
    return str(start(FlowMatching, settings, "flow", {"data": Tensors(x, y, list("abcdef"), "ring")}, Silent()))


def test_one_student_is_the_inner_recipe_itself(tmp_path, teacher):
    """Step by step and bit by bit."""
    common = {"teacher": teacher, "steps": 12, "seed": 3}
    alone = stillroom.load(run(Endpoint, tmp_path / "alone", pairs=64, teacher_steps=4, **common))
    one = run(MSD, tmp_path / "one", inner="endpoint", students=1, options=("pairs=64", "teacher_steps=4"), **common)
    routed = stillroom.load(one)
    assert isinstance(routed, Routed)
    for a, b in zip(alone.parameters(), routed.students[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone.sample(8), routed.sample(8))


def test_students_share_one_teacher_and_one_origin(tmp_path, teacher):
    recipe = MSD(settings_of(MSD, tmp_path, teacher=teacher, students=2, steps=4))
    assert all(s.flow.denoiser is recipe.flow.denoiser and s.origin is recipe.origin for s in recipe.students)
    assert len({id(s.student) for s in recipe.students}) == 2
    roles = recipe.roles()
    assert set(roles) == {"student 0", "fake 0", "student 1", "fake 1"} and roles["student 1"].every == 2


def test_smaller_students_learn_what_the_teacher_answers_and_then_distil(tmp_path, teacher, data):
    short = Optimizer(lr=5e-3, clip=1.0)
    place = run(MSD, tmp_path / "run", teacher=teacher, students=2, width=32, depth=1, steps=260, match_steps=150,
                matching=short, teacher_samples=400, options=("score.lr=2e-3",))
    generator = stillroom.load(place)
    assert isinstance(generator, Routed) and generator.routes == (0, 1)
    assert all(student.net.enter.weight.shape == (32, 2) for student in generator.students)
    rows = read_rows(place / "metrics.jsonl")
    matched = [row["match 1/teacher"] for row in rows if row["stage"] == "match"]
    assert matched[-1] < 0.5 * matched[0]
    assert "student 0/gap" in rows[-1] and "match 0/teacher" not in rows[-1]
    matched_only = run(MSD, tmp_path / "matched", teacher=teacher, students=2, width=32, depth=1, steps=151,
                       match_steps=150, matching=short, teacher_samples=400)
    assert far(generator, data) < 0.7 * far(stillroom.load(matched_only), data)
    card = load_product(place).card
    assert card["routes"] == [0, 1] and card["inner"] == "dmd" and card["classes"] == 2


def test_a_resumed_run_of_several_stages_ends_the_same(tmp_path, teacher):
    more = {"teacher": teacher, "students": 2, "width": 32, "steps": 24, "match_steps": 8, "teacher_samples": 40,
            "checkpoint_every": 12}
    whole, part = run(MSD, tmp_path / "whole", **more), run(MSD, tmp_path / "part", **more)
    for path in (part / "checkpoints").glob("*24*"):
        path.rename(part / "gone")
    (part / "product").rename(part / "old")
    stillroom.train.resume(part, lambda _: MSD, watch=Silent())
    assert same(*(stillroom.load(place).state_dict() for place in (whole, part)))


# ---- both as runs ----


@pytest.mark.parametrize("given", [True, False], ids=["data", "samples"])
def test_gdd_comes_nearer_than_its_teachers_one_step(tmp_path, teacher, data, given):
    more = {"teacher": teacher, "student": GAME, "critic": GAME} | ({} if given else {"teacher_samples": 600})
    first = far(stillroom.load(run(GDD, tmp_path / "none", data if given else None, steps=1, **more)), data)
    last = far(stillroom.load(run(GDD, tmp_path / "run", data if given else None, steps=300, **more)), data)
    assert last < 0.5 * first
    assert load_product(tmp_path / "run").card["begin"] == "teacher"


def test_msd_comes_nearer_than_its_teachers_one_step(tmp_path, teacher, data):
    first = far(stillroom.load(run(MSD, tmp_path / "none", teacher=teacher, students=2, steps=1)), data)
    assert far(stillroom.load(run(MSD, tmp_path / "run", teacher=teacher, students=2, steps=200)), data) < 0.5 * first


def test_a_critic_judges_by_a_frozen_feature_net(tmp_path):
    from stillroom.recipes.features import MaskedFeatures

    x = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    maps = Tensors(x, torch.arange(64) % 2, None, "maps")
    shape = {"data": "given", "size": 8}
    small = {**shape, **PLAIN}
    told = MaskedFeatures.Settings(out=tmp_path / "features", steps=2, batch=8, width=16, blocks=(1, 1), **small)
    start(MaskedFeatures, told, "features", {"data": maps}, Silent())
    flow = FlowMatching.Settings(out=tmp_path / "flow", steps=2, batch=16, net="dit", width=32, depth=1, **small)
    start(FlowMatching, flow, "flow", {"data": maps}, Silent())

    class Ungated(GDD):
        def check(self, batch):
            """A teacher of two steps passes no gate, and none is needed here."""

    settings = settings_of(Ungated, tmp_path / "run", teacher=str(tmp_path / "flow"), steps=4, lazy=2,
                           features=str(tmp_path / "features"), **shape)
    trainer = built(Ungated, settings, maps)
    recipe = trainer.recipe
    body, heads = state(recipe.critic.body), state(recipe.critic.heads)
    for _ in steps_of(trainer, 4):
        pass
    assert same(body, state(recipe.critic.body)) and not same(heads, state(recipe.critic.heads))


# ---- what they refuse ----


@pytest.mark.parametrize(("more", "says"), [
    ({"freeze": "cnov"}, "matches no parameter name; there are net.enter.weight"),
    ({"freeze": "net"}, "leaves nothing to learn; it matches every name, net.enter.weight"),
    ({"freeze": "(conv"}, "no regular expression"),
    ({"freeze": "layers", "lora": 2}, "give one of them"),
    ({"begin": "scratch", "lora": 2}, "leave out lora"),
    ({"begin": "nothing"}, "'teacher', 'scratch'"),
    ({"features": "runs/features", "width": 16}, "width: of a small net of the critic's own"),
    ({"r1": 0.0, "lazy": 4}, "lazy: of a penalty whose weight r1 is 0"),
])
def test_what_gdd_cannot_do_is_refused_in_a_line(tmp_path, teacher, more, says):
    with pytest.raises(Refusal, match=re.escape(says)) as error:
        run(GDD, tmp_path / "run", teacher=teacher, steps=2, **more)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_guidance_of_data_is_refused(tmp_path, teacher, data):
    with pytest.raises(Refusal, match="its teacher answers nothing"):
        run(GDD, tmp_path / "run", data, teacher=teacher, steps=2, guidance=2.0)


@pytest.mark.parametrize(("more", "says"), [
    ({"students": 3}, "the teacher knows 2 classes"),
    ({"inner": "vsd"}, "makes no generator"),
    ({"inner": "msd"}, "makes no generator"),
    ({"inner": "dmdd"}, "did you mean 'dmd'"),
    ({"options": ("evry=1",)}, "did you mean 'every'"),
    ({"options": ("every",)}, "as in a settings file"),
    ({"options": ("steps=3",)}, "give --steps itself"),
    ({"options": ('data="digits"',)}, "samples of the teacher in their place"),
    ({"options": ("fake_lora=2",)}, "which the students share"),
    ({"width": 16, "match_steps": 1, "lora": 2}, "begin anew"),
    ({"width": 16, "match_steps": 2}, "leave none"),
    ({"width": 16, "inner": "boot", "match_steps": 1}, "in a way of its own"),
    ({"width": 16, "inner": "twinflow", "match_steps": 1}, "in a way of its own"),
    ({"width": 16, "inner": "hyper-sd", "options": ("told=true",), "match_steps": 1}, "in a way of its own"),
    ({"width": 16, "inner": "phased-dmd", "match_steps": 1, "steps": 16}, "in a way of its own"),
])
def test_what_msd_cannot_do_is_refused_in_a_line(tmp_path, teacher, more, says):
    with pytest.raises(Refusal, match=re.escape(says)) as error:
        run(MSD, tmp_path / "run", teacher=teacher, **{"steps": 2, "students": 2, **more})
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_students_without_labels_to_choose_them_by_are_refused(tmp_path, data):
    alone = flow_of(tmp_path / "flow", Tensors(data.x, name="alone"))
    with pytest.raises(Refusal, match="trained without labels"):
        run(MSD, tmp_path / "run", teacher=alone, steps=2)
    with pytest.raises(Refusal, match="equal sets; give 1, 2, 3 or 6"):
        run(MSD, tmp_path / "run", teacher="ring:6", origin=flow_of_ring(tmp_path), steps=2, students=4)


def test_the_command_line_refuses_more_than_one_step(tmp_path, teacher):
    from command import stillroom as called

    told = called(f"distill gdd --teacher {teacher} --student-steps 8 --out", tmp_path / "run")
    assert told.code == 2 and told.err.count("\n") == 1 and "--student-steps" in told.err and "one step" in told.err


def test_steps_of_the_inner_recipe_begin_after_the_matching(tmp_path, teacher):
    settings = settings_of(MSD, tmp_path, teacher=teacher, steps=5, match_steps=2, width=16, students=2)
    made, seen = MSD(settings), []
    own = made.students[0].losses
    made.students[0].losses = lambda batch, turn: seen.append(turn.step) or own(batch, turn)
    for _ in steps_of(trainer_of(made, settings), 5):
        pass
    assert seen == [0, 1, 2]

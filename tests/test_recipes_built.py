"""Every recipe: that it can be built under another device, that all it trains is reached under autocast, and what it
refuses of teachers and of options that would do nothing."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from command import stillroom
from stepping import few_ends, trainer_of
from stillroom.data import Encoding, LatentSpace, Tensors
from stillroom.flows import Denoiser, FewStep, Flow, OneStep, euler
from stillroom.nets import MLP, ResNet, buildable
from stillroom.paths import Cosine, Linear
from stillroom.recipes import find, listing
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.drifting import Drifting
from stillroom.recipes.flow import Network, make_net
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Product, load_product, product_hash, save_product, start
from stillroom.train.turn import Noise, Turn
from stillroom.train.watch import Silent
from stillroom.train.world import World

PLAIN = {"precision": "float32", "device": "cpu", "batch": 16}
HEADS = {"adversarial": Adversarial(weight=1.0, r1=0.1)}
POINTS = {"data": "given", "size": 1}


def taught(place, path=None, prediction="v", card=None, **net):
    """A flow that nobody trained."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(2, 16, 2, classes=4, **net), path or Linear(), prediction)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_product(Product("flow", {"flow": Flow(denoiser, (2,), "euler", 4)}, {"shape": [2], **(card or {})}), place)
    return str(place)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return taught(tmp_path_factory.mktemp("teacher") / "flow")


@pytest.fixture(scope="module")
def data():
    return Tensors(torch.randn(80, 2, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 4, name="points")


def made(name, **settings):
    """Built without data, of a recipe that has samples of its teacher where there are none."""
    recipe, given = find(name), settings.pop("given", None)
    settings |= few_ends(recipe, settings, 20) if given is None else {}
    told = recipe.Settings(**{"out": "unused", **PLAIN, **settings})
    return recipe(told) if given is None else recipe(told, given)


def turn_of(recipe, stage, step=0):
    """All roles in turn."""
    cpu = torch.device("cpu")
    return Turn(step=step, stage=stage, roles=frozenset(recipe.roles()), batch=recipe.settings.batch, micros=1,
                world=World(0, 1, cpu), noise=Noise(0, step, cpu), micro=0, watched=False)


# ---- under a device ----


class Accelerated(TorchFunctionMode):
    """What `with torch.device("cuda")` refuses of tensors that are made without saying where."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if func in _device_constructors() and kwargs.get("device") is None and generator is not None:
            raise RuntimeError(f"expected a generator of the accelerator, not of the {generator.device}")
        return func(*args, **kwargs)


PICTURES = {"data": "pictures", "size": 16}
OPTIONS = {
    "decoupled-dmd": ({"guidance": 3.0}, {"guidance": 3.0, "shield": "statistics"}), "dmd": ({}, HEADS),
    "disback": ({}, HEADS), "sid": ({}, HEADS), "gdd": ({}, {"begin": "scratch"}),
    "guidance-lora": ({}, {"strongest": 4.0}), "hyper-sd": ({}, {**HEADS, "told": True}), "vsd": ({}, {"fake": "lora"}),
    "msd": ({"students": 2}, {"students": 2, "width": 8}),
    "drifting": (POINTS, {**POINTS, "teacher": ""}), "flow": (POINTS,), "features": (PICTURES,),
    "codec": (PICTURES,), "rae": ({**PICTURES, "patch": 4},), "tokenizer": ({**PICTURES, "patch": 4},),
    "dmvae": ({**PICTURES, "codec": "bundled", "reference": "gmm:4"},),
    "encoder": ({**PICTURES, "teacher": "bundled"},), "decoder": ({**PICTURES, "teacher": "bundled"},),
}


@pytest.mark.parametrize("name", [entry.name for entry in listing()])
def test_every_recipe_is_built_under_an_accelerator(name, teacher, data):
    pictures = Tensors(torch.rand(80, 3, 16, 16) * 2 - 1, torch.arange(80) % 4, name="pictures")
    for more in OPTIONS.get(name, ({},)):
        fields = find(name).Settings.__dataclass_fields__
        told = {"teacher": teacher} if "teacher" in fields else {}
        given = {"given": data, "pictures": pictures}.get(more.get("data"))
        with Accelerated():
            made(name, **{**told, **more}, given=given)


# ---- under autocast ----


@pytest.mark.parametrize(("name", "more"), [
    ("boot", {}), ("consistency", {}), ("dmd", {"student_steps": 3}), ("sid", HEADS), ("phased-dmd", {}),
    ("hyper-sd", {"score_weight": 0.1}), ("decoupled-dmd", {"guidance": 3.0}), ("twinflow", {"wait": 0}),
    ("swiftbrush", {}), ("gdd", {"lazy": 1}),
])
def test_under_autocast_every_trained_tensor_has_a_gradient(name, more, teacher):
    """torch before 2.13 cast weights once under no_grad, and kept them so when they were asked again with gradient."""
    recipe = made(name, teacher=teacher, **more, precision="bfloat16")
    trainer = trainer_of(recipe, recipe.settings)
    for step in (0, 1, trainer.schedule.steps - 1):
        turn = trainer.make_turn(step, trainer.schedule.due(step), Noise(0, step, torch.device("cpu")), 0)
        for losses in trainer.forward({}, turn, 0):
            assert all(value.dtype == torch.float32 for terms in losses.values() for value in terms.values())
            trainer.backward(losses, turn)
        for role in trainer.schedule.due(step):
            parameters = trainer.learners[role].parameters
            assert [n for n, p in parameters.items() if p.grad is None] == []
            for p in parameters.values():
                p.grad = None


# ---- what is said of teachers ----


def test_cards_name_the_teacher_that_taught_and_not_what_lies_there_now(tmp_path, data):
    place = taught(tmp_path / "flow")
    before, points = product_hash(place), {**POINTS, "given": data}
    runs = [made("dmd", teacher=place), made("vsd", teacher=place), made("drifting", teacher=place, **points)]
    (tmp_path / "flow").rename(tmp_path / "gone")
    taught(tmp_path / "flow", guided=True)
    for recipe in runs:
        card = recipe.product().card
        assert (card["teacher"], card["teacher_hash"]) == (place, before) and before != product_hash(place)


def test_a_card_without_a_teacher_names_none(data):
    card = made("drifting", **POINTS, given=data).product().card
    assert card["teacher"] is None and "teacher_hash" not in card


def test_who_is_asked_in_pure_noise_must_see_there(tmp_path):
    """An origin that does is no help to a teacher that does not."""
    blind = taught(tmp_path / "eps", Cosine(), "eps")
    sees = taught(tmp_path / "v", Cosine(), "v")
    for name in ("boot", "consistency", "hyper-sd", "guidance-lora"):
        with pytest.raises(Refusal, match="eps: it answers eps, which says nothing of data in pure noise"):
            made(name, teacher=blind, origin=sees)
    assert made("dmd", teacher=blind, origin=sees).flow.denoiser.prediction == "eps"
    assert made("guidance-lora", teacher=blind).student.prediction == "eps"


def test_a_teacher_that_is_told_its_strength_has_no_answer_to_be_guided_away_from(tmp_path):
    told = taught(tmp_path / "told", guided=True)
    with pytest.raises(Refusal, match="taught no answer without a label"):
        made("guidance-lora", teacher=told)


def test_a_student_takes_no_strength_that_it_never_learned(tmp_path, data):
    told = taught(tmp_path / "told", guided=True)
    for recipe in (made("dmd", teacher=told, guidance=2.0), made("boot", teacher=told)):
        save_product(recipe.product(), tmp_path / type(recipe).__name__)
        student = load_product(tmp_path / type(recipe).__name__).parts["generator"]
        assert isinstance(student, OneStep) and not student.takes_strength
        with pytest.raises(Refusal, match="learned no answer without a label"):
            student.sample(4, guidance=3.0)
    drifts = made("drifting", teacher=told, **POINTS, given=data), made("drifting", strongest=2.0, **POINTS, given=data)
    assert [d.student.takes_strength for d in drifts] == [False, True]


def test_a_strength_is_taken_only_where_it_is_said_to_be_learned(tmp_path):
    net = MLP(2, 16, classes=4, guided=True)
    for learned in (True, False):
        one = OneStep(net, Linear(), "v", (2,), **({"takes_strength": True} if learned else {}))
        save_product(Product("generator", {"generator": one}, {}), tmp_path / str(learned))
        assert load_product(tmp_path / str(learned)).parts["generator"].takes_strength is learned


@pytest.mark.parametrize("more", [{"strongest": 4.0}, {"strongest": 4.0, "lora": 0}, {}], ids=lambda m: "-".join(m))
def test_the_preview_shows_the_guided_teacher(teacher, more):
    recipe = made("guidance-lora", teacher=teacher, **more)
    flow = load_product(teacher).parts["flow"]
    shown = recipe.preview()["teacher"]
    assert torch.allclose(shown, flow.sample(len(shown), guidance=3.0), atol=1e-5)
    assert not torch.allclose(shown, flow.sample(len(shown)), atol=1e-2)


def test_heads_stand_on_the_teacher_and_not_on_the_origin(tmp_path, teacher):
    origin = taught(tmp_path / "origin")
    for name in ("dmd", "hyper-sd"):
        recipe = made(name, teacher=teacher, origin=origin, **HEADS)
        assert recipe.adversary.denoiser is recipe.flow.denoiser
        assert made(name, teacher="ring:4", origin=origin, **HEADS).adversary.denoiser.net is not None


def features_of(place, **card):
    save_product(Product("features", {"features": ResNet(2, 8, 8, (1, 1))}, {"shape": [2, 8, 8], **card}), place)
    return str(place)


def test_features_of_other_latents_are_refused(tmp_path):
    encoding = Encoding(LatentSpace(2, 1, (0.0, 0.0), (1.0, 1.0)), "abc", "centre 8")
    maps = Tensors(torch.randn(40, 2, 8, 8), torch.arange(40) % 2, name="maps")
    given = {"data": "given", "size": 8, "width": 16, "depth": 1, "taps": ("features",), "given": maps}
    alike = features_of(tmp_path / "alike")
    assert made("drifting", features=alike, **given).phi is not None
    maps.encoding = encoding
    with pytest.raises(Refusal, match=r"features .*alike: made on other latents than this run's, or on pictures"):
        made("drifting", features=alike, **given)
    net = make_net(Network(width=16, depth=1), (2, 8, 8), 2)
    flow = Flow(Denoiser(net, Linear()), (2, 8, 8))
    save_product(Product("flow", {"flow": flow}, {"shape": [2, 8, 8]}), tmp_path / "flow")
    assert made("gdd", teacher=str(tmp_path / "flow"), features=alike).critic is not None
    other = features_of(tmp_path / "other", encoding={"codec": "abc"})
    with pytest.raises(Refusal, match=r"features .*other: made on other latents"):
        made("gdd", teacher=str(tmp_path / "flow"), features=other)


# ---- what is held, and given out ----


def test_where_trajectories_begin_is_known_from_the_seed_and_kept_nowhere(teacher):
    recipe = made("endpoint", teacher=teacher, pairs=30, teacher_steps=4)
    assert set(recipe.memory()) == {"ends"}
    recipe.ends.follow()
    flow = load_product(teacher).parts["flow"]
    times = torch.linspace(1, 0, 5)
    assert torch.allclose(euler(flow.denoiser, recipe.noises, times, recipe.ends.labels), recipe.ends.ends, atol=1e-5)


@buildable
class Shift(nn.Module):
    """A network without a layer of weights."""

    classes, two_times = None, False

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(2))

    def forward(self, x_t, t, y=None, r=None):
        return x_t + self.by


def test_adapters_on_a_network_without_layers_for_them_are_refused(tmp_path):
    pytest.importorskip("peft")
    flow = Flow(Denoiser(Shift(), Linear(), "v"), (2,), "euler", 4)
    save_product(Product("flow", {"flow": flow}, {"shape": [2]}), tmp_path / "flow")
    for flag in ("--lora", "--fake-lora"):
        told = stillroom("distill dmd --teacher", tmp_path / "flow", flag, "2 --out", tmp_path / "run")
        assert told.code == 2 and told.err == ("stillroom: lora: a Shift has no Linear or Conv2d layer that could "
                                               "carry an adapter; learn all of it, with rank 0\n")
    assert not (tmp_path / "run").exists()


def test_adapters_of_vsd_stand_on_the_teachers_own_weights(teacher):
    recipe = made("vsd", teacher=teacher, fake="lora")
    own = {id(p) for p in recipe.flow.parameters()}
    assert {id(p) for name, p in recipe.fake.named_parameters() if "lora_" not in name} == own
    x, t = torch.randn(5, 2), torch.full((5,), 0.5)
    before = recipe.teacher.x0(x, t)
    with torch.no_grad():
        for name, p in recipe.fake.named_parameters():
            if "lora_" in name:
                p.fill_(0.3)
    assert torch.equal(recipe.teacher.x0(x, t), before) and not torch.allclose(recipe.fake.x0(x, t), before, atol=1e-3)


def test_parts_of_a_step_that_share_no_graph_come_one_by_one(teacher):
    hyper = made("hyper-sd", teacher=teacher, segments=(1,), score_weight=0.1, **HEADS)
    for recipe, parts in ((hyper, ["head", "student", "student", "fake"]), (made("vsd", teacher=teacher), ["fake",
                          "particles"]), (made("gdd", teacher=teacher), ["student", "critic"])):
        turn = turn_of(recipe, recipe.stages()[0].name)
        assert [list(part) for part in recipe.losses({}, turn)] == [[name] for name in parts]


def test_a_student_that_is_told_where_to_jump_draws_in_one_segment(teacher, tmp_path):
    settings = find("hyper-sd").Settings(out=tmp_path / "run", teacher=teacher, segments=(1,), told=True, steps=2,
                                         teacher_samples=20, grid=4, **PLAIN)

    class Ungated(find("hyper-sd")):
        def check(self, batch):
            """A teacher that nobody trained passes no gate, and none is needed here."""

    start(Ungated, settings, "hyper-sd", {}, Silent())
    student = load_product(tmp_path / "run").parts["generator"]
    assert isinstance(student, FewStep) and student.sample(4).isfinite().all()


# ---- options that would do nothing ----


@pytest.mark.parametrize(("name", "more", "says"), [
    ("phased-dmd", {"times": (0.02, 0.7)}, "times 0.02 0.7: reach no noise level between 0.75 and 1"),
    ("phased-dmd", {"times": (0.5, 0.5)}, "the first is not below the second"),
    ("decoupled-dmd", {"guidance": 3.0, "times": (0.5, 0.98), "student_steps": 4}, "between 0 and 0.5"),
    ("decoupled-dmd", {"guidance": 3.0, "times": (0.9, 0.1)}, "the first is not below the second"),
    ("decoupled-dmd", {"guidance": 3.0, "shield": "none", "fake_lora": 4}, "shield none has no fake score"),
    ("decoupled-dmd", {"guidance": 3.0, "shield": "none", "score": Optimizer(lr=1e-3)}, "score: shield none has no"),
    ("decoupled-dmd", {"guidance": 3.0, "shield": "statistics", "every": 5}, "every: shield statistics has no role"),
    ("dmd", {"move": "ode"}, "of a student of several steps"), ("dmd", {"asked": "noised"}, "of several steps"),
    ("twinflow", {"wait": 200, "steps": 200}, "wait 200: leaves none of 200 steps"),
    ("twinflow", {"wait": 150, "steps": 100}, "wait 150: leaves none of 100 steps"),
    ("vsd", {"rank": 3}, "rank: the fake score learns whole"),
    ("vsd", {"width": 17}, "width: the fake score is the teacher's own network"),
    ("vsd", {"fake": "lora", "base_steps": 7}, "base_steps: the fake score is the teacher's own network"),
    ("sid", {"cfg": "zero", "drop": 0.9, **HEADS}, "drop: with cfg zero the fake score is told no labels"),
    ("phased-dmd", {"student_steps": 2, "phases": 1, "intervals": "disjoint"}, "intervals: one phase is judged at all"),
    ("msd", {"match_steps": 1}, "match_steps: students begin as copies of the origin"),
])
def test_what_would_do_nothing_is_refused_in_a_line(teacher, name, more, says):
    with pytest.raises(Refusal, match=says) as error:
        made(name, teacher=teacher, **more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("more", "says"), [
    ({"width": 32, "net": "dit"}, "leave out net and width, or teacher"),
    ({"coverage": 1.0, "support": 1}, "support = 1: coverage is of positives beside each other"),
    ({"teacher_samples": 40}, "teacher_samples: positives = data draws none"),
])
def test_drifting_refuses_what_would_do_nothing(teacher, data, more, says):
    with pytest.raises(Refusal, match=says) as error:
        Drifting(Drifting.Settings(out="unused", teacher=teacher, **POINTS, **PLAIN, **more), data)
    assert "\n" not in str(error.value)


def test_samples_of_the_teacher_are_not_asked_for_beside_data(teacher, data):
    consistency = find("consistency")
    settings = consistency.Settings(out="unused", teacher=teacher, teacher_samples=40, **POINTS, **PLAIN)
    with pytest.raises(Refusal, match=r"^teacher_samples: there are data") as error:
        consistency(settings, data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("net", "shape", "says"), [
    ("dit", (4, 8, 16), "takes squares"), ("ddt", (4, 8, 16), "takes squares"), ("unet", (6, 8), "takes points"),
    ("dit", (6, 8), "takes points"),
])
def test_a_net_refuses_data_that_it_cannot_take(net, shape, says):
    with pytest.raises(Refusal, match=says) as error:
        make_net(Network(net=net), shape, None)
    assert "\n" not in str(error.value)

"""SwiftBrush, SiD and DisBack: their gradients against formulas, one set of weights, the way down, and refusals."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

import stillroom
from closed_forms import F64, draws, gaussian, mixture
from stepping import few_ends, same, state, steps_of, stopped_at, trainer_of, whole
from stillroom.data import Tensors
from stillroom.flows import Bare, Flow, Gaussian, denoising_loss
from stillroom.match import score_identity
from stillroom.paths import Linear
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.decoupled_dmd import DecoupledDMD
from stillroom.recipes.disback import DisBack
from stillroom.recipes.dmd import DMD
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.guidance_lora import GuidanceLora
from stillroom.recipes.msd import MSD
from stillroom.recipes.phased_dmd import PhasedDMD
from stillroom.recipes.sds import SDS
from stillroom.recipes.sid import SiD
from stillroom.recipes.swiftbrush import SwiftBrush
from stillroom.settings import Optimizer, Refusal, from_mapping
from stillroom.train import Product, Silent, load_product, resume, save_product, start
from stillroom.train.folder import read_rows
from stillroom.train.loop import Trainer
from stillroom.train.world import World
from students import PLAIN, POINTS, RATE, clusters, far, flow_of_points, moved, points  # noqa: F401

GIVEN = {"batch": 64, "student": RATE, "score": Optimizer(lr=2e-3, clip=1.0), "average": 0.98, **PLAIN}
ANCHOR = Adversarial(weight=0.1)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("unlabelled") / "run"
    settings = FlowMatching.Settings(out=out, steps=2, batch=16, **POINTS, **PLAIN)
    return str(start(FlowMatching, settings, "flow", {"data": Tensors(data.x, name="alone")}, Silent()))


def given_to(recipe):
    return {name: value for name, value in GIVEN.items() if name in recipe.Settings.__dataclass_fields__}


def made(recipe, out, teacher, **more):
    torch.manual_seed(0)
    settings = recipe.Settings(out=out, **{**given_to(recipe), "teacher": teacher, **more})
    return recipe(settings), settings


def run(recipe, out, teacher, **more):
    settings = recipe.Settings(out=out, **{**given_to(recipe), "teacher": teacher, **more})
    return start(recipe, settings, recipe.__name__.lower(), {}, Silent())


class Turn:
    """All roles in turn, with noise that can be drawn again."""

    def __init__(self, batch=16, stage="distil", step=0):
        self.batch, self.stage, self.step, self.generator = batch, stage, step, torch.Generator().manual_seed(5)

    def __contains__(self, role):
        return True

    def rows(self, count):
        return torch.arange(count)

    def randn(self, like):
        return torch.randn(getattr(like, "shape", like), generator=self.generator)

    def rand(self, like, shared=False):
        return torch.rand(like, generator=self.generator)

    def draw(self, law):
        return law.quantile(self.rand((self.batch,)))


def shaken(module, pattern, seed=1):
    """Weights that tell two networks apart."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if pattern in name:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize(("recipe", "more"), [
    (SwiftBrush, {"steps": 300, "guidance": 1.0}),
    (SiD, {"steps": 200}),
    (SiD, {"steps": 300, "student_steps": 2}),
    (DisBack, {"steps": 450, "record": 100, "kept": 2, "advance": 50}),
], ids=["swiftbrush", "sid", "sid-2", "disback"])
def test_a_student_comes_nearer_than_its_teachers_one_step(tmp_path, teacher, data, recipe, more):
    flow = stillroom.load(teacher)
    student = stillroom.load(run(recipe, tmp_path / "run", teacher, **more))
    assert far(student, data) < 0.5 * sum(
        float(stillroom.measure.energy_distance(flow.sample(600, steps=1)[flow.labels(0, 600) == c],
                                                data.x[data.y == c])) for c in (0, 1))
    assert load_product(tmp_path / "run").card["teacher"] == teacher


# ---- SwiftBrush ----


def test_swiftbrush_reads_nothing_and_holds_the_teacher_once(tmp_path, teacher):
    recipe, _ = made(SwiftBrush, tmp_path, teacher, steps=2)
    assert recipe.inputs == ()
    assert isinstance(recipe.flow.denoiser, Bare)
    whole = {p.data_ptr(): p.numel() for module in (recipe.flow, recipe.fake, recipe.origin)
             for p in module.parameters()}
    adapters = sum(p.numel() for name, p in recipe.fake.named_parameters() if "lora_" in name)
    alone = sum(p.numel() for p in stillroom.load(teacher).parameters())
    assert sum(whole.values()) == alone + adapters
    apart = {p.data_ptr() for module in (recipe.student, recipe.mean) for p in module.parameters()}
    assert not apart & set(whole)


def test_training_the_adapters_leaves_the_teachers_answers_as_they_were(tmp_path, teacher):
    recipe, settings = made(SwiftBrush, tmp_path, teacher, steps=5, guidance=2.0)
    x, t, y = torch.randn(6, 2), torch.linspace(0.1, 0.9, 6), torch.arange(6) % 2
    before, fake = recipe.teacher.x0(x, t, y), recipe.guided_fake.x0(x, t, y)
    assert torch.equal(before, fake)                                    # adapters begin without effect
    list(steps_of(trainer_of(recipe, settings), 5))
    assert torch.equal(recipe.teacher.x0(x, t, y), before)
    assert not torch.allclose(recipe.guided_fake.x0(x, t, y), fake, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_swiftbrushs_gradient_is_sigma_squared_times_the_difference_of_noises(tmp_path, teacher, guidance):
    recipe, _ = made(SwiftBrush, tmp_path, teacher, steps=2, guidance=guidance)
    shaken(recipe.fake, "lora_")
    x, y = torch.randn(16, 2, requires_grad=True), torch.arange(16) % 2
    (ours,) = torch.autograd.grad(recipe.gap(x, y, Turn()).sum(), x)
    turn = Turn()
    t, eps = turn.draw(recipe.gap_law), turn.randn(x)
    x_t, sigma, null = recipe.fake.path.noise(x, t, eps).detach(), t[:, None], torch.full_like(y, 2)
    with torch.no_grad():
        def guided(denoiser):
            return denoiser.eps(x_t, t, null) + guidance * (denoiser.eps(x_t, t, y) - denoiser.eps(x_t, t, null))

        formula = sigma**2 * (guided(recipe.flow.denoiser) - guided(recipe.fake))
    assert formula.abs().max() > 0.01 and torch.allclose(ours, formula / 2, atol=2e-5)


def test_swiftbrushs_fake_score_learns_noise_with_the_papers_weight_and_without_dropped_labels(tmp_path, teacher):
    x, y, turn = torch.randn(16, 2), torch.arange(16) % 2, Turn()
    recipe, _ = made(SwiftBrush, tmp_path, teacher, steps=2, drop=0.5)
    t, eps, u = turn.draw(recipe.fake_law), turn.randn(x), turn.rand((16,))
    told = y.masked_fill(u < 0.5, 2)
    assert 0 < (told == 2).sum() < 16
    loss = (1 - t) ** 2 * denoising_loss(recipe.fake, x, t, eps, told)
    assert torch.equal(recipe.tracked(x, y, Turn()), loss)


def test_both_roles_of_swiftbrush_move_in_every_step(tmp_path, teacher):
    recipe, settings = made(SwiftBrush, tmp_path, teacher, steps=4)
    seen = []
    for _ in steps_of(trainer_of(recipe, settings), 4):
        seen.append((state(recipe.student), state(recipe.fake)))
    assert not any(same(a[0], b[0]) or same(a[1], b[1]) for a, b in pairwise(seen[1:]))      # the first rate is 0


# ---- SiD ----


def test_the_gradient_of_the_score_identity_is_that_of_finite_differences():
    """Through x, the noised x, and both closed-form scores; the weight is a constant."""
    teacher, own, path = mixture(), gaussian(dim=2), Linear()
    x, eps, y = draws(5, 2, seed=7), draws(5, 2, seed=8), torch.arange(5) % 3
    t = torch.linspace(0.15, 0.9, 5, dtype=F64)
    for alpha in (0.0, 1.0, 1.2):
        def parts(x):
            x_t = path.noise(x, t, eps)
            return own.x0(x_t, t), teacher.x0(x_t, t, y)

        leaf = x.clone().requires_grad_()
        (ours,) = torch.autograd.grad(score_identity(leaf, *parts(leaf), alpha).sum(), leaf)
        fixed = (x - parts(x)[1]).abs().mean(1)

        def value(x, alpha=alpha, fixed=fixed):
            fake, real = parts(x)
            return (((real - fake) * (real - x - alpha * (real - fake))).mean(1) / fixed).sum()

        h = 1e-6
        for i in range(5):
            for j in range(2):
                step = torch.zeros_like(x)
                step[i, j] = h
                assert float(ours[i, j]) == pytest.approx(float(value(x + step) - value(x - step)) / (2 * h), abs=1e-7)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_between_gaussians_the_score_identity_pulls_to_the_target_by_a_known_amount(alpha):
    """Student N(m, s^2), target N(0, s^2), gain k: dL/dm = m (1 - k a)^2 in every sample, before the weight."""
    m, s2, t = draws(2, seed=3), 0.3, torch.full((4,), 0.6, dtype=F64)
    target, own = (Gaussian(mean, s2 * torch.eye(2, dtype=F64)) for mean in (torch.zeros(2, dtype=F64), m))
    x = (m + s2**0.5 * draws(4, 2, seed=4)).requires_grad_()
    x_t = Linear().noise(x, t, draws(4, 2, seed=5))
    real = target.x0(x_t, t)
    (ours,) = torch.autograd.grad(score_identity(x, own.x0(x_t, t), real, alpha).sum(), x)
    a, sigma2 = 0.4, 0.36
    k = a * s2 / (a**2 * s2 + sigma2)
    expected = m * (1 - k * a) ** 2 / (x - real).detach().abs().mean(1, keepdim=True) / 2
    assert torch.allclose(ours, expected, rtol=1e-10)


def test_with_an_exact_fake_score_the_identity_measures_the_scores_distance():
    """E (R - F)'(R - x) = E |R - F|^2, whatever R: the loss without its weight is (1 - alpha) E |R - F|^2."""
    own, teacher, n = gaussian(dim=2), mixture(), 200_000
    x, t = own.draw(draws(n, 2, seed=1)), torch.full((n,), 0.5, dtype=F64)
    x_t = Linear().noise(x, t, draws(n, 2, seed=2))
    fake, real = own.x0(x_t, t), teacher.x0(x_t, t)
    weight = (x - real).abs().mean(1)
    distance = (real - fake).square().mean(1)
    error = 4 * float(((real - fake) * (fake - x)).mean(1).std()) / n**0.5
    for alpha in (0.0, 1.0, 1.2):
        loss = float((weight * score_identity(x, fake, real, alpha)).mean())
        assert abs(loss - (1 - alpha) * float(distance.mean())) < error
    assert error < 0.02 * float(distance.mean())


def test_sid_asks_each_score_at_its_own_scale(tmp_path, teacher):
    recipe, _ = made(SiD, tmp_path, teacher, steps=2, guidance=3.0, fake_guidance=2.0, fake_own_guidance=1.5)
    shaken(recipe.fake, "")
    x, y, turn = torch.randn(16, 2), torch.arange(16) % 2, Turn()
    t, eps = turn.draw(recipe.gap_law), turn.randn(x)
    x_t, null, bare = Linear().noise(x, t, eps), torch.full_like(y, 2), recipe.flow.denoiser

    def at(denoiser, scale):
        return denoiser.x0(x_t, t, null) + scale * (denoiser.x0(x_t, t, y) - denoiser.x0(x_t, t, null))

    ours = recipe.followed(x, y, Turn())["identity"]
    assert torch.allclose(ours, score_identity(x, at(recipe.fake, 2.0), at(bare, 3.0)), atol=1e-5)
    own = (at(recipe.fake, 1.5) - x) / t[:, None]                                   # x0's error is t times v's
    assert torch.allclose(recipe.tracked(x, y, Turn()), own.square().mean(1), rtol=1e-3, atol=1e-5)


def test_zero_asks_the_fake_score_without_the_label(tmp_path, teacher):
    recipe, _ = made(SiD, tmp_path, teacher, steps=2, cfg="zero", adversarial=ANCHOR)
    shaken(recipe.fake, "")
    x, y = torch.randn(16, 2), torch.arange(16) % 2
    a, b = (recipe.tracked(x, labels, Turn()) for labels in (y, 1 - y))
    assert torch.equal(a, b)
    a, b = (recipe.followed(x, labels, Turn())["identity"] for labels in (y, 1 - y))
    assert not torch.allclose(a, b)                                                 # but the teacher with it


@pytest.mark.parametrize("more", [
    {"cfg": "zero", "adversarial": ANCHOR}, {"cfg": "anti", "fake_guidance": -1.0, "adversarial": ANCHOR},
    {"guidance": 2.0, "fake_guidance": 2.0, "fake_own_guidance": 2.0}, {"fake_lora": 2, "adversarial": ANCHOR},
    {"student_steps": 2, "asked": "noised"},
], ids=str)
def test_every_option_of_sid_trains(tmp_path, teacher, more):
    place = run(SiD, tmp_path / "run", teacher, steps=12, **more, **few_ends(SiD, more, 64))
    assert stillroom.load(place).sample(8).isfinite().all() and moved(place, teacher)
    last = read_rows(place / "metrics.jsonl")[-1]
    judged = {"student/adversarial", "head/critic"}
    assert judged & last.keys() == (judged if "adversarial" in more else set())
    assert all(last[name] for name in ("student/identity", "fake/dsm", *(judged & last.keys())))


def test_sids_heads_stand_on_the_fake_score_and_dmds_on_the_teacher(tmp_path, teacher):
    sid, _ = made(SiD, tmp_path, teacher, steps=2, adversarial=ANCHOR)
    dmd, _ = made(DMD, tmp_path, teacher, steps=2, adversarial=ANCHOR)
    assert sid.adversary.denoiser is sid.fake and dmd.adversary.denoiser is dmd.origin


# ---- heads on the fake score ----


def judged(recipe, x, t, eps, y):
    """[B]: what heads say of the fake score's features at x noised."""
    found = recipe.fake.hidden(recipe.fake.path.noise(x, t, eps), t, y, recipe.adversary.layers)
    return recipe.adversary.heads(list(found.values()))


def gradients(loss, module):
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss.mean(), list(wanted.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(wanted.items(), found, strict=True)}


@pytest.mark.parametrize(("recipe", "more"), [
    (DMD, {}), (DMD, {"fake_lora": 2}), (SiD, {}), (DisBack, {"steps": 2000}),
], ids=["dmd", "dmd-lora", "sid", "disback"])
def test_the_heads_teach_the_fake_score_that_they_stand_on(tmp_path, teacher, recipe, more):
    """softplus(D(made)) + softplus(-D(real)) moves both, and softplus(-D(made)) the student, through the fake score."""
    heads = Adversarial(weight=0.5, r1=0.1)
    recipe, _ = made(recipe, tmp_path, teacher, adversarial=heads, judge="fake", judge_weight=0.25, **more)
    trainer_of(recipe, recipe.settings)                                         # which says what learns
    shaken(recipe.fake, "lora_" if more.get("fake_lora") else "")
    shaken(recipe.adversary.heads, "")
    x, real, y, turn = torch.randn(16, 2, requires_grad=True), torch.randn(16, 2), torch.arange(16) % 2, Turn()
    terms = recipe.judged(recipe.adversary.critic(real, x, Turn(), 1 - y, y))
    assert {role: set(found) for role, found in terms.items()} == {"head": {"critic", "r1"}, "fake": {"critic"}}
    t, of_real, of_made = turn.draw(recipe.gap_law), turn.randn(real), turn.randn(x)
    critic = (1 + judged(recipe, x.detach(), t, of_made, y).exp()).log() + (
        1 + (-judged(recipe, real, t, of_real, 1 - y)).exp()).log()
    for role, module, weight in (("head", recipe.adversary.heads, 1.0), ("fake", recipe.fake, 0.25)):
        ours, by_hand = gradients(terms[role]["critic"], module), gradients(critic, module)
        assert any(g.abs().max() > 1e-4 for g in by_hand.values())
        for name, g in by_hand.items():
            assert torch.allclose(ours[name], weight * g, rtol=1e-4, atol=1e-7), name
    turn = Turn()
    t, eps = turn.draw(recipe.gap_law), turn.randn(x)
    (by_hand,) = torch.autograd.grad(0.5 * (1 + (-judged(recipe, x, t, eps, y)).exp()).log().mean(1).sum(), x)
    (ours,) = torch.autograd.grad(recipe.adversary.maker(x, Turn(), y).sum(), x)
    assert torch.allclose(ours, by_hand, rtol=1e-4, atol=1e-7) and by_hand.abs().max() > 1e-4


@pytest.mark.parametrize(("recipe", "more", "moved"), [
    (DMD, {}, False), (DMD, {"judge": "fake"}, True), (DMD, {"judge": "fake", "judge_weight": 0.0}, False),
    (SiD, {}, False), (SiD, {"judge": "fake", "judge_weight": 0.01}, True), (SiD, {"judge": "teacher"}, False),
])
def test_unless_asked_heads_leave_the_fake_score_as_it_is_without_them(tmp_path, teacher, recipe, more, moved):
    """The student stands still, so that nothing else could reach the fake score."""
    still = Optimizer(lr=0.0)
    ends = []
    for k, rate in enumerate((0.1, 0.2)):
        heads = Adversarial(weight=0.1, head=Optimizer(lr=rate))
        recipe_k, settings = made(recipe, tmp_path / f"{k}", teacher, steps=4, student=still, teacher_samples=64,
                                  adversarial=heads, **more)
        list(steps_of(trainer_of(recipe_k, settings), 4))
        ends.append(state(recipe_k.fake))
    assert same(*ends) != moved
    on = recipe_k.fake if moved or more.get("judge", recipe.Settings.judge) == "fake" else recipe_k.origin
    assert recipe_k.adversary.denoiser is on


@pytest.mark.parametrize("more", [{}, {"fake_lora": 4}, {"accumulate": 2}], ids=str)
def test_a_student_judged_by_a_fake_score_that_learns_to_comes_nearer(tmp_path, teacher, data, more):
    judge = {"adversarial": ANCHOR, "judge": "fake", "teacher_samples": 500}
    first, later = (far(stillroom.load(run(DMD, tmp_path / f"{steps}", teacher, steps=steps, **judge, **more)), data)
                    for steps in (1, 300))
    assert later < 0.5 * first


# ---- DisBack ----


WAY = {"steps": 40, "record": 12, "kept": 3, "advance": 5}


def test_the_way_down_is_kept_and_walked_back(tmp_path, teacher):
    recipe, settings = made(DisBack, tmp_path, teacher, **WAY)
    student, passed, fakes = state(recipe.student), [], {}
    trainer = trainer_of(recipe, settings)
    for step in steps_of(trainer, 40):
        fakes[step] = state(recipe.fake)                                # after that many steps
        if step == 12:
            assert same(state(recipe.student), student)                 # the untouched student was recorded
        if step >= 12:
            passed.append(recipe.target(step))
    kept = [state(each) for each in recipe.way]
    assert all(same(weights, fakes[k]) for weights, k in zip(kept, (3, 6, 9), strict=True))
    assert [next(i for i, each in enumerate(recipe.targets) if each is target) for target in passed] == (
        [0] * 5 + [1] * 5 + [2] * 5 + [3] * 13)
    assert [*recipe.targets] == [recipe.way[2], recipe.way[1], recipe.way[0], recipe.teacher]
    assert not same(state(recipe.student), student)


def test_the_gap_follows_the_target_of_the_step(tmp_path, teacher):
    recipe, _ = made(DisBack, tmp_path, teacher, **WAY)
    for k, each in enumerate((*recipe.way, recipe.fake)):
        shaken(each, "", seed=k)
    x, y = torch.randn(16, 2), torch.arange(16) % 2
    for step, real in ((12, recipe.way[2]), (18, recipe.way[1]), (26, recipe.way[0]), (30, recipe.flow.denoiser)):
        expected = recipe.gap(x, y, Turn(), real)
        assert expected.mean() > 0 and torch.equal(recipe.followed(x, y, Turn(step=step))["gap"], expected)


def test_the_way_begins_at_the_teacher_wherever_the_student_does(tmp_path, teacher, data):
    settings = FlowMatching.Settings(out=tmp_path / "flow", steps=2, batch=16, **POINTS, **PLAIN)
    other = str(start(FlowMatching, settings, "flow", {"data": data}, Silent()))
    recipe, _ = made(DisBack, tmp_path, teacher, origin=other, **WAY)
    assert same(state(recipe.fake), state(recipe.flow.denoiser)) and same(state(recipe.student), state(recipe.origin))
    assert not same(state(recipe.fake), state(recipe.student))
    recipe, _ = made(DisBack, tmp_path, "ring:2", origin=other, **WAY)     # a closed form, which ends the way back
    assert same(state(recipe.fake), state(recipe.origin)) and recipe.target(39) is recipe.flow.denoiser


def test_the_control_shares_the_fake_score_and_keeps_nothing(tmp_path, teacher):
    ends = []
    for target, way in (("backtrack", WAY), ("teacher", {"steps": 40, "record": 12})):
        recipe, settings = made(DisBack, tmp_path, teacher, target=target, **way)
        assert len(recipe.way) == (3 if target == "backtrack" else 0)
        for step in steps_of(trainer_of(recipe, settings), 13):
            if step == 12:
                ends.append(state(recipe.fake))
        assert (recipe.target(12) is recipe.teacher) == (target == "teacher")
    assert same(*ends)


@pytest.mark.parametrize("stop", [4, 12, 23])
def test_a_run_that_was_stopped_goes_on_to_the_same_product(tmp_path, teacher, stop):
    more = {**WAY, "checkpoint_every": 1, "keep": 2, "adversarial": ANCHOR, "teacher_samples": 64}
    whole = load_product(run(DisBack, tmp_path / "whole", teacher, **more)).parts["generator"]
    with stopped_at(stop):
        run(DisBack, tmp_path / "part", teacher, **more)
    resume(tmp_path / "part", lambda _: DisBack, {}, Silent())
    assert same(state(whole), state(load_product(tmp_path / "part").parts["generator"]))


# ---- laws of time ----


def below(name, t, shift, low, high):
    """P(time < t), by hand: of the law kept within low and high on the linear path, and then shifted."""
    mean, std = {"logit-normal": (0.0, 1.0), "log-normal": (-1.2, 1.2)}[name]
    back, reach = t / (shift - (shift - 1) * t), NormalDist(mean, std)
    p, *ends = (0.0 if u == 0 else 1.0 if u == 1 else reach.cdf(math.log(u / (1 - u))) for u in (back, low, high))
    return (p - ends[0]) / (ends[1] - ends[0])


def asked(recipe, *networks):
    """The times at which they are asked in a step."""
    seen = []
    hooks = [net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1])) for net in networks]
    whole(recipe.losses({}, Turn(batch=3000)))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def shifted(tmp_path_factory, teacher):
    flow = stillroom.load(teacher)
    place = tmp_path_factory.mktemp("shifted") / "flow"
    moved = Flow(flow.denoiser, flow.shape, flow.sampler, flow.steps, 2.0)
    save_product(Product("flow", {"flow": moved}, {"shape": [2], "classes": 2}), place)
    return str(place)


@pytest.mark.parametrize("name", ["logit-normal", "log-normal"])
@pytest.mark.parametrize(("recipe", "calls"), [(DMD, 6), (SiD, 6), (SwiftBrush, 3)], ids=["dmd", "sid", "swiftbrush"])
def test_scores_fake_score_and_heads_are_asked_at_the_law_of_time(tmp_path, shifted, recipe, calls, name):
    """Two scores, the fake score's own loss, and the heads: on real and made samples, and for the student."""
    heads = {} if recipe is SwiftBrush else {"adversarial": ANCHOR, "teacher_samples": 64}
    recipe, _ = made(recipe, tmp_path, shifted, law=name, times=(0.1, 0.9), batch=3000, **heads)
    networks = {id(net): net for net in (recipe.fake.net, recipe.origin.net)}
    if isinstance(recipe, SwiftBrush):                                          # one network, with adapters or without
        networks = {0: recipe.fake.net}
    seen = asked(recipe, *networks.values())
    assert len(seen) == calls
    for t in seen:
        everywhere = bool(t.max() > 0.96)                                       # of swiftbrush, the fake score's own
        for u in (0.3, 0.5, 0.7):
            p = below(name, u, 2.0, *((0.0, 1.0) if everywhere else (0.1, 0.9)))
            assert abs(float((t < u).double().mean()) - p) < 4 * (p * (1 - p) / len(t)) ** 0.5
    assert sum(bool(t.max() > 0.96) for t in seen) == isinstance(recipe, SwiftBrush)


@pytest.mark.parametrize("name", ["logit-normal", "log-normal"])
def test_particles_and_phases_follow_the_law_of_time(tmp_path, shifted, name):
    sds, _ = made(SDS, tmp_path, shifted, law=name, times=(0.1, 0.9))
    phased, _ = made(PhasedDMD, tmp_path, shifted, law=name, times=(0.1, 0.9), student_steps=2)
    t = torch.tensor([0.3, 0.5, 0.7], dtype=F64)
    assert sds.law.cdf(t).tolist() == pytest.approx([below(name, float(u), 2.0, 0.1, 0.9) for u in t], abs=1e-9)
    first, s = phased.phases[0].law, phased.plan[1]
    p, least = ([below(name, float(u), 2.0, 0.1, 0.9) for u in each] for each in (t + 0.2, [s]))
    assert first.cdf(t + 0.2).tolist() == pytest.approx([max(0, (q - least[0]) / (1 - least[0])) for q in p], abs=1e-6)


def test_untold_the_law_is_uniform_and_draws_as_ever(tmp_path, teacher, shifted):
    u = torch.rand(100)
    for place, move in ((teacher, lambda t: t), (shifted, lambda t: 2 * t / ((1 - t) + 2 * t))):
        recipe, _ = made(DMD, tmp_path, place)
        assert torch.equal(recipe.gap_law.quantile(u), move(0.02 + (0.98 - 0.02) * u))


# ---- which of a student's own steps carry the gradient ----


@pytest.mark.parametrize("recipe", [DMD, DecoupledDMD])
@pytest.mark.parametrize(("gradient", "carry"), [("exit", None), ("last", [False, False, True]), ("all", [True] * 3)])
def test_the_gradient_goes_through_the_steps_that_were_asked_for(tmp_path, teacher, recipe, gradient, carry):
    guidance = {"guidance": 2.0} if recipe is DecoupledDMD else {}
    recipe, _ = made(recipe, tmp_path, teacher, student_steps=3, gradient=gradient, **guidance)
    lengths, times, seen = set(), set(), []
    recipe.student.net.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out.requires_grad)))
    for seed in range(12):
        turn = Turn(batch=64)
        turn.generator.manual_seed(seed)
        seen.clear()
        x, _ = recipe.generated({}, turn)
        steps = [through for _, through in seen]
        assert steps == (carry or [False] * (len(steps) - 1) + [True]) and x.requires_grad
        assert [float(t[0]) for t, _ in seen] == pytest.approx(recipe.plan[: len(steps)])
        lengths.add(len(steps))
        times.add(getattr(recipe, "k", len(steps) - 1))                     # at whose time decoupled-dmd looks
    assert lengths == ({1, 2, 3} if gradient == "exit" else {3}) and times == {k - 1 for k in lengths}


@pytest.mark.parametrize("gradient", ["last", "all"])
def test_a_student_that_learns_its_last_or_all_steps_comes_nearer(tmp_path, teacher, data, gradient):
    more = {"student_steps": 2, "gradient": gradient}
    first, later = (far(stillroom.load(run(DMD, tmp_path / f"{steps}", teacher, steps=steps, **more)), data)
                    for steps in (1, 300))
    assert later < 0.7 * first


# ---- weights of the gap ----


@pytest.mark.parametrize("recipe", [DMD, DisBack])
@pytest.mark.parametrize("weight", ["residual", "sigma", "none"])
def test_the_gap_has_the_weight_that_was_asked_for(tmp_path, teacher, recipe, weight):
    recipe, _ = made(recipe, tmp_path, teacher, weight=weight)
    shaken(recipe.fake, "")
    x, y, turn = torch.randn(16, 2, requires_grad=True), torch.arange(16) % 2, Turn()
    (ours,) = torch.autograd.grad(recipe.gap(x, y, Turn(), recipe.teacher).sum(), x)
    t, eps = turn.draw(recipe.gap_law), turn.randn(x)
    x_t = Linear().noise(x, t, eps).detach()
    with torch.no_grad():
        fake, real = recipe.fake.x0(x_t, t, y), recipe.teacher.x0(x_t, t, y)
    w = {"residual": 1 / (x - real).abs().mean(1), "sigma": t * (1 - t), "none": torch.ones(16)}[weight].detach()
    assert torch.allclose(ours, w[:, None] * (fake - real) / 2, atol=1e-5) and ours.abs().max() > 0.01


@pytest.mark.parametrize("weight", ["sigma", "none"])
def test_with_another_weight_a_student_comes_nearer_too(tmp_path, teacher, data, weight):
    first, more = (far(stillroom.load(run(DMD, tmp_path / f"{steps}", teacher, steps=steps, weight=weight)), data)
                   for steps in (1, 300))
    assert more < 0.5 * first


# ---- refusals ----


@pytest.mark.parametrize(("recipe", "more", "says"), [
    (SiD, {"cfg": "zero"}, "give the adversarial term a weight"),
    (SiD, {"cfg": "anti", "fake_guidance": -1.0}, "give the adversarial term a weight"),
    (SiD, {"cfg": "anti", "adversarial": ANCHOR}, "--cfg anti --fake-guidance -1"),
    (SiD, {"fake_guidance": -1.0}, "--cfg anti --fake-guidance -1"),
    (SiD, {"cfg": "zero", "adversarial": ANCHOR, "guidance": 2.0}, "it guides no score"),
    (DisBack, {"fake_lora": 4}, "kept as whole networks"),
    (DisBack, {"steps": 400, "record": 200, "kept": 2}, "none for the teacher itself"),
    (DisBack, {"record": 3}, "weights are kept 4 times"),
    (DisBack, {"target": "teacher", "kept": 2}, "kept: target teacher keeps nothing"),
    (DisBack, {"target": "teacher", "advance": 50}, "advance: target teacher keeps nothing"),
    (DMD, {"teacher_samples": 9}, "teacher_samples: nothing here asks for data"),
    (DMD, {"gradient": "all"}, "give --student-steps above 1"),
    (DMD, {"gradient": "all", "student_steps": 2, "asked": "noised"}, "give --asked simulated"),
    (DMD, {"judge": "fake"}, "judge: there are no heads"), (SiD, {"judge_weight": 0.1}, "there are no heads"),
    (DMD, {"judge_weight": 0.1, "adversarial": ANCHOR}, "give --judge fake"),
    (DecoupledDMD, {"judge": "fake", "guidance": 2.0}, "there is no fake score"),
    (SiD, {"weight": "none"}, "only the release's"), (DecoupledDMD, {"weight": "none"}, "over its own residual"),
    (DMD, {"adversarial": Adversarial(layers=("layers.0",))}, "adversarial: its weight is 0"),
    (DMD, {"adversarial": Adversarial(weight=1.0, r1_std=0.2)}, "adversarial.r1_std 0.2: of a penalty"),
    (DecoupledDMD, {"statistics": 2.0}, "statistics: shield dm has no term of them; give --shield statistics"),
    (DecoupledDMD, {"adversarial": ANCHOR, "shield": "none"}, "adversarial: shield none has no heads"),
    (DMD, {"times": (0.9, 0.1)}, "times 0.9 0.1: the first is not below"),
    (SDS, {"times": (0.9, 0.1), "law": "logit-normal"}, "times 0.9 0.1: the first is not below"),
])
def test_what_cannot_be_is_refused_in_a_line(tmp_path, teacher, recipe, more, says):
    with pytest.raises(Refusal, match=says) as error:
        run(recipe, tmp_path / "run", teacher, **{"steps": 2000, **more})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [{"fake_guidance": 2.0}, {"guidance": 2.0}, {"fake_own_guidance": 2.0},
                                  {"cfg": "zero", "adversarial": ANCHOR}], ids=str)
def test_without_labels_no_score_is_guided(tmp_path, unlabelled, more):
    with pytest.raises(Refusal, match="trained without labels"):
        run(SiD, tmp_path / "run", unlabelled, steps=2, **more)


def test_adapters_need_a_network(tmp_path, teacher):
    with pytest.raises(Refusal, match="no network for adapters; give a flow run"):
        run(SwiftBrush, tmp_path / "run", "ring:2", steps=2, origin=teacher)
    with pytest.raises(Refusal, match="no network for a student to start from"):
        run(SwiftBrush, tmp_path / "run", "ring:2", steps=2)


@pytest.mark.parametrize("name", ["data", "student_steps"])
def test_swiftbrush_says_why_it_has_not_what_its_like_have(name):
    with pytest.raises(Refusal, match=f"'{name}' is not a setting: SwiftBrush .*leave it out"):
        from_mapping(SwiftBrush.Settings, {"out": "x", "teacher": "y", name: "z"}, "settings")
    assert not {"data", "size", "adversarial", "teacher_samples"} & set(SwiftBrush.Settings.__dataclass_fields__)


# ---- teachers whose classes are all there is ----


@pytest.fixture
def classes_alone(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=4)
    shaken(net, "")
    net.save_pretrained(tmp_path / "teacher/unet")
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "teacher/scheduler")
    return str(tmp_path / "teacher")


@pytest.mark.parametrize(("recipe", "more"), [
    (SwiftBrush, {}), (SiD, {}), (DMD, {"adversarial": ANCHOR, "teacher_samples": 8}),
], ids=["swiftbrush", "sid", "dmd"])
def test_a_teacher_without_a_null_class_is_asked_for_classes_alone(tmp_path, classes_alone, recipe, more):
    made_so, given = made(recipe, tmp_path / "run", classes_alone, batch=8, steps=2, **more)
    trainer = Trainer(made_so, given, {}, World(0, 1, torch.device("cpu")), watch=Silent())
    for _ in steps_of(trainer, 2):
        pass


@pytest.mark.parametrize(("recipe", "more"), [
    (SwiftBrush, {"guidance": 2.0}), (DMD, {"guidance": 2.0}), (GuidanceLora, {}), (SiD, {"fake_guidance": 2.0}),
    (SiD, {"cfg": "zero", "adversarial": ANCHOR}), (MSD, {"guidance": 2.0, "students": 2}),
], ids=["swiftbrush", "dmd", "guidance-lora", "sid", "zero", "msd"])
def test_and_refused_guidance_before_anything_is_drawn(tmp_path, classes_alone, recipe, more):
    with pytest.raises(Refusal, match="none stands for no label"):
        made(recipe, tmp_path / "run", classes_alone, batch=8, **more)


def test_a_plan_finds_samples_of_some_spread_where_the_teachers_are_not_drawn_yet(tmp_path, teacher):
    recipe, _ = made(DMD, tmp_path / "run", teacher, adversarial=ANCHOR)
    assert recipe.ends is not None and float(recipe.ends.ends.std()) > 0.5

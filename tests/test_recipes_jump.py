"""BOOT, Hyper-SD, TwinFlow, guidance into LoRA, and the consistency under them: their identities, that they train, and
what they refuse."""

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import stillroom
from closed_forms import F64, draws, gaussian, mixture, plan
from stepping import same, state, steps_of, trainer_of, whole
from stillroom.cli.main import main
from stillroom.data import Tensors
from stillroom.flows import Bare, Denoiser, Denoises, Gaussian, Told, ddim, guided, noise_of, step
from stillroom.nets import MLP, Lora
from stillroom.nets.embed import sinusoidal
from stillroom.paths import VE, Cosine, Linear, Tabulated, expand
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.boot import BOOT, bootstrapped
from stillroom.recipes.consistency import Consistency
from stillroom.recipes.decoupled_dmd import DecoupledDMD
from stillroom.recipes.dmd import DMD
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.guidance_lora import GuidanceLora
from stillroom.recipes.hyper_sd import HyperSD
from stillroom.recipes.msd import MSD
from stillroom.recipes.sid import SiD
from stillroom.recipes.swiftbrush import SwiftBrush
from stillroom.recipes.twinflow import STEP, TwinFlow, residual
from stillroom.settings import Optimizer, Refusal
from stillroom.settings.files import read_json
from stillroom.train import Silent, Turn, load, load_product, resume, start
from stillroom.train.folder import read_rows
from stillroom.train.turn import Noise
from stillroom.train.world import World
from students import PLAIN, POINTS, RATE, clusters, far, moved, points  # noqa: F401

GIVEN = {"batch": 64, "student": RATE, "average": 0.98, **PLAIN}


def flow_run(place, data, **more):
    settings = FlowMatching.Settings(out=place, **{"steps": 600, "batch": 256, "model": RATE, "average": 0.99, **POINTS,
                                                   **PLAIN, **more})
    return str(start(FlowMatching, settings, "flow", {"data": data}, Silent()))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    return flow_run(tmp_path_factory.mktemp("teacher") / "run", data, drop=0.2)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory, data):
    return flow_run(tmp_path_factory.mktemp("unlabelled") / "run", Tensors(data.x, name="alone"), steps=2)


@pytest.fixture(scope="module")
def exploding(tmp_path_factory, data):
    return flow_run(tmp_path_factory.mktemp("exploding") / "run", data, drop=0.2, path="ve", prediction="eps")


def made(recipe, teacher, **more):
    torch.manual_seed(0)
    return recipe(recipe.Settings(out="unused", **{**GIVEN, "teacher": teacher, **more}))


def run(recipe, out, teacher, **more):
    settings = recipe.Settings(out=out, **{**GIVEN, "teacher": teacher, **more})
    return start(recipe, settings, recipe.__name__.lower(), {}, Silent())


def turn_of(recipe, *roles, stage="distil", step=0, batch=None):
    cpu = torch.device("cpu")
    return Turn(step=step, stage=stage, roles=frozenset(roles), batch=batch or recipe.settings.batch, micros=1,
                world=World(0, 1, cpu), noise=Noise(0, step, cpu), micro=0, watched=True)


# ---- consistency: exact on the flow map of a Gaussian ----


def flow_map(g: Gaussian, x, t, s):
    """Where the exact flow carries x from time t to time s: each eigendirection keeps its place in its own spread."""
    now, then = g.path.over(t, x), g.path.over(s, x)
    spread = ((then.alpha**2 * g.values + then.sigma**2) / (now.alpha**2 * g.values + now.sigma**2)).sqrt()
    return then.alpha * g.mean + (((x - now.alpha * g.mean) @ g.vectors) * spread) @ g.vectors.T


class Arrives(Denoises):
    """Answers x0 such that one DDIM step from t to goal(t) ends where the flow does."""

    prediction, classes = "x0", None

    def __init__(self, g: Gaussian, goal):
        super().__init__()
        self.g, self.goal, self.path = g, goal, g.path

    def forward(self, x_t, t, y=None):
        s = self.goal(t)
        now, then = self.path.over(t, x_t), self.path.over(s, x_t)
        ratio = then.sigma / now.sigma
        moved = (flow_map(self.g, x_t, t, s) - ratio * x_t) / (then.alpha - ratio * now.alpha)
        return torch.where(expand(t == s, x_t), x_t, moved)


def jump_loss(recipe, data, stage="distil"):
    turn = turn_of(recipe, "student", stage=stage, batch=256)
    return float(whole(recipe.losses({"data": (data, None)}, turn))["student"]["jump"].mean())


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_the_flow_map_of_a_gaussian_is_consistent(teacher, path, segments):
    """With an exact step of the teacher the loss is zero there, and nowhere near it with x0 in the place of the end."""
    g, n = gaussian(path, dim=2), 16
    edges = torch.tensor(sorted(plan(segments)), dtype=F64)
    recipe = made(HyperSD, teacher, grid=n, segments=(4, 2, 1), data="none")
    recipe.ends, stage = None, f"segments {segments}"
    recipe.teacher = Arrives(g, lambda t: (t * n - 1).round() / n)
    recipe.student = Arrives(g, lambda t: edges[torch.searchsorted(edges, t.double() - 1e-6) - 1].clamp(max=1).to(t))
    recipe.mean.module = recipe.student
    data = g.draw(draws(256, 2))
    assert jump_loss(recipe, data, stage) < 1e-6
    recipe.student = g                                          # the ideal denoiser is no flow map
    assert jump_loss(recipe, data, stage) > 1e-2


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("moved", [1.0, 2.0])
def test_the_flow_map_is_consistent_in_segments_of_any_edges(teacher, path, moved):
    """Some on the grid, some not; the teacher steps down to the edge where that lies within its step."""
    g, n, told = gaussian(path, dim=2), 16, (1.0, 0.6, 0.25, 0.23, 0.0)
    recipe = made(HyperSD, teacher, grid=n, edges=told, data="none")
    recipe.flow.shift = moved
    edges, grid = (recipe.flow.time(torch.tensor(sorted(each), dtype=F64)) for each in (told, plan(n)))

    def below(times):
        return lambda t: times[torch.searchsorted(times, t.double() - 1e-6) - 1].to(t)

    def nearer(t):
        return torch.maximum(below(edges)(t), below(grid)(t))

    recipe.ends, recipe.teacher, recipe.student = None, Arrives(g, nearer), Arrives(g, below(edges))
    recipe.mean.module = recipe.student
    data = g.draw(draws(256, 2))
    assert jump_loss(recipe, data, "segments 4") < 1e-6
    recipe.student = g                                          # the ideal denoiser is no flow map
    assert jump_loss(recipe, data, "segments 4") > 1e-2


def test_a_student_of_uneven_segments_trains_and_draws_along_them(tmp_path, teacher, data):
    edges = (1.0, 0.7, 0.3, 0.0)
    first, later = (stillroom.load(run(HyperSD, tmp_path / f"{steps}", teacher, steps=steps, edges=edges))
                    for steps in (4, 300))
    assert list(later.plans) == [3] and later.plans[3] == pytest.approx(edges) and later.move == "ode"
    assert far(later, data) < 0.7 * far(first, data)


def test_the_teachers_own_steps_are_consistent_to_second_order(teacher):
    """The flow map differs from one DDIM step by its local error: four times less on a grid twice as fine."""
    g = gaussian(Linear(), dim=2)
    data, losses = g.draw(draws(256, 2)), []
    for n in (32, 64, 128):
        recipe = made(Consistency, teacher, grid=n)
        recipe.ends, recipe.teacher, recipe.student = None, g, Arrives(g, torch.zeros_like)
        here, there, _ = recipe.jumped(data, None, turn_of(recipe, batch=256))
        losses.append(float((here - there).square().mean().sqrt()))
    for coarse, fine in pairwise(losses):
        assert 3.3 < coarse / fine < 4.7


# ---- BOOT ----


@pytest.mark.parametrize("path", [Linear(), Cosine(), Tabulated.ddpm(), VE(10.0)], ids=lambda p: type(p).__name__)
def test_the_bootstrap_is_the_ddim_step_in_terms_of_the_signal(path):
    d, n = mixture(path), 12
    z, y = draws(n, 2, seed=7), draws(n, 2, seed=8)
    t = torch.arange(1, n + 1, dtype=F64) / n                   # the last is pure noise
    s = t - 1 / n                                               # the first is data
    now, then = path.over(t, z), path.over(s, z)
    x_t = now.alpha * y + now.sigma * z
    stepped = (step(d, x_t, t, s, None, "ode") - then.sigma * z) / then.alpha
    target, moved = bootstrapped(y, d.x0(x_t, t), now, then)
    assert torch.allclose(target, stepped, atol=1e-6)
    assert (moved > 0).all() and (moved <= 1).all() and moved[0] == 1


def test_boots_loss_is_zero_on_the_teachers_trajectory(teacher):
    g, n = gaussian(Cosine(), dim=2), 8
    recipe = made(BOOT, teacher, grid=n)
    recipe.teacher = g

    def signal(z, asked, y=None):
        """By the teacher's own DDIM steps from t = 1 down to the time that is asked for."""
        out = torch.zeros_like(z, dtype=F64)
        for k in range(n + 1):
            x, mine = z.double(), (asked * n).round() == k
            for i in range(n, k, -1):
                t, s = (torch.full((len(z),), u / n, dtype=F64) for u in (i, i - 1))
                x = step(g, x, t, s, None, "ode")
            c = g.path.over(torch.full((len(z),), k / n, dtype=F64), x)
            # at t = 1 there is no signal in x; what the boundary asks for is what the teacher sees there
            found = g.x0(z.double(), torch.ones(len(z), dtype=F64)) if k == n else (x - c.sigma * z) / c.alpha
            out[mine] = found[mine]
        return out

    recipe.student.signal = signal
    terms = recipe.losses({}, turn_of(recipe, "student"))["student"]
    assert float(terms["bootstrap"].max()) < 1e-6 and float(terms["boundary"].max()) < 1e-9
    recipe.student.signal = lambda z, asked, y=None: g.x0(z.double(), asked.double())
    assert float(recipe.losses({}, turn_of(recipe, "student"))["student"]["bootstrap"].mean()) > 0.1


def test_boot_reads_no_data_and_takes_one_step(tmp_path, teacher):
    assert BOOT.inputs == () and not hasattr(BOOT.Settings, "data")
    student = stillroom.load(run(BOOT, tmp_path / "run", teacher, steps=2))
    assert student.asked == 0.0
    z, y = noise_of((2,), 0, 6, 0), torch.arange(6) % 2
    assert torch.equal(student.sample(6), student.signal(z, torch.zeros(6), y))
    with pytest.raises(Refusal, match="one step, not 8"):
        student.sample(4, steps=8)


@pytest.mark.parametrize("flag", ["--student-steps 8", "--student_steps=8"])
def test_boot_is_asked_for_no_more_than_one_step(capsys, tmp_path, flag):
    asked = ["distill", "boot", "--teacher", "ring:4", "--out", "unused"]
    assert main([*asked, *flag.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--student-steps is not a setting: BOOT makes one step" in said
    (tmp_path / "more.toml").write_text("student_steps = 8")
    assert main([*asked, "--config", str(tmp_path / "more.toml")]) == 2
    assert "'student_steps' is not a setting: BOOT makes one step" in capsys.readouterr().err
    for none in (["--data", "none"], ["--data=none"]):          # is what is so
        assert main([*asked, *none]) == 2
        assert "ring:4: it has no network for a student to start from" in capsys.readouterr().err
    for name in ("endpoint", "sds"):
        assert main(["distill", name, *asked[2:], "--data", "none", "--steps", "0"]) == 2
        assert "steps: 0 must be at least" in capsys.readouterr().err
    assert main([*asked, "--data", "digits"]) == 2
    assert "--data is not a setting: BOOT needs none; leave it out" in capsys.readouterr().err
    assert main([*asked, "--student-stebs", "8"]) == 2          # what no recipe has is answered by the nearest
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "says"), [
    ("twinflow", "TwinFlow serves 1, 2 and 4 steps; leave it out, and ask when drawing: stillroom sample RUN"),
    ("guidance-lora", "what is left is a flow, of as many steps as its teacher; leave it out, and ask when drawing"),
    ("msd", "it is of the students' own recipe; give --options student_steps=4"),
    ("endpoint", "endpoint makes one step"),
])
def test_a_number_of_steps_that_is_no_setting_is_answered_by_what_there_is(capsys, name, says):
    assert main(["distill", name, "--teacher", "ring:4", "--out", "unused", "--student-steps", "4"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--student-steps is not a setting: {says}" in said


def test_what_is_said_of_steps_instead_is_so(teacher):
    assert list(made(TwinFlow, teacher).generator().plans) == [1, 2, 4]
    steps = made(GuidanceLora, teacher).made().steps
    assert steps == stillroom.load(teacher).steps and steps != 8
    assert made(MSD, teacher, students=2, options=("student_steps=4",)).generator().sample(2).isfinite().all()
    with pytest.raises(Refusal, match="takes 4 steps, not 1"):
        made(MSD, teacher, students=2, options=("student_steps=4",)).generator().sample(2, steps=1)


# ---- TwinFlow ----


class Waves(torch.nn.Module):
    """Some smooth function of place and both times, in float64."""

    def __init__(self, seed):
        super().__init__()
        self.a, self.b, self.c = draws(2, 2, seed=seed), draws(2, seed=seed + 10), draws(2, seed=seed + 20)

    def forward(self, x, t, y=None, r=None):
        return (x @ self.a + t[:, None] * self.b + r[:, None] * self.c).sin()


def test_the_residual_is_that_of_the_published_recursion():
    """(t - r)/d F - (1/d) sum of F^ over its jumps - v, far from the diagonal; F - v near it."""
    d, mean, n = (*(Denoiser(Waves(seed), Linear(), "v") for seed in (1, 2)), 40)
    x, v, t = draws(n, 2, seed=1), draws(n, 2, seed=2), draws(n, seed=3).sigmoid()
    r = t * draws(n, seed=4).sigmoid()
    near = torch.arange(n) % 2 == 0
    r[near] = t[near] - 0.5 * STEP
    r[0] = t[0]
    f = d(x, t, r=r)

    def jumps(x, t, r):
        half = (t + r) / 2
        return mean.jump(mean.jump(x, t, half), half, r)

    s = t - STEP
    x_s, half = x - STEP * v, (s + r) / 2
    first = mean(x_s, s, r=half)
    second = mean(x_s - (s - half)[:, None] * first, half, r=r)
    total = (s - half)[:, None] * first + (half - r)[:, None] * second
    published = ((t - r)[:, None] * f - total) / STEP - v
    e = residual(f, v, x, t, r, jumps)
    assert torch.allclose(e[~near], published[~near], atol=1e-9)
    assert torch.allclose(e[near], (f - v)[near], atol=1e-12)


def test_straight_trajectories_leave_no_residual():
    mean = torch.tensor([1.0, -2.0], dtype=F64)
    x, t = draws(50, 2), 0.05 + 0.9 * draws(50, seed=1).sigmoid()
    r = t * draws(50, seed=2).sigmoid()
    v = (x - mean) / t[:, None]                                 # to a single point all times agree
    e = residual(v, v, x, t, r, lambda x, t, r: mean + (r / t)[:, None] * (x - mean))
    assert e.abs().max() < 1e-9


def test_negative_times_are_times_of_their_own():
    t = torch.linspace(0.001, 1, 200)
    told = sinusoidal(torch.cat([t, -t]), 128)
    apart = torch.cdist(told, told) + 1e3 * torch.eye(400)
    assert apart.min() > 0.05
    net = MLP(2, 32, two_times=True)
    torch.nn.init.normal_(net.final.weight)
    x = torch.randn(200, 2)
    assert (net(x, t, r=t) - net(x, -t, r=-t)).norm(dim=1)[20:].min() > 1e-3


def test_the_gap_moves_samples_from_the_negative_times_law_to_the_positive_ones(teacher):
    """From a Gaussian about a to one about b: x = z - F moves along b - a, as DMD would move it."""
    recipe = made(TwinFlow, teacher)
    a, b, cov = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0]), 0.25 * torch.eye(2)
    fake, real = Gaussian(a, cov), Gaussian(b, cov)

    class Twins(torch.nn.Module):
        path = Linear()

        def forward(self, x, t, y=None, r=None):
            return torch.where(expand(t < 0, x), fake.v(x, t.abs()), real.v(x, t.abs()))

    recipe.student = Twins()
    z = torch.randn(64, 2)
    f = (z - fake.draw(torch.randn(64, 2))).requires_grad_()
    recipe.moved(z, f, None, turn_of(recipe, "student")).sum().backward()
    toward = f.grad @ (b - a)                                   # x = z - f: down in f is up in x
    assert (toward > 0).all()


def test_the_parts_of_a_batch_do_their_own_thing(teacher):
    recipe = made(TwinFlow, teacher)
    t, r = recipe.pairs(48, turn_of(recipe, "student"))
    assert (t[::3] == 1).all() and (r[::3] == 0).all()
    assert (r[1::3] >= 0.95 * t[1::3] - 1e-6).all() and (r <= t).all() and (r[2::3] < 0.9 * t[2::3]).any()
    terms = recipe.losses({}, turn_of(recipe, "student", step=150))["student"]
    assert {k: len(v) for k, v in terms.items()} == {"base": 48, "twin": 16, "gap": 16}
    assert "gap" not in recipe.losses({}, turn_of(recipe, "student", step=149))["student"]
    assert set(made(TwinFlow, teacher, twin=0.0).losses({}, turn_of(recipe, "student"))["student"]) == {"base"}


@pytest.mark.parametrize(("steps", "wait"), [(2000, 150), (300, 150), (150, 75), (3, 1), (1, 0)])
def test_the_twin_pushes_before_the_run_is_over(teacher, steps, wait):
    recipe = made(TwinFlow, teacher, steps=steps)
    pushes = [k for k in range(steps) if k in (wait - 1, wait) and "gap" in
              recipe.losses({}, turn_of(recipe, "student", step=k))["student"]]
    assert pushes == [wait]


def test_micro_batches_part_a_batch_as_one_does(tmp_path, teacher):
    one, two = (state(load(run(TwinFlow, tmp_path / str(k), teacher, steps=4, wait=1, accumulate=k))) for k in (1, 2))
    assert all(torch.allclose(one[k], v, atol=1e-6) for k, v in two.items())
    with pytest.raises(Refusal, match="give a multiple of 8"):
        made(TwinFlow, teacher, batch=12, accumulate=2)


def test_after_the_first_step_twinflow_holds_no_teacher(tmp_path, teacher):
    recipe = made(TwinFlow, teacher, steps=3)
    trainer, own = trainer_of(recipe, recipe.settings), sum(p.numel() for p in recipe.student.parameters())
    x, t, y = torch.randn(5, 2), torch.rand(5), torch.arange(5) % 2
    assert torch.allclose(recipe.student(x, t, y, t / 3), recipe.origin(x, t, y), atol=1e-6)      # as the teacher
    for k in steps_of(trainer, 3):
        held = {id(p): p.numel() for thing in vars(recipe).values() if isinstance(thing, torch.nn.Module)
                for p in thing.parameters()}
        if k:
            assert sum(held.values()) == 2 * own and recipe.ends.flow is None
    again = load_product(run(TwinFlow, tmp_path / "run", teacher, steps=3)).parts["generator"]
    assert again.sample(4, steps=4).isfinite().all() and list(again.plans) == [1, 2, 4]


def test_consistency_refuses_what_nothing_holds_to_x(tmp_path, data):
    """A network that answers x0 has no skip: at t = 0 it says anything. Short jumps at first are the teacher's own."""
    settings = FlowMatching.Settings(out=tmp_path / "flow", steps=1, batch=16, prediction="x0", **POINTS, **PLAIN)
    teacher = str(start(FlowMatching, settings, "flow", {"data": data}, Silent()))
    for recipe, more in ((Consistency, {}), (HyperSD, {"segments": (1,)})):
        with pytest.raises(Refusal, match="it answers x0, which nothing holds to x at t = 0"):
            made(recipe, teacher, **more)
    made(HyperSD, teacher, segments=(4, 1))


def test_guided_velocities_go_on_from_the_answer_without_the_label(teacher):
    recipe = made(TwinFlow, teacher, guidance=3.0)
    mean, x, t = recipe.mean.module, torch.randn(6, 2), torch.rand(6)
    y, v = torch.arange(6) % 2, torch.randn(6, 2)
    null = torch.full((6,), 2)
    expected = v + (2 / 3) * (mean(x, t, y, t) - mean(x, t, null, t))
    assert torch.allclose(recipe.guided(v, x, t, y), expected, atol=1e-6)
    answered, free = mean(x, t, y, t), mean(x, t, null, t)
    assert torch.allclose(recipe.guided(free + (answered - free) / 3, x, t, y), answered, atol=1e-6)    # it stays there
    left = recipe.dropped(torch.zeros(400, dtype=torch.long), recipe.settings.drop, turn_of(recipe, batch=400))
    assert 1 < (left == 2).sum() < 100


# ---- guidance into LoRA ----


@pytest.mark.parametrize("strongest", [0.0, 5.0])
def test_the_target_is_the_guided_answer_in_the_students_own_prediction(teacher, strongest):
    recipe = made(GuidanceLora, teacher, guidance=2.5, strongest=strongest)
    x, t, y = torch.randn(7, 2), torch.rand(7), torch.arange(7) % 2
    told = recipe.strengths(t, turn_of(recipe, batch=7))
    assert (told >= 1).all() and (told <= 5).all() if strongest else (told == 2.5).all()
    flow = stillroom.load(teacher).denoiser
    for w, row in zip(told.tolist(), recipe.target(x, t, y, told), strict=True):
        k = int((told == w).nonzero()[0])
        assert torch.allclose(guided(flow, w).v(x, t, y)[k], recipe.target(x, t, y, told)[k], atol=1e-5), row


def test_adapters_and_teacher_stand_on_one_set_of_weights(teacher):
    recipe = made(GuidanceLora, teacher, steps=4)
    assert isinstance(recipe.flow.denoiser, Bare) and recipe.flow.denoiser.denoiser is recipe.student
    held = {id(p): p.numel() for thing in (recipe.flow, recipe.origin, recipe.student) for n, p in
            thing.named_parameters() if "lora_" not in n}
    assert sum(held.values()) == sum(p.numel() for p in stillroom.load(teacher).parameters())
    trainer = trainer_of(recipe, recipe.settings)
    before = state(recipe.student)
    for _ in steps_of(trainer, 4):
        pass
    after = state(recipe.student)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all("lora_" in k for k in moved)
    x, t, y = torch.randn(4, 2), torch.rand(4), torch.arange(4) % 2
    assert torch.allclose(recipe.flow.denoiser.v(x, t, y), stillroom.load(teacher).denoiser.v(x, t, y), atol=1e-6)


def test_guidance_learned_is_nearer_to_the_guided_teacher_and_half_as_dear(tmp_path, teacher):
    flow, w = stillroom.load(teacher), 4.0
    rate = Optimizer(lr=5e-3, clip=1.0, warmup=10, decay="cosine")
    place = run(GuidanceLora, tmp_path / "run", teacher, guidance=w, steps=300, student=rate)
    student, product = stillroom.load(place), load_product(place)
    target = flow.sample(300, guidance=w)
    apart, unguided = (float((x - target).norm(dim=1).mean()) for x in (student.sample(300), flow.sample(300)))
    assert apart < 0.35 * unguided
    assert product.kind == "flow" and product.base and "lora_" in " ".join(student.state_dict())
    asked = []
    for each in (student, flow):
        net = each.denoiser.net
        hook = net.register_forward_hook(lambda _m, inputs, _o: asked[-1].append(len(inputs[0])))
        asked.append([])
        each.sample(8, guidance=1.0 if each is student else w)
        hook.remove()
    assert 2 * sum(asked[0]) == sum(asked[1])


def test_a_teacher_that_is_told_its_strength_has_no_second_answer(tmp_path, teacher):
    told = str(run(GuidanceLora, tmp_path / "told", teacher, strongest=3.0, lora=0, steps=1))
    for recipe, more in ((SwiftBrush, {"guidance": 2.0}), (DecoupledDMD, {"guidance": 2.0}),
                         (SiD, {"fake_guidance": 2.0})):
        with pytest.raises(Refusal, match="give the flow that it was distilled from"):
            made(recipe, told, **more)
    with_adapters = made(DMD, told, guidance=2.0, fake_lora=2)
    assert isinstance(with_adapters.teacher, Told) and isinstance(made(DMD, told, guidance=2.0).teacher, Told)
    x, t, y = torch.randn(4, 2), torch.rand(4), torch.arange(4) % 2
    assert torch.equal(with_adapters.teacher.v(x, t, y), Told(stillroom.load(told).denoiser, 2.0).v(x, t, y))


def test_a_strength_that_is_told_is_asked_for_when_drawing(tmp_path, teacher):
    flow = stillroom.load(teacher)
    rate = Optimizer(lr=5e-3, clip=1.0, warmup=10, decay="cosine")
    student = stillroom.load(run(GuidanceLora, tmp_path / "run", teacher, strongest=5.0, steps=300, student=rate))
    for w in (2.0, 4.0):
        target = flow.sample(300, guidance=w)
        apart, unguided = (float((x - target).norm(dim=1).mean())
                           for x in (student.sample(300, guidance=w), flow.sample(300)))
        assert apart < 0.7 * unguided
    assert isinstance(guided(student.denoiser, 3.0), Told)
    x, t, y = torch.randn(3, 2), torch.rand(3), torch.arange(3) % 2
    assert torch.allclose(Told(student.denoiser, 1.0)(x, t, y), student.denoiser(x, t, y), atol=1e-6)


@pytest.mark.parametrize(("recipe", "more", "share"), [
    (Consistency, {}, 0.2), (HyperSD, {}, 0.5), (DMD, {"law": "log-normal"}, 0.5),
    (DMD, {"law": "log-normal", "student_steps": 4}, 0.7),
], ids=["consistency", "hyper-sd", "dmd", "dmd of 4"])
def test_students_of_a_variance_exploding_teacher_come_nearer(tmp_path, exploding, data, recipe, more, share):
    """Beside four steps, of stages one each. In equal steps of time all but the last would see nothing but noise."""
    first, later = (far(stillroom.load(run(recipe, tmp_path / f"{steps}", exploding, steps=steps, **more)), data)
                    for steps in (4, 300))
    assert later < share * first


# ---- Hyper-SD ----


@pytest.mark.parametrize("n", [8, 24, 56, 1000])
def test_jumps_end_at_the_lower_edge_whatever_rounding_does(teacher, n):
    recipe = made(HyperSD, teacher, grid=n)
    for stage in recipe.plans:
        k, i = int(stage.split()[1]), torch.arange(n)
        expected = torch.tensor(plan(k)).flip(0)[i * k // n]
        assert torch.equal(recipe.goal((i + 1) / n, turn_of(recipe, stage=stage)), expected)


def test_a_network_that_is_told_keeps_up_all_segments_so_far(teacher):
    recipe = made(HyperSD, teacher, told=True)
    whole = torch.full((3000,), 1.0)
    for k, stage in enumerate(recipe.plans):
        goals, counts = recipe.goal(whole, turn_of(recipe, stage=stage, batch=3000)).unique(return_counts=True)
        assert goals.tolist() == sorted(plan(n)[1] for n in (8, 4, 2, 1)[: k + 1])      # its first step, of each plan
        assert (counts / 3000 - 1 / (k + 1)).abs().max() < 0.05


def test_segments_are_drawn_along_and_what_answers_x0_is_noised_anew(teacher):
    assert made(HyperSD, teacher).generator().move == "renoise"
    assert made(HyperSD, teacher, segments=(8, 4)).generator().move == "ode"
    told = made(HyperSD, teacher, told=True).generator()
    assert told.move == "jump" and list(told.plans) == [1, 8, 4, 2]
    # told of an end that changes nothing yet, it makes the teacher's own DDIM steps
    flow = stillroom.load(teacher)
    z, y = noise_of((2,), 0, 9, 0), torch.arange(9) % 2
    exact = ddim(flow.denoiser, z, torch.tensor(plan(4), dtype=F64), y)
    assert torch.allclose(told.sample(9, steps=4), exact, atol=1e-5)


def test_stages_part_the_steps_and_begin_anew(teacher):
    recipe = made(HyperSD, teacher, steps=11, score_weight=1.0, adversarial=Adversarial(weight=0.1))
    stages = recipe.stages()
    assert [(s.name, s.steps) for s in stages] == [("segments 8", 2), ("segments 4", 2), ("segments 2", 2),
                                                   ("segments 1", 5)]
    assert all(s.fresh == ("student",) for s in stages)
    assert [("fake" in s.roles, "head" in s.roles) for s in stages] == [(False, True)] * 3 + [(True, True)]
    trainer, seen = trainer_of(recipe, recipe.settings), []
    for _ in steps_of(trainer, 4):
        seen.append((trainer.learners["student"].updates, same(state(recipe.student), state(recipe.mean.module))))
    # the average begins where the student is, the weights go on
    assert seen == [(0, True), (1, False), (0, True), (1, False)]


def test_the_target_is_the_average(teacher):
    recipe = made(HyperSD, teacher)
    recipe.mean.module = copy.deepcopy(recipe.student)
    here, there, _ = recipe.jumped(*recipe.given({}, turn_of(recipe)), turn_of(recipe, stage="segments 1"))
    with torch.no_grad():
        for p in recipe.student.parameters():
            p.add_(0.1)
    moved, as_before, _ = recipe.jumped(*recipe.given({}, turn_of(recipe)), turn_of(recipe, stage="segments 1"))
    assert torch.equal(there, as_before) and not torch.allclose(here, moved, atol=1e-3)


def test_only_jumps_that_end_in_data_are_judged(teacher):
    recipe = made(HyperSD, teacher, adversarial=Adversarial(weight=0.5, r1=1.0))
    for stage, share in (("segments 8", 1 / 8), ("segments 2", 1 / 2), ("segments 1", 1.0)):
        losses = whole(recipe.losses({}, turn_of(recipe, "student", "head", stage=stage, batch=2000)))
        for term in (*losses["head"].values(), losses["student"]["adversarial"]):
            assert abs(float((term != 0).float().mean()) - share) < 0.05


REWARDS = """
import torch
def near(x, y):
    return -(x - torch.tensor([1.5, 1.0])).square().sum(1)
def hard(x, y):
    return (x > 0).float().sum(1)
def few(x, y):
    return x.sum()
def fails(x, y):
    return x.nothing()
number = 3
"""


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path / "rewards.py"


def test_a_reward_is_climbed_through_the_last_step(tmp_path, teacher, rewards):
    gained = []
    for k, more in enumerate([{}, {"reward": f"{rewards}:near", "reward_weight": 0.3}]):
        x = stillroom.load(run(HyperSD, tmp_path / f"{k}", teacher, steps=120, segments=(2, 1), **more)).sample(300)
        gained.append(float(-(x - torch.tensor([1.5, 1.0])).square().sum(1).mean()))
    assert gained[1] > gained[0] + 0.3


def test_the_gradient_of_a_reward_is_that_of_the_last_step_alone(teacher, rewards):
    recipe = made(HyperSD, teacher, reward=f"{rewards}:near")
    y, turn = torch.arange(64) % 2, turn_of(recipe, "student", stage="segments 2")
    calls = []
    hook = recipe.student.net.register_forward_hook(lambda _m, _i, o: calls.append(o.requires_grad))
    recipe.drawn(y, turn)
    hook.remove()
    assert calls == [False, True]


@pytest.mark.parametrize(("spec", "says"), [
    ("nowhere.py:near", "no such file"), ("{}:absent", "no function 'absent'"), ("{}:number", "no function 'number'"),
    ("{}:hard", "must be differentiable"), ("{}:few", "one number for each"), ("{}:fails", "fails on two samples"),
    ("{}", "FILE.py:FUNCTION"),
])
def test_rewards_that_give_nothing_are_refused(teacher, rewards, spec, says):
    with pytest.raises(Refusal, match=says) as error:
        made(HyperSD, teacher, reward=spec.format(rewards))
    assert "\n" not in str(error.value)


def test_a_reward_that_cannot_be_imported_is_refused(tmp_path, teacher):
    for text, says in (("import nothing_of_the_kind", "No module named"), ("def f(:", "SyntaxError")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(Refusal, match=f"cannot be imported.*{says}"):
            made(HyperSD, teacher, reward=f"{tmp_path / 'bad.py'}:f")


@pytest.mark.parametrize("more", [
    {"lora": 4}, {"adversarial": Adversarial(weight=0.1)}, {"score_weight": 1.0}, {"guidance": 2.0}, {"told": True},
    {"told": True, "score_weight": 0.5, "adversarial": Adversarial(weight=0.1), "lora": 4},
], ids=lambda m: "-".join(m))
def test_every_option_of_hyper_sd_trains(tmp_path, teacher, more):
    place = run(HyperSD, tmp_path / "run", teacher, steps=40, **more)
    student, terms = stillroom.load(place), read_rows(place / "metrics.jsonl")[-1]
    assert moved(place, teacher) and all(x for name, x in terms.items() if name.startswith("student/"))
    assert list(student.plans) == [1, 8, 4, 2]                              # one network serves all of them
    assert all(student.sample(8, steps=k).isfinite().all() for k in (8, 4, 2, 1))
    assert ("student/gap" in terms) == ("score_weight" in more) == ("fake/dsm" in terms)
    assert ("student/adversarial" in terms) == ("adversarial" in more)
    if "lora" in more:
        assert load_product(place).base and isinstance(student.denoisers[0].net, Lora)


# ---- the card ----


@pytest.mark.parametrize(("recipe", "more", "told", "asked"), [
    (FlowMatching, None, "18 steps of heun unless told otherwise, times shifted by 1", {"steps": 18}),
    (BOOT, {}, "one step, asked at time 0", {}),
    (Consistency, {"student_steps": 2}, "2 steps, at times 1, 0.5\n- 1 step, at times 1\n", {"steps": 2}),
    (TwinFlow, {}, "4 steps, at times 1, 0.75, 0.5, 0.25", {"steps": 1}),
    (MSD, {"students": 2, "options": ("student_steps=2",)}, "2 steps, at times 1, 0.5", {"steps": 2}),
    (GuidanceLora, {"guidance": 2.0}, "guidance: 2, in the weights\n- adapters on: ", {"steps": 18}),
    (GuidanceLora, {"strongest": 4.0}, "guidance: 3\n", {"guidance": 3.0}),
], ids=lambda p: p.__name__ if isinstance(p, type) else "")
def test_the_card_of_a_product_runs_as_it_stands(tmp_path, monkeypatch, teacher, recipe, more, told, asked):
    place = teacher if more is None else run(recipe, tmp_path / "run", teacher, steps=1, **more)
    model, text = stillroom.load(place), (Path(place) / "product/README.md").read_text()
    name = read_json(Path(place) / "run.json")["recipe"]
    assert told in text and f"- recipe: {name}\n- makes: [2], of 2 classes\n" in text and "diffusers" not in text
    monkeypatch.chdir(Path(place) / "product")
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], found)
    assert torch.equal(found["x"], model.sample(4, seed=0, **asked))


# ---- all of them ----


@pytest.mark.parametrize(("recipe", "more"), [
    (BOOT, {"grid": 16}), (HyperSD, {}), (HyperSD, {"lora": 8, "student": Optimizer(lr=1e-2, clip=1.0)}),
    (TwinFlow, {"wait": 50}), (TwinFlow, {"twin": 0.0}),
], ids=lambda p: p.__name__ if isinstance(p, type) else "-".join(p))
def test_a_student_comes_nearer_than_its_teachers_one_step(tmp_path, teacher, data, recipe, more):
    one = {name: value for name, value in more.items() if name != "wait"}
    first = far(stillroom.load(run(recipe, tmp_path / "none", teacher, steps=4, **one)), data)
    student = stillroom.load(run(recipe, tmp_path / "run", teacher, steps=300, **more))
    assert far(student, data) < 0.5 * first
    product = load_product(tmp_path / "run")
    assert product.kind == "generator" and product.card["shape"] == [2] and product.card["classes"] == 2


@pytest.mark.parametrize("recipe", [HyperSD, TwinFlow, BOOT, GuidanceLora])
def test_a_resumed_run_ends_the_same(tmp_path, teacher, recipe):
    more = {GuidanceLora: {"guidance": 2.0}, TwinFlow: {"guidance": 2.0, "wait": 8}}.get(recipe, {})
    whole = run(recipe, tmp_path / "whole", teacher, steps=12, checkpoint_every=5, **more)
    part = run(recipe, tmp_path / "part", teacher, steps=12, checkpoint_every=5, **more)
    for path in (part / "checkpoints").glob("*12*"):
        path.rename(part / "gone")
    (part / "product").rename(part / "old")
    resume(part, lambda _: recipe, {}, Silent())
    a, b = (stillroom.load(place).state_dict() for place in (whole, part))
    assert same(a, b)


@pytest.mark.parametrize(("recipe", "more", "says"), [
    (HyperSD, {"segments": (2, 4)}, "falling numbers"), (HyperSD, {"segments": ()}, "falling numbers"),
    (HyperSD, {"edges": (1.0, 0.2, 0.6, 0.0)}, "falling times from 1 to 0"),
    (HyperSD, {"edges": (0.9, 0.2, 0.0)}, "edges 0.9, 0.2, 0: give falling times from 1 to 0"),
    (HyperSD, {"edges": (1.0, 0.5, 0.0), "segments": (4, 2)}, "give one of them"),
    (HyperSD, {"edges": (1.0, 0.5, 0.0), "student_steps": 4}, "student-steps 4: with segments 2"),
    (HyperSD, {"grid": 30}, "grid 30: 8 segments do not divide it"),
    (HyperSD, {"student_steps": 3}, "student-steps 3: with segments 8, 4, 2, 1"),
    (HyperSD, {"segments": (8, 4), "score_weight": 1.0}, "of the stage of one segment"),
    (GuidanceLora, {"guidance": 1.0}, "give a guidance above 1"), (GuidanceLora, {"guidance": 0.0}, "above 1"),
    (GuidanceLora, {"guidance": 4.0, "strongest": 2.0}, "below the guidance 4"),
    (TwinFlow, {"batch": 3}, "every fourth sample"),
    (TwinFlow, {"guidance": 0.0}, "comes to rest above 0.5"), (TwinFlow, {"guidance": 0.5}, "give 1 or more"),
    (TwinFlow, {"twin": 0.0, "wait": 5}, "wait: without a twin nothing waits"),
    (TwinFlow, {"drop": 0.2}, "drop: guidance 1 asks for no answers without labels"),
    (HyperSD, {"reward_weight": 1.0}, "reward_weight: there is no reward; give --reward FILE.py:FUNCTION"),
    (HyperSD, {"score": RATE}, "score: there is no fake score; give --score-weight above 0"),
], ids=lambda p: p.__name__ if isinstance(p, type) else "-".join(p) if isinstance(p, dict) else "")
def test_what_cannot_be_is_refused_in_a_line(teacher, recipe, more, says):
    with pytest.raises(Refusal, match=says) as error:
        made(recipe, teacher, **more)
    assert "\n" not in str(error.value)


def test_teachers_that_will_not_do_are_refused(tmp_path, teacher, unlabelled, data):
    with pytest.raises(Refusal, match="no guidance to distil"):
        made(GuidanceLora, unlabelled)
    with pytest.raises(Refusal, match="answers v on a Cosine path"):
        made(TwinFlow, flow_run(tmp_path / "cosine", data, path="cosine", steps=2))
    with pytest.raises(Refusal, match="answers x0 on a Linear path"):
        made(TwinFlow, flow_run(tmp_path / "x0", data, prediction="x0", steps=2))
    with pytest.raises(Refusal, match="it answers eps, which says nothing of data in pure noise"):
        made(TwinFlow, flow_run(tmp_path / "eps", data, prediction="eps", steps=2))
    adapted = str(run(GuidanceLora, tmp_path / "adapted", teacher, guidance=2.0, steps=1))
    with pytest.raises(Refusal, match="no input for a second time, which twinflow needs"):
        made(TwinFlow, adapted)
    with pytest.raises(Refusal, match="no input for a second time"):
        made(HyperSD, adapted, told=True)
    with pytest.raises(Refusal, match="BOOT tells it other times"):
        made(BOOT, flow_run(tmp_path / "ve", data, path="ve", prediction="eps", steps=2))

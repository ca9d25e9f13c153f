"""Decoupled DMD and Phased DMD: their identities, how far off targets are, who moves when, and that they train."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import stillroom
from closed_forms import F64, draws, mixture
from stepping import same, state, steps_of, trainer_of
from stillroom.data import Tensors
from stillroom.flows import Mixture, OneStep
from stillroom.match import augmentation, direction, mean_and_variance, statistics_kl
from stillroom.paths import Coefficients, Cosine, Linear, Path, between, naive_target, sign_of, subinterval_target
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes.decoupled_dmd import DecoupledDMD
from stillroom.recipes.dmd import DMD
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.phased_dmd import PhasedDMD
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Silent, Turn, load_product, resume, start
from stillroom.train.turn import Noise
from stillroom.train.world import World
from students import PLAIN, POINTS, RATE, far, points  # noqa: F401

KINDS = ["x0", "eps", "v", "angular"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("teacher") / "run"
    settings = FlowMatching.Settings(out=out, steps=600, batch=256, model=RATE, average=0.99, drop=0.2, **POINTS,
                                     **PLAIN)
    return str(start(FlowMatching, settings, "flow", {"data": data}, Silent()))


def settings_of(recipe, teacher, out="unused", **more):
    tracked = more.get("shield", "dm") == "dm"
    rates = {"student": RATE, **({"score": Optimizer(lr=1e-3, clip=1.0)} if tracked else {})}
    return recipe.Settings(out=out, teacher=teacher, **{"batch": 64, "average": 0.98, **rates, **PLAIN, **more})


def run(recipe, out, teacher, **more):
    return start(recipe, settings_of(recipe, teacher, out, **more), recipe.__name__.lower(), None, Silent())


def turn_of(recipe, *roles, stage="distil", step=0):
    cpu = torch.device("cpu")
    return Turn(step=step, stage=stage, roles=frozenset(roles), batch=recipe.settings.batch, micros=1,
                world=World(0, 1, cpu), noise=Noise(0, step, cpu), micro=0, watched=True)


def shaken(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))


# ---- guidance's gap is two ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "near"), [(F64, 1e-13), (torch.float32, 1e-6)])
def test_the_guided_gap_is_matching_and_augmentation(kind, dtype, near):
    u, fake, conditional, unconditional = (draws(7, 2, 3, 3, seed=i).to(dtype) for i in range(4))
    guided, sign = unconditional + 4.0 * (conditional - unconditional), sign_of(kind)
    whole = direction(u, fake, guided, sign) * (u - guided).abs().mean((1, 2, 3), keepdim=True)
    parts = direction(u, fake, conditional, sign) + augmentation(u, conditional, unconditional, sign, 4.0)
    parts = parts * (u - conditional).abs().mean((1, 2, 3), keepdim=True)
    assert (parts - whole).abs().max() < near * whole.abs().max()


def test_so_it_is_in_the_recipes(teacher):
    """With one time and one noise for both terms, and each over its own residual."""
    class Still(Turn):
        def randn(self, like, shared=False):
            return draws(*(like.shape if isinstance(like, torch.Tensor) else like), seed=3).float()

        def draw(self, law, count=None):
            return torch.full((self.batch,), 0.6)

    gradients, residuals = [], []
    for recipe in (DMD, DecoupledDMD):
        torch.manual_seed(0)
        made = recipe(settings_of(recipe, teacher, guidance=4.0))
        shaken(made.fake)
        turn = turn_of(made, "student")
        turn.__class__ = Still
        x, y = draws(64, 2, seed=5).float().requires_grad_(), made.labels(turn)
        (gradient,) = torch.autograd.grad(sum(term.sum() for term in made.followed(x, y, turn).values()), x)
        against = made.teacher if recipe is DMD else made.flow.denoiser
        x_t, t = 0.4 * x + 0.6 * turn.randn(x), torch.full((64,), 0.6)
        residuals.append((x - against.x0(x_t, t, y)).abs().mean(1, keepdim=True).detach())
        gradients.append(gradient)
    coupled, decoupled = (g * r for g, r in zip(gradients, residuals, strict=True))
    assert (coupled - decoupled).abs().max() < 1e-5 * coupled.abs().max()


def test_augmentation_looks_below_the_students_time_and_matching_everywhere(teacher):
    made = DecoupledDMD(settings_of(DecoupledDMD, teacher, student_steps=4, guidance=2.0, batch=256))
    guided, plain, seen = made.teacher.split, made.flow.denoiser.predict, {"below": [], "all": []}
    made.teacher.split = lambda x, t, y: seen["below"].append((made.k, t)) or guided(x, t, y)
    made.flow.denoiser.predict = lambda kind, x, t, y: seen["all"].append((made.k, t)) or plain(kind, x, t, y)
    for k in range(40):
        list(made.losses({}, turn_of(made, "student", "fake", step=k)))
    assert {made.plan[k] for k, _ in seen["below"]} == {1.0, 0.75, 0.5, 0.25}
    for k, t in seen["below"]:
        asked = made.plan[k]
        assert t.min() >= 0.02 and t.max() <= min(asked, 0.98) and t.max() > 0.9 * min(asked, 0.98)
    for (_, below), (_, t) in zip(seen["below"], seen["all"], strict=True):
        assert t.max() > 0.9 and t.min() < 0.1 and not torch.equal(t, below)


# ---- the other shields ----


def test_the_divergence_of_statistics_is_that_of_two_normals():
    x = (3 * draws(6, 2, 5, 5) + 1).requires_grad_()
    m, s2 = mean_and_variance(x)
    assert torch.allclose(m, x.flatten(1).mean(1)) and torch.allclose(s2, x.flatten(1).var(1, correction=0))
    mean, variance = torch.tensor(0.3, dtype=F64), torch.tensor(2.0, dtype=F64)
    theirs = kl_divergence(Normal(m, s2.sqrt()), Normal(mean, variance.sqrt()))
    assert torch.allclose(statistics_kl(x, mean, variance), theirs, rtol=1e-12)
    (slope,) = torch.autograd.grad(statistics_kl(x, mean, variance).sum(), x)
    n, (m, s2) = 50, (part[:, None, None, None] for part in (m, s2))
    assert torch.allclose(slope, ((x - mean) / variance - (x - m) / s2) / n, rtol=1e-10)
    own = statistics_kl(x, *mean_and_variance(x))
    assert own.abs().max() < 1e-12


@pytest.mark.parametrize(("shield", "learn", "terms"), [
    ("dm", {"student", "fake"}, {"augmentation", "matching"}),
    ("statistics", {"student"}, {"augmentation", "statistics"}),
    ("adversarial", {"student", "head"}, {"augmentation", "adversarial"}),
    ("none", {"student"}, {"augmentation"}),
])
def test_each_shield_holds_what_it_needs(teacher, shield, learn, terms):
    drawn = {"teacher_samples": 100} if shield in ("statistics", "adversarial") else {}
    made = DecoupledDMD(settings_of(DecoupledDMD, teacher, shield=shield, **drawn))
    if made.ends:
        made.ends.follow()
    losses = {role: terms for part in made.losses({}, turn_of(made, *learn)) for role, terms in part.items()}
    assert set(made.roles()) == set(losses) == learn and set(losses["student"]) == terms
    assert (made.fake is made.origin) == (shield != "dm")
    assert (made.ends is not None) == bool(drawn)


def test_statistics_are_of_a_whole_batch(teacher, tmp_path):
    with pytest.raises(Refusal, match="couples the samples of a batch: set accumulate = 1"):
        run(DecoupledDMD, tmp_path / "run", teacher, shield="statistics", teacher_samples=100, steps=2, accumulate=2)


def test_augmentation_alone_spreads_the_samples_and_a_shield_holds_them(tmp_path, teacher, data):
    spread = {}
    for shield in ("none", "dm", "statistics", "adversarial"):
        steps = 150 if shield in ("none", "statistics") else 300        # 150 updates of each student
        out = run(DecoupledDMD, tmp_path / shield, teacher, shield=shield, steps=steps, guidance=4.0,
                  student=Optimizer(lr=2e-3, clip=1.0),
                  **({"teacher_samples": 500} if shield in ("statistics", "adversarial") else {}))
        spread[shield] = float(stillroom.load(out).sample(600).var(0).mean())
    truth = float(data.x.var(0).mean())
    assert spread["none"] > 5 * truth
    assert all(spread[shield] < 3 * truth for shield in ("dm", "statistics", "adversarial")), spread


# ---- targets of a subinterval ----


class Fixed(Path):
    """x_t = a x_s + b eps at whatever time: the step s -> t, seen as a path."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def at(self, t):
        zero = torch.zeros_like(t)
        return Coefficients(self.a + zero, self.b + zero, zero, zero)


def expected(law: Mixture, x_t, s: Coefficients, t: Coefficients):
    """E[x_s | x_t] and E[eps | x_t], exactly: x_s is a mixture too."""
    a, b = between(s, t)
    stds = (s.alpha**2 * law.stds**2 + s.sigma**2).sqrt()
    then = Mixture(s.alpha * law.means, stds, law.weights, law.labels, Fixed(a, b))
    x_s = then.x0(x_t, torch.zeros(len(x_t), dtype=F64))
    return x_s, (x_t - a * x_s) / b


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.3, 0.35), (0.3, 0.6), (0.6, 0.95)])
def test_the_subinterval_target_is_unbiased(path, kind, s, t):
    law, x_t = mixture(path), 2 * draws(50, 2)
    at_s, at_t = (path.at(torch.tensor(u, dtype=F64)) for u in (s, t))
    (x_s, eps), (_, b) = expected(law, x_t, at_s, at_t), between(at_s, at_t)
    ideal = law.predict(kind, x_t, torch.full((50,), t, dtype=F64))
    # the target is linear in x_s and eps: its mean given x_t is that of their means
    assert torch.allclose(subinterval_target(kind, x_s, eps, at_s, at_t), b * ideal, rtol=1e-9, atol=1e-9)
    naive = naive_target(kind, x_s, eps, at_s, at_t)
    if s == 0:
        assert torch.allclose(naive, b * ideal, rtol=1e-9, atol=1e-9)
    else:
        assert (naive - b * ideal).square().mean() > 1e-6 * (b * ideal).square().mean()


def test_how_far_off_the_naive_target_is():
    """On the grid of 25 modes, for x_s at 0.625: the root of the mean square, over that of the velocity."""
    law, path = Mixture.grid(5, std=0.05), Linear()
    law = Mixture(law.means.double(), law.stds.double(), path=path)
    at_s, at_t = (path.at(torch.tensor(u, dtype=F64)) for u in (0.625, 0.8))
    x, _ = law.draw(4000, torch.Generator().manual_seed(0))
    x_t = path.noise(x, torch.full((4000,), 0.8, dtype=F64), draws(4000, 2))
    x_s, eps = expected(law, x_t, at_s, at_t)
    v, (_, b) = law.v(x_t, torch.full((4000,), 0.8, dtype=F64)), between(at_s, at_t)
    off = {each: float((target("v", x_s, eps, at_s, at_t) / b - v).square().mean().sqrt() / v.square().mean().sqrt())
           for each, target in (("naive", naive_target), ("derived", subinterval_target))}
    assert off["derived"] < 1e-9 and 0.3 < off["naive"] < 0.33, off


def test_a_network_that_regresses_the_target_on_samples_finds_the_velocity():
    """Monte Carlo: of the best linear answer to x_t, which for one Gaussian is the exact one, to 2 %."""
    path, n = Linear(), 400_000
    at_s, at_t = (path.at(torch.tensor(u, dtype=F64)) for u in (0.4, 0.7))
    std, mean = 0.3, 1.2
    x_s = at_s.alpha * (mean + std * draws(n, 1, seed=1)) + at_s.sigma * draws(n, 1, seed=2)
    (a, b), eps = between(at_s, at_t), draws(n, 1, seed=3)
    x_t = a * x_s + b * eps
    design = torch.cat([x_t, torch.ones_like(x_t)], 1)
    found = {each: torch.linalg.lstsq(design, target("v", x_s, eps, at_s, at_t) / b).solution.flatten()
             for each, target in (("derived", subinterval_target), ("naive", naive_target))}
    variance = (at_t.alpha * std) ** 2 + at_t.sigma**2
    slope = (at_t.sigma - at_t.alpha * std**2) / variance                     # of E[eps - x0 | x_t]
    exact = torch.stack([slope, -mean - slope * at_t.alpha * mean])
    assert (found["derived"] - exact).abs().max() < 0.02 * exact.abs().max()
    assert (found["naive"] - exact).abs().max() > 0.2 * exact.abs().max()


def test_the_target_stays_finite_where_t_is_s():
    path, x = Linear(), draws(4, 2).float()
    at = path.at(torch.tensor(0.5))
    u = subinterval_target("v", x, draws(4, 2, seed=1).float(), at, at)
    assert u.isfinite().all() and (direction(u, 0 * x, 0 * x, -1) == 0).all()


# ---- phases ----


def test_of_one_phase_it_is_dmd(teacher):
    """At noise levels whose weight is one."""
    both = []
    for recipe in (DMD, PhasedDMD):
        torch.manual_seed(0)
        made = recipe(settings_of(recipe, teacher, student_steps=1, times=(0.4, 0.98)))
        shaken(made.fake)
        x, y = draws(64, 2, seed=5).float().requires_grad_(), made.labels(turn_of(made))
        phase = () if recipe is DMD else (made.phases[0],)
        tracked = made.tracked(*phase, x.detach(), y, turn_of(made))
        moved = made.moved(*phase, x, y, turn_of(made))
        moved = moved["gap"] if recipe is DMD else moved
        both.append([tracked, moved, torch.autograd.grad(moved.sum(), x)[0]])
        both[-1].append(made.generator().sample(16))
    for ours, theirs in zip(*both, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("intervals", "high"), [("nested", (0.98, 0.98, 0.98)), ("disjoint", (0.98, 2 / 3, 1 / 3))])
def test_a_phase_looks_above_where_it_ends(teacher, intervals, high):
    made = PhasedDMD(settings_of(PhasedDMD, teacher, student_steps=3, intervals=intervals))
    for phase, most in zip(made.phases, high, strict=True):
        t = phase.law.quantile(torch.linspace(0, 1, 1001))
        assert abs(float(t.min()) - max(phase.end, 0.02)) < 1e-6 and abs(float(t.max()) - most) < 1e-6


def test_one_expert_moves_in_a_phase_and_the_fake_score_begins_anew(teacher):
    settings = settings_of(PhasedDMD, teacher, steps=20, student_steps=3, every=2)
    made = PhasedDMD(settings)
    made.data = None
    trainer = trainer_of(made, settings)
    assert [stage.steps for stage in made.stages()] == [6, 7, 7]
    seen = []
    for step in steps_of(trainer, 20):
        if step in (0, 6, 13):
            assert all(torch.equal(p, q) for p, q in zip(made.fake.parameters(), made.origin.parameters(), strict=True))
            assert trainer.learners["fake"].updates == 0
        seen.append([state(expert) for expert in made.experts])
    seen.append([state(expert) for expert in made.experts])
    for k, (first, last) in enumerate([(0, 6), (6, 13), (13, 20)]):
        for other in range(3):
            assert same(seen[first][other], seen[last][other]) == (other != k)
    assert [trainer.learners[f"expert-{k}"].updates for k in (1, 2, 3)] == [3, 3, 4]


def test_a_phase_begins_where_the_products_experts_came_to(teacher):
    made = PhasedDMD(settings_of(PhasedDMD, teacher, student_steps=2))
    for mean in made.means:
        shaken(mean.module)
    made.experts = [mean.module for mean in made.means]
    phase = made.phases[1]
    x, y = made.generated(phase, turn_of(made, stage=phase.name))
    z = turn_of(made).randn((64, 2))
    (few,) = [made.generator()]
    drawn = few.drawing(1.0, None, None)(lambda _: z, y)
    assert torch.allclose(x, drawn, atol=1e-6)


@pytest.mark.parametrize("left", [0, 1])
def test_a_phase_of_two_steps_is_left_after_any_of_them_and_ends_where_it_should(teacher, left):
    """By hand: experts of the first phase as averaged take its two steps; the second's leaves after one, straight to
    the end, or after both. The gradient is of the step that ends it."""
    made = PhasedDMD(settings_of(PhasedDMD, teacher, student_steps=4, phases=2))
    assert len(made.experts) == 2 and [p.end for p in made.phases] == [0.5, 0.0]
    for i, module in enumerate((made.means[0].module, made.experts[1])):
        shaken(module, i)
    turn = turn_of(made, stage=made.phases[1].name)
    y, z = made.labels(turn), made.noise(turn)

    def euler(net, x, t, s):
        return x + (s - t) * net.v(x, torch.full((64,), t), y)

    with torch.no_grad():
        x = euler(made.means[0].module, euler(made.means[0].module, z, 1.0, 0.75), 0.75, 0.5)
        if left:
            x = euler(made.experts[1], x, 0.5, 0.25)
    x = euler(made.experts[1], x, 0.25 if left else 0.5, 0.0)
    again = turn_of(made, stage=made.phases[1].name)
    again.rand = lambda shape, shared=False: torch.tensor([0.3, 0.8])[left]
    there, _ = made.generated(made.phases[1], again)
    assert torch.allclose(there, x, atol=1e-5)
    mine, hand = (torch.autograd.grad(v.square().sum(), list(made.experts[1].parameters())) for v in (there, x))
    assert all(torch.allclose(g, h, rtol=1e-3, atol=1e-3) for g, h in zip(mine, hand, strict=True))


def test_experts_of_a_phase_take_all_of_its_steps_when_drawn_from(teacher):
    made = PhasedDMD(settings_of(PhasedDMD, teacher, student_steps=4, phases=2))
    for i, mean in enumerate(made.means):
        shaken(mean.module, i)
    few, z, y = made.generator(), torch.randn(8, 2), torch.arange(8) % made.flow.classes
    x, times = z, (1.0, 0.75, 0.5, 0.25, 0.0)
    with torch.no_grad():
        for k in range(4):
            x = x + (times[k + 1] - times[k]) * made.means[k // 2].module.v(x, torch.full((8,), times[k]), y)
        assert torch.allclose(few.drawing(1.0, None, None)(lambda _: z, y), x, atol=1e-5)


def test_phases_without_a_step_of_their_expert_are_refused(teacher):
    with pytest.raises(Refusal, match="steps 7: a phase has 1 of them, and its expert moves once in 2"):
        PhasedDMD(settings_of(PhasedDMD, teacher, student_steps=4, steps=7))


def test_the_variance_told_is_that_of_the_batch_of_all_processes(teacher, monkeypatch):
    """Told of each process's part, it would be less; of a part of one sample, nothing."""
    x, y, told = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2, []
    for part in (slice(None), slice(0, 1)):
        made = DecoupledDMD(settings_of(DecoupledDMD, teacher, shield="none", batch=len(x[part])))
        turn = turn_of(made, "student")
        monkeypatch.setattr(turn, "mean", lambda z: x.mean(0) if z.ndim else z, raising=False)
        made.k = 0
        made.followed(x[part].clone().requires_grad_(), y[part], turn)
        told.append(float(turn.told["samples/variance"]))
    assert told[0] == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-5)
    assert told[1] == pytest.approx(float((x[0] - x.mean(0)).square().mean()), rel=1e-5)


def test_phases_are_equal_shares_of_the_students_steps(teacher):
    with pytest.raises(Refusal, match="phases 3: 4 student steps have no equal shares for as many"):
        PhasedDMD(settings_of(PhasedDMD, teacher, student_steps=4, phases=3))


def test_a_few_steps_come_nearer_than_the_teachers_one(tmp_path, teacher, data):
    first = far(stillroom.load(run(DMD, tmp_path / "none", teacher, steps=1)), data)
    for name, more in {"nested": {}, "disjoint": {"intervals": "disjoint"}, "lora": {"lora": 8},
                       "two steps a phase": {"student_steps": 4, "phases": 2}}.items():
        out = run(PhasedDMD, tmp_path / name, teacher, steps=600, **{"student_steps": 2, **more})
        assert far(stillroom.load(out), data) < 0.5 * first, name
    product = load_product(tmp_path / "nested")
    assert product.kind == "generator" and list(product.parts["generator"].plans) == [2]
    assert load_product(tmp_path / "lora").base is not None


@pytest.mark.parametrize("more", [{}, {"student_steps": 2}])
def test_decoupled_students_come_nearer(tmp_path, teacher, data, more):
    first = far(stillroom.load(run(DMD, tmp_path / "none", teacher, steps=1)), data)
    out = run(DecoupledDMD, tmp_path / "run", teacher, steps=400, **{"guidance": 1.3, **more})
    student = stillroom.load(out)
    assert far(student, data) < 0.5 * first and isinstance(student, OneStep) == ("student_steps" not in more)


def test_a_run_resumed_in_its_second_phase_ends_the_same(tmp_path, teacher):
    more = {"teacher": teacher, "steps": 16, "student_steps": 2, "checkpoint_every": 4}
    whole, part = (run(PhasedDMD, tmp_path / name, **more) for name in ("whole", "part"))
    for step in ("12", "16"):
        (part / "checkpoints" / f"step-000000{step}").rename(part / step)
    (part / "product").rename(part / "old")
    resume(part, lambda _: PhasedDMD, None, Silent())
    a, b = (load_product(out).parts["generator"].state_dict() for out in (whole, part))
    assert same(a, b)


@pytest.mark.parametrize(("recipe", "more", "says"), [
    (DecoupledDMD, {"guidance": 1.0}, "stillroom distill dmd"),
    (DecoupledDMD, {"shield": "adversarial", "adversarial": Adversarial()}, "its weight is 0"),
    (PhasedDMD, {"teacher": "grid:3"}, "no network for a student to start from"),
])
def test_what_cannot_be_is_refused_in_a_line(tmp_path, teacher, recipe, more, says):
    with pytest.raises(Refusal, match=says) as error:
        run(recipe, tmp_path / "run", **{"teacher": teacher, "steps": 2, **more})
    assert "\n" not in str(error.value)


def test_guidance_of_an_unconditional_teacher_is_refused(tmp_path, data):
    flow = FlowMatching.Settings(out=tmp_path / "flow", steps=2, batch=16, **POINTS, **PLAIN)
    start(FlowMatching, flow, "flow", {"data": Tensors(data.x, name="alone")}, Silent())
    with pytest.raises(Refusal, match=r"trained without labels.*match without it: stillroom distill dmd"):
        run(DecoupledDMD, tmp_path / "run", str(tmp_path / "flow"), steps=2)

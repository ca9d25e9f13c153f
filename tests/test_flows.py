"""Oracles of denoisers, guidance, flows and the teacher gate."""

import json

import pytest
import torch

from closed_forms import F64, Answer, draws, each_path, gaussian, mixture, natively
from stillroom.flows import (
    AutoGuided,
    Denoiser,
    During,
    Flow,
    Gaussian,
    Guided,
    Mixture,
    Split,
    check,
    denoising_loss,
    guided,
    latest,
    noise_of,
    require,
)
from stillroom.nets import MLP, build, describe
from stillroom.paths import VE, Cosine, Linear, Tabulated, clock, convert
from stillroom.settings import Refusal

# Denoisers

@each_path
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score", "angular"])
def test_a_denoiser_answers_the_same_whatever_it_natively_predicts(path, kind):
    exact = mixture(path)
    net = natively(exact, kind)
    x, t, y = draws(32, 2), torch.linspace(0.05, 0.95, 32, dtype=F64), torch.arange(32) % 4
    assert net(x, t, y).dtype == F64
    for asked in ("x0", "eps", "v", "score"):
        truth = exact.predict(asked, x, t, y)
        assert torch.allclose(getattr(net, asked)(x, t, y), truth, rtol=1e-8, atol=1e-8 * float(truth.abs().max()))


def test_half_precision_is_left_at_the_net():
    said = torch.full((3, 2), 0.1, dtype=torch.bfloat16)
    net = Denoiser(Answer(lambda x, t, y: said), Linear(), "v")
    x, t = torch.ones(3, 2, dtype=torch.bfloat16), torch.full((3,), 0.25)
    assert net(x, t).dtype == torch.float32
    assert torch.equal(net.x0(x, t), 1 - 0.25 * said.float())


def test_scaling_the_input_divides_by_the_standard_deviation():
    seen = []
    net = Denoiser(Answer(lambda x, t, y: seen.append(x) or torch.zeros_like(x)), VE(80.0), "eps", scale_input=True)
    t = torch.tensor([0.1, 1.0])
    net(torch.tensor([[8.0, 4.0], [80.0, 160.0]]), t)
    std = (1 + (80 * t) ** 2).sqrt()[:, None]
    assert torch.allclose(seen[0], torch.tensor([[8.0, 4.0], [80.0, 160.0]]) / std)


def test_a_jump_is_the_ddim_step_of_the_two_time_prediction():
    """On a Gaussian of one point every jump is exact, and jumps compose."""
    point = Gaussian(draws(2, seed=7), torch.zeros(2, 2, dtype=F64), Cosine())

    class Two(Answer):
        def forward(self, x_t, t, y=None, r=None):
            assert r is not None
            return self.function(x_t, t, y)

    net = Denoiser(Two(lambda x, t, y: point.predict("v", x, t, y)), Cosine(), "v")
    x0, eps = point.mean.expand(8, 2), draws(8, 2)
    s, t, u = (torch.full((8,), v, dtype=F64) for v in (0.9, 0.5, 0.1))
    x_s = net.path.noise(x0, s, eps)
    there = net.jump(x_s, s, u)
    assert torch.allclose(there, net.path.noise(x0, u, eps), atol=1e-12)
    assert torch.allclose(net.jump(net.jump(x_s, s, t), t, u), there, atol=1e-12)


def test_hidden_features_are_those_of_the_named_modules():
    torch.manual_seed(0)
    net = Denoiser(MLP(2, width=16, depth=2), Linear())
    x, t = torch.randn(5, 2), torch.rand(5)
    found = net.hidden(x, t, at=("enter", "layers.1"))
    assert set(found) == {"enter", "layers.1"} and torch.equal(found["enter"], net.net.enter(x))  # pyright: ignore
    assert not any(m._forward_hooks for m in net.modules())  # and nothing stays hooked
    with pytest.raises(Refusal):
        net.hidden(x, t, at=("layers.7",))
    assert not any(m._forward_hooks for m in net.modules())


@each_path
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "angular"])
def test_the_exact_denoiser_minimises_the_denoising_loss(path, kind):
    """The loss at the posterior mean is lower than at any answer moved by a constant, by that constant's square."""
    exact = natively(mixture(path), kind)
    n = 50_000
    x0, y = mixture(path).draw(n, torch.Generator().manual_seed(0))
    t, eps = torch.full((n,), 0.5, dtype=F64), draws(n, 2, seed=1)
    best = denoising_loss(exact, x0, t, eps, y)
    scale = float(best.mean()) ** 0.5
    moved = Denoiser(Answer(lambda x, t, y: exact(x, t, y) + scale), path, kind)
    worse = denoising_loss(moved, x0, t, eps, y)
    assert abs(float((worse - best).mean()) / scale**2 - 1) < 0.04


# Guidance

@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_guidance_is_its_formula_in_the_native_prediction(kind):
    exact = natively(mixture(), kind)
    x, t, y = draws(32, 2), torch.linspace(0.05, 0.95, 32, dtype=F64), torch.arange(32) % 3
    conditional, unconditional = exact(x, t, y), exact(x, t)
    for scale in (0.0, 1.0, 3.5):
        formula = unconditional + scale * (conditional - unconditional)
        assert torch.allclose(Guided(exact, scale)(x, t, y), formula, rtol=1e-12, atol=1e-13)
    both = Guided(exact, 2.0).split(x, t, y)
    assert isinstance(both, Split)
    assert torch.allclose(both.conditional, conditional) and torch.allclose(both.unconditional, unconditional)
    assert torch.equal(Guided(exact, 2.0)(x, t), unconditional)
    negative = Guided(exact, 2.0, negative=1)(x, t, y)
    against = exact(x, t, torch.ones_like(y))
    assert torch.allclose(negative, against + 2 * (conditional - against), rtol=1e-12, atol=1e-13)


def test_guidance_is_linear_so_it_is_the_same_in_every_prediction():
    in_x0, in_v = (Guided(natively(mixture(), kind), 2.5) for kind in ("x0", "v"))
    x, t, y = draws(32, 2), torch.linspace(0.05, 0.95, 32, dtype=F64), torch.arange(32) % 3
    assert torch.allclose(in_x0.v(x, t, y), in_v(x, t, y), rtol=1e-10, atol=1e-10)


def test_guidance_of_one_costs_nothing_and_needs_labels_otherwise():
    exact = mixture()
    assert guided(exact, 1) is exact and isinstance(guided(exact, 2), Guided)
    with pytest.raises(ValueError, match="conditional"):
        Guided(gaussian(), 2.0)


# Guidance by a weaker model

def strong_and_weak(path=None):
    """A Gaussian, and a wider one about another mean: so the combined precision is positive."""
    narrow, wide = torch.diag(torch.tensor([0.5, 0.2], dtype=F64)), torch.tensor([[2.0, 0.3], [0.3, 1.5]], dtype=F64)
    return Gaussian(draws(2, seed=5), narrow, path), Gaussian(draws(2, seed=6), wide, path)


@each_path
@pytest.mark.parametrize("w", [1.0, 1.5, 3.0])
def test_guidance_between_gaussians_is_the_gaussian_of_the_combined_precision(path, w):
    """At noise level t: P = w P_s - (w - 1) P_w, and mean P^-1 (w P_s m_s - (w - 1) P_w m_w)."""
    strong, weak = strong_and_weak(path)
    x, t = 2 * draws(8, 2, seed=7), torch.full((8,), 0.4, dtype=F64)
    c = path.at(t[0])
    parts = []
    for model, factor in ((strong, w), (weak, 1 - w)):
        covariance = model.vectors @ torch.diag(model.values) @ model.vectors.T
        precision = torch.linalg.inv(c.alpha**2 * covariance + c.sigma**2 * torch.eye(2, dtype=F64))
        parts.append((factor * precision, factor * precision @ (c.alpha * model.mean)))
    precision = parts[0][0] + parts[1][0]
    law = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, parts[0][1] + parts[1][1]), precision_matrix=precision)
    x.requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    assert torch.allclose(AutoGuided(strong, weak, w).score(x.detach(), t), score, rtol=1e-9, atol=1e-9)


def test_guidance_by_a_weaker_model_is_the_same_in_every_prediction():
    strong, weak = strong_and_weak()
    x, t = draws(8, 2), torch.linspace(0.1, 0.9, 8, dtype=F64)
    formula = strong.x0(x, t) + 0.7 * (strong.x0(x, t) - weak.x0(x, t))
    for kind in ("x0", "eps", "v", "score"):
        net = AutoGuided(natively(strong, kind), natively(weak, kind), 1.7)
        assert torch.allclose(net.x0(x, t), formula, rtol=1e-9, atol=1e-9)


def test_a_weaker_model_leads_nowhere_at_one():
    strong, weak = strong_and_weak()
    x, t = draws(8, 2), torch.linspace(0.1, 0.9, 8, dtype=F64)
    assert guided(strong, 1, weak) is strong and torch.equal(AutoGuided(strong, weak, 1.0)(x, t), strong(x, t))
    assert torch.allclose(guided(strong, 2.0, strong)(x, t), strong(x, t), rtol=1e-12)    # it leads nowhere from itself


def test_a_weaker_model_without_classes_is_asked_without_the_label():
    exact, x, t, y = mixture(), draws(6, 2), torch.full((6,), 0.4, dtype=F64), torch.arange(6) % 3
    blind = Denoiser(Answer(lambda x, t, y: exact(x, t)), Linear(), "x0")
    assert blind.classes is None
    assert torch.allclose(AutoGuided(exact, blind, 2.5)(x, t, y), Guided(exact, 2.5)(x, t, y), rtol=1e-9, atol=1e-9)


def test_an_interval_leaves_guidance_out_elsewhere():
    strong, weak = strong_and_weak()
    x, t = draws(5, 2), torch.tensor([0.1, 0.2, 0.5, 0.6, 0.9], dtype=F64)
    net, always = guided(strong, 2.0, weak, (0.2, 0.6)), guided(strong, 2.0, weak)
    inside = torch.tensor([False, True, True, True, False])[:, None]
    assert isinstance(net, During) and isinstance(always, AutoGuided)
    assert torch.equal(net(x, t), torch.where(inside, always(x, t), strong(x, t)))
    for each in (t[:1], t[2:3]):                                             # a sampler's: all at one time
        assert torch.equal(net(x, each.expand(5)), (always if each == 0.5 else strong)(x, each.expand(5)))


def test_an_interval_of_a_variance_exploding_path_is_told_in_shares_of_the_way():
    path = VE(80.0)
    exact = Mixture.ring(3, path=path)
    net, x = guided(exact, 2.0, interval=(0.2, 0.8)), draws(5, 2).float()
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    t, y = clock(path, u), torch.zeros(5, dtype=torch.long)
    guides = (net(x, t, y) != exact(x, t, y)).any(1)
    assert float(t[2]) < 0.1 and guides.tolist() == [False, True, True, True, False]
    one, many = torch.ones(256), draws(256, 2).float()          # where some of equal times round to above 1
    y, to_noise = torch.zeros(256, dtype=torch.long), guided(exact, 2.0, interval=(0.2, 1.0))
    assert torch.equal(to_noise(many, one, y), guided(exact, 2.0)(many, one, y))


def test_outside_of_the_interval_the_weak_model_costs_nothing():
    asked = []
    strong, weak = strong_and_weak()
    counted = Denoiser(Answer(lambda x, t, y: asked.append(float(t[0])) or weak.x0(x, t)), Linear(), "x0")
    Flow(strong, (2,), "euler", 10).sample(4, guidance=2.0, weak=Flow(counted, (2,)), interval=(0.25, 0.75))
    assert asked == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])


def test_guided_models_are_written_down_and_built_again():
    strong = mixture()
    net = guided(strong, 1.5, Mixture(strong.means, 2 * strong.stds, labels=strong.labels), (0.1, 0.8))
    again = build(json.loads(json.dumps(describe(net))))
    x, t, y = draws(8, 2), torch.full((8,), 0.5, dtype=F64), torch.zeros(8, dtype=torch.long)
    assert torch.equal(net(x, t, y), again(x, t, y))


@pytest.mark.parametrize(("weak", "says"), [
    (lambda: Gaussian(torch.zeros(2), torch.eye(2), Cosine()), "must agree"),
    (lambda: natively(Mixture.ring(3), "v"), "must agree"),
    (lambda: Mixture.ring(4), "the weak model knows 4 classes, the strong one 3"),
])
def test_models_that_cannot_be_subtracted_are_refused(weak, says):
    flow, weaker = Flow(Mixture.ring(3), (2,)), Flow(weak(), (2,))
    with pytest.raises(Refusal, match=says):
        flow.sample(2, guidance=2.0, weak=weaker)
    assert torch.equal(flow.sample(2, steps=3, weak=weaker), flow.sample(2, steps=3))   # unused at guidance 1
    with pytest.raises(Refusal, match=r"the weak flow makes \[3\], this one \[2\]"):
        flow.sample(2, guidance=2.0, weak=Flow(weak(), (3,)))
    with pytest.raises(Refusal, match=r"interval 0\.5 to 0\.2:"):
        flow.sample(2, guidance=2.0, interval=(0.5, 0.2))


def test_an_unconditional_flow_can_be_led_away_from_a_wider_one():
    """Samples of the guided flow spread less than those of the strong one, and lie farther from the weak one's mean."""
    strong, weak = (Flow(g.float(), (2,), "heun", 30) for g in strong_and_weak())
    plain, led = strong.sample(2000), strong.sample(2000, guidance=2.0, weak=weak)
    assert (led.std(0) < plain.std(0)).all()
    away = strong.denoiser.mean - weak.denoiser.mean  # pyright: ignore
    assert float((led.mean(0) - plain.mean(0)) @ away) > 0


# Flows

def test_a_flow_is_written_down_and_built_again():
    flow = Flow(Mixture.ring(4, 2.0, 0.2, path=Cosine()), (2,), "dpmpp_2m", 12, 1.5)
    again = build(json.loads(json.dumps(describe(flow))))
    assert torch.equal(flow.sample(32, seed=3), again.sample(32, seed=3))
    assert (again.sampler, again.steps, again.shift, again.shape) == ("dpmpp_2m", 12, 1.5, (2,))
    strong = build(json.loads(json.dumps(describe(Guided(mixture(), 2.0, 1)))))
    x, t, y = draws(8, 2), torch.full((8,), 0.5, dtype=F64), torch.zeros(8, dtype=torch.long)
    assert torch.equal(strong(x, t, y), Guided(mixture(), 2.0, 1)(x, t, y))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samples_do_not_depend_on_the_batch_they_are_drawn_in(guidance):
    flow = Flow(Mixture.ring(5), (2,), steps=8)
    whole = flow.sample(23, seed=4, guidance=guidance)
    for batch in (1, 7, 23, 100):
        assert torch.allclose(flow.sample(23, seed=4, guidance=guidance, batch=batch), whole, atol=1e-6)
    assert torch.allclose(flow.sample(6, seed=4, guidance=guidance, first=10), whole[10:16], atol=1e-6)
    assert not torch.allclose(flow.sample(23, seed=5, guidance=guidance), whole, atol=0.1)


def test_noise_is_each_samples_own():
    whole = noise_of((3, 2), 0, 10, seed=1)
    assert torch.equal(noise_of((3, 2), 4, 3, seed=1), whole[4:7])
    flat = noise_of((3, 2), 0, 2000, seed=1).flatten(1)
    assert len(flat.unique(dim=0)) == 2000 and abs(float(flat.mean())) < 0.03 and abs(float(flat.std()) - 1) < 0.03


def test_a_flow_draws_its_classes_in_balance():
    ring = Mixture.ring(3, radius=3.0)
    flow = Flow(ring, (2,), steps=20)
    x = flow.sample(12, seed=0)
    assert torch.cdist(x, ring.means).argmin(1).tolist() == [0, 1, 2] * 4
    asked = torch.tensor([2, 2, 0, 1])
    assert torch.cdist(flow.sample(4, y=asked), ring.means).argmin(1).tolist() == asked.tolist()


def test_a_variance_exploding_flow_is_drawn_at_noise_levels_of_every_size():
    """18 equal steps of sigma up to 80 would end 0.12 away."""
    ring = Mixture.ring(8, std=0.1, path=VE())
    few, many = Flow(ring, (2,), steps=18), Flow(ring, (2,), steps=400)
    assert float((few.sample(500) - many.sample(500)).norm(dim=1).mean()) < 0.02


def test_a_flow_refuses_what_it_cannot_do():
    with pytest.raises(Refusal, match="did you mean 'heun'"):
        Flow(gaussian(), (3,), sampler="huen")
    with pytest.raises(Refusal, match="guidance 1"):
        Flow(gaussian(), (3,)).sample(2, guidance=2.0)
    with pytest.raises(Refusal, match="3 labels for 5 samples"):
        Flow(Mixture.ring(2), (2,)).sample(5, y=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score"])
@each_path
def test_a_flow_samples_whatever_its_prediction_at_pure_noise(path, kind, sampler):
    """Where alpha is 0, eps and score say nothing of x0: such a flow starts below t=1, and ends in the same place."""
    exact = Gaussian(torch.tensor([1.0, -2.0]), torch.diag(torch.tensor([0.5, 0.1])), path)
    x = Flow(natively(exact, kind), (2,), sampler, 60).sample(2000)
    assert torch.allclose(x.mean(0), exact.mean, atol=0.1)
    assert torch.allclose(x.std(0), torch.tensor([0.5, 0.1]).sqrt(), atol=0.12 if sampler != "heun" else 0.06)
    begins_late = kind in ("eps", "score") and isinstance(path, Linear | Cosine)
    assert (float(latest(natively(exact, kind))) < 1) == begins_late


# The gate

def some_data(n=2000, spread=1.0):
    """Points with structure, of about unit variance, times `spread`."""
    exact = Mixture.ring(4, radius=1.35, std=0.15)
    return spread * exact.draw(n, torch.Generator().manual_seed(0))[0]


@each_path
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "angular"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_an_untrained_net_is_refused(path, kind, spread):
    torch.manual_seed(0)
    net = Denoiser(MLP(2), path, kind)  # its last layer starts at zero
    x0 = some_data(1000, spread)
    assert not check(net, x0).passed
    with pytest.raises(Refusal, match="the teacher fails the teacher gate"):
        require(net, x0, None, "the teacher")


@each_path
def test_closed_forms_pass(path):
    ring = Mixture.ring(4, radius=1.35, std=0.15, path=path)  # without a network
    x0, y = ring.draw(4000, torch.Generator().manual_seed(0))
    verdict = check(ring, x0, y)
    assert verdict.passed and len(verdict.ratios) == 10 and verdict.mean < 0.5
    for kind in ("x0", "eps", "v", "angular"):
        assert check(natively(ring, kind), x0).passed
    wide = gaussian(path)
    assert require(wide, wide.draw(draws(4000, 3)), None, "a Gaussian").passed


def test_the_ratios_of_an_isotropic_gaussian_are_known():
    """Risk of the posterior mean s^2 / (s^2 + a^2) for unit variance; of the v net that answers 0, x0 = x_t: 2 t^2."""
    n = 100_000
    x0 = draws(n, 2)
    white = natively(Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)), "v")
    verdict = check(white, x0)
    t = torch.arange(10, dtype=F64) / 10 + 0.05
    assert torch.allclose(torch.tensor(verdict.ratios, dtype=F64), t**2 / (t**2 + (1 - t) ** 2), rtol=0.02)
    assert torch.allclose(torch.tensor(verdict.untrained, dtype=F64), 2 * t**2, rtol=0.02)


def test_a_net_that_is_bad_in_one_bin_is_refused():
    ring = Mixture.ring(4, radius=1.35, std=0.15)
    x0, _ = ring.draw(4000, torch.Generator().manual_seed(0))
    broken = Denoiser(Answer(lambda x, t, y: torch.where(t[:, None] > 0.9, 3.0, ring.x0(x, t))), Linear(), "x0")
    with pytest.raises(Refusal, match=r"t = 0\.95"):
        require(broken, x0, None, "broken")


def test_a_teacher_of_other_data_is_refused():
    ring = Mixture.ring(4, radius=1.35, std=0.15)
    assert not check(ring, 5 + some_data()).passed


def test_the_gate_asks_no_path_beyond_its_end():
    seen = []
    path = Tabulated("scaled_linear", 1000, 0.00085, 0.012)  # ends at sigma/alpha = 14.6, before the last bin
    ring = Mixture.ring(4, radius=1.35, std=0.15, path=path)
    check(Denoiser(Answer(lambda x, t, y: seen.append(float(t.max())) or ring.x0(x, t)), path, "x0"), some_data(100))
    assert max(seen) == 1.0


def test_conversions_of_a_sampler_keep_to_float32():
    ring = Mixture.ring(3)
    x = Flow(ring, (2,)).sample(4)
    t = torch.full((4,), 0.5)
    assert x.dtype == torch.float32 and ring.v(x, t).dtype == torch.float32
    assert convert(x, x, Linear().over(t, x), "v", "x0").dtype == torch.float32

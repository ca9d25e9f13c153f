"""Oracles of the gap and of denoising regression."""

import pytest
import torch

from closed_forms import each_path, mixture, natively
from stillroom.flows import Mixture
from stillroom.match import (
    MATCHES,
    direction,
    gap,
    prediction_gap,
    pseudo_huber,
    pseudo_target,
    residual_weight,
    squared_error,
)
from stillroom.paths import VE, Cosine, Linear, Tabulated, convert, sign_of, target

F64 = torch.float64


def three(shape=(5, 3, 4, 4), dtype=F64):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=g, dtype=dtype) for _ in range(3))


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


def test_the_gradient_of_the_gap_is_the_weighted_difference():
    x, fake, real = three()
    for leaf in (x, fake, real):
        leaf.requires_grad_()
    weight = torch.arange(1.0, 6.0, dtype=F64).reshape(5, 1, 1, 1)
    loss = gap(x, fake, real, weight)
    assert torch.allclose(gradient(loss, x), weight * (fake - real) / x[0].numel(), rtol=1e-12)
    assert torch.allclose(loss, 0.5 * (weight * (fake - real)).square().flatten(1).mean(1), rtol=1e-12)
    # the two predictions are targets: nothing flows into them
    into = torch.autograd.grad(gap(x, fake, real).sum(), [fake, real], allow_unused=True)
    assert into == (None, None)


def test_the_gap_of_equals_is_zero_with_a_connected_gradient():
    x, fake, _ = three()
    x.requires_grad_()
    loss = gap(x, fake, fake.clone(), 7.0)
    assert (loss == 0).all() and (gradient(loss, x) == 0).all()


def test_the_gap_is_one_number_per_sample():
    x, fake, real = three()
    whole = gap(x, fake, real)
    assert torch.equal(whole[2:3], gap(x[2:3], fake[2:3], real[2:3]))


def test_the_gap_passes_through_what_made_x():
    """A generator's gradient is that of x carried through it."""
    z, fake, real = three((6, 4))
    theta = torch.randn(4, 4, dtype=F64, requires_grad=True)
    g = torch.autograd.grad(gap(z @ theta, fake, real).sum(), theta)[0]
    assert torch.allclose(g, z.T @ (fake - real) / 4, rtol=1e-12)


@pytest.mark.parametrize("path", [Linear(), Cosine(), Tabulated.ddpm(), VE(3.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "angular"])
def test_the_normalised_gap_is_the_same_in_every_prediction(path, kind):
    """x - T_x0 is to F_x0 - T_x0 what the true prediction less T is to F - T: the factor of the conversion cancels."""
    x, eps, noise = three()
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    c, x_t = path.over(t, x), path.noise(x, t, eps)
    f, r = eps + 0.3 * noise, eps - 0.2 * noise.flip(0)  # two native predictions, of whatever kind
    fake, real = (convert(p, x_t, c, kind, "x0") for p in (f, r))
    x.requires_grad_()
    ours = gradient(gap(x, fake, real, residual_weight(x, real)), x)
    true = target(kind, x.detach(), eps, c)
    factor = (fake - real) / (f - r)
    native = factor.sign() * (f - r) / (true - r).abs().mean((1, 2, 3), keepdim=True) / x[0].numel()
    assert torch.allclose(ours, native, rtol=1e-9, atol=1e-12)


def test_the_normalised_gap_does_not_see_the_scale_of_the_data():
    x, fake, real = three()
    small = gap(x, fake, real, residual_weight(x, real))
    large = gap(1000 * x, 1000 * fake, 1000 * real, residual_weight(1000 * x, 1000 * real))
    assert torch.allclose(small, large, rtol=1e-12)


def test_the_residual_weight_is_a_constant_and_finite():
    x, _, real = three(dtype=torch.float32)
    for leaf in (x, real):
        leaf.requires_grad_()
    assert not residual_weight(x, real).requires_grad
    assert torch.isfinite(residual_weight(x, x)).all()


@pytest.mark.parametrize(
    ("given", "kept"), [(F64, F64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str
)
def test_precision_is_kept_and_half_precision_is_left_before_subtracting(given, kept):
    x, fake, real = (a.to(given) for a in three())
    assert gap(x, fake, real, residual_weight(x, real)).dtype == kept
    assert squared_error(fake, real).dtype == kept
    difference = fake.to(kept) - real.to(kept)
    assert torch.equal(gap(x, fake, real), pseudo_target(x, difference))


def test_squared_error_by_hand():
    a, b = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert squared_error(a, b).tolist() == [2.0, 12.5]


KINDS = ("x0", "eps", "v", "score", "angular")


@each_path
def test_the_sign_of_a_kind_is_that_of_its_slope_in_x0(path):
    t = torch.linspace(0.05, 0.95, 19, dtype=F64)
    c, zero = path.at(t), torch.zeros(19, dtype=F64)
    for kind in KINDS:
        slope = convert(zero + 1, zero, c, "x0", kind) - convert(zero, zero, c, "x0", kind)
        assert (slope.sign() == sign_of(kind)).all()


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", MATCHES)
def test_a_direction_is_the_same_in_every_prediction_that_networks_give(path, name):
    """Fake and real are closed forms; each is asked as a network of that prediction answers, and nothing is converted
    after."""
    real, fake = mixture(path), Mixture(1.3 * mixture().means.flip(1), 0.8 * mixture().stds, path=path)
    g = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(400, 2, generator=g, dtype=F64) for _ in range(2))
    t = torch.linspace(0.02, 0.98, 400, dtype=F64)
    c, x_t = path.over(t, x), path.noise(x, t, eps)
    found = {}
    for kind in KINDS:
        f, r = (natively(net, kind)(x_t, t) for net in (fake, real))
        found[kind] = direction(target(kind, x, eps, c), f, r, sign_of(kind), *MATCHES[name])
    for kind in KINDS:
        assert torch.allclose(found[kind], found["x0"], rtol=1e-6, atol=1e-9), kind
    if name == "gap":
        f, r = fake.x0(x_t, t), real.x0(x_t, t)
        assert torch.allclose(found["v"], residual_weight(x, r) * (f - r), rtol=1e-6, atol=1e-9)


@each_path
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "angular"])
def test_every_weight_of_the_gap_is_of_x0_predictions_whatever_was_asked(path, kind):
    x, eps, _ = three((40, 2))
    t = torch.linspace(0.05, 0.95, 40, dtype=F64)
    c, x_t, real = path.over(t, x), path.noise(x, t, eps), mixture(path)
    fake = Mixture(1.3 * mixture().means.flip(1), 0.8 * mixture().stds, path=path)
    f, r = (natively(net, kind)(x_t, t) for net in (fake, real))
    apart = fake.x0(x_t, t) - real.x0(x_t, t)
    expected = {"none": apart, "residual": apart / (x - real.x0(x_t, t)).abs().mean(1, keepdim=True),
                "sigma": c.sigma**2 * (real.eps(x_t, t) - fake.eps(x_t, t))}
    x.requires_grad_()
    for weight, by_hand in expected.items():
        ours = gradient(prediction_gap(kind, x, eps, c, f, r, weight), x)
        assert torch.allclose(ours, by_hand / 2, rtol=1e-6, atol=1e-9), weight
    halves = gradient(prediction_gap(kind, x, eps, c, f, r, "none", *MATCHES["half"]), x)
    assert torch.allclose(halves, (0.5 * (fake.x0(x_t, t) - x) + x - real.x0(x_t, t)) / 2, rtol=1e-6, atol=1e-9)


def test_weights_by_hand():
    """On the linear path at t = 1/4, where x0 falls by t as v grows by 1."""
    x, eps, fake, real = (torch.tensor([each]) for each in ([1.0, 5.0], [0.0, 0.0], [0.0, -4.0], [1.0, -4.0]))
    c = Linear().over(torch.tensor([0.25]), x)                              # u = eps - x = -1, -5; F - T = -1, 0
    x.requires_grad_()
    for weight, expected in (("none", 0.25), ("sigma", 0.25 * 0.75 * 0.25), ("residual", 1 / 1.5)):
        assert gradient(prediction_gap("v", x, eps, c, fake, real, weight), x)[0].tolist() == pytest.approx(
            [expected / 2, 0.0]), weight


def test_directions_by_hand():
    u, fake, real = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 2.0]])
    expected = {"gap": [[1.0, 0.0]], "teacher": [[0.5, 1.5]], "student": [[0.5, -1.5]], "half": [[0.75, 0.75]]}
    for name, weights in MATCHES.items():           # mean |u - T| = 2
        assert direction(u, fake, real, 1, *weights).tolist() == expected[name], name
        assert torch.equal(direction(u, fake, real, -1, *weights), -direction(u, fake, real, 1, *weights))


@pytest.mark.parametrize("name", MATCHES)
def test_a_direction_where_the_target_knows_the_answer_is_zero_and_no_gradient_flows(name):
    u, fake, real = three(dtype=torch.float32)
    real[1] = u[1]
    for leaf in (u, fake, real):
        leaf.requires_grad_()
    found = direction(u, fake, real, -1, *MATCHES[name])
    assert not found.requires_grad and found.isfinite().all()
    assert (found[1] == 0).all() and (found[[0, 2, 3, 4]] != 0).any()
    assert (direction(u, u, u, 1, *MATCHES[name]) == 0).all()


@each_path
def test_at_equality_the_gap_is_zero_and_the_mean_of_either_sides_residual_is(path):
    exact = mixture(path)
    g = torch.Generator().manual_seed(3)
    x, _ = exact.draw(200_000, g)
    eps, t = torch.randn(x.shape, generator=g, dtype=F64), 0.02 + 0.96 * torch.rand(len(x), generator=g, dtype=F64)
    c, x_t = path.over(t, x), path.noise(x, t, eps)
    for kind in ("x0", "eps", "v"):
        said, true = exact.predict(kind, x_t, t), target(kind, x, eps, c)
        assert (direction(true, said, said.clone(), sign_of(kind)) == 0).all()
        residual = true - said
        z = residual.mean(0) / (residual.std(0) / len(x) ** 0.5)
        assert (z.abs() < 4.5).all(), kind
    # Closed forms of another law have no such residual: the oracle can fail.
    other = x - Mixture(1.2 * exact.means, exact.stds, exact.weights, path=path).x0(x_t, t)
    assert (other.mean(0) / (other.std(0) / len(x) ** 0.5)).abs().max() > 10


def test_half_precision_networks_keep_their_gap_in_their_own_prediction():
    from stillroom.claims.dmvae_toy import half_precision

    native, naive = half_precision(0)
    assert native < 0.05 < 0.15 < naive


# ---- regression ----


def test_pseudo_huber_is_its_formula_between_a_square_and_a_distance():
    """Of means over coordinates: sqrt(e^2 + c^2) - c with e the root mean square, e^2 / 2c near zero and e - c far."""
    a, b, _ = three()
    e, c = (a - b).square().flatten(1).mean(1).sqrt(), 0.00054
    assert torch.allclose(pseudo_huber(a, b), (e**2 + c**2).sqrt() - c, rtol=1e-12)
    assert torch.allclose(pseudo_huber(a, b, 0.7), (e**2 + 0.49).sqrt() - 0.7, rtol=1e-12)
    assert torch.allclose(pseudo_huber(a, b, 100.0), e**2 / 200, rtol=1e-3)
    assert torch.allclose(pseudo_huber(1e6 * a, 1e6 * b), 1e6 * e - c, rtol=1e-12)
    a.requires_grad_()
    assert (gradient(pseudo_huber(a, a.detach().clone()), a) == 0).all()

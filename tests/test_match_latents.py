"""Oracles of the codec losses: closed forms, zero at equality, exact gains, gradients that arrive."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from stillroom.match import latents as match
from stillroom.nets.coding import Decoder

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def posteriors(dtype=F64):
    mean, logvar, mean_t, logvar_t = (draw(3, 2, 4, 5, seed=s, dtype=dtype) for s in range(4))
    return mean, logvar - 2, mean_t, 2 * logvar_t - 1


def features(x):
    """Maps of two sizes, some of them zero everywhere."""
    return [torch.cat([x.relu(), 0 * x], 1), torch.nn.functional.avg_pool2d(x, 2).square()]


PAIRS = {
    "mse": match.latent_mse,
    "mse in scale": lambda a, b: match.latent_mse(a, b, torch.tensor([0.5, 2.0], dtype=a.dtype)),
    "l1": match.latent_l1,
    "huber": match.latent_huber,
    "statistics": match.statistics_distance,
    "features": lambda a, b: match.feature_distance(features(a), features(b), 0.2),
    "pixels": match.pixel_error,
    "blur": match.blur,
    "kl": lambda a, b: match.posterior_kl(a, 0.3 * b - 1, b, a - 1),
    "kl of equals' means": lambda a, b: match.posterior_kl(a, a, b, b),
    "wasserstein": lambda a, b: match.wasserstein2(a, a, b, b),
}
each = pytest.mark.parametrize("distance", PAIRS.values(), ids=PAIRS.keys())


@each
def test_one_number_per_picture_and_the_gradient_is_that_of_finite_differences(distance):
    a, b = (0.5 * draw(3, 2, 4, 6, seed=1)).requires_grad_(), draw(3, 2, 4, 6, seed=2)
    whole = distance(a, b)
    assert whole.shape == (3,) and (whole > 0).all()
    assert torch.allclose(whole[1:2], distance(a[1:2], b[1:2]), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda a: distance(a, b), a, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "kl"])
def test_equals_are_at_zero_with_a_finite_gradient(name):
    for z in (draw(2, 2, 4, 6), torch.zeros(2, 2, 4, 6, dtype=F64)):      # flat ones too: roots and norms of zero
        z.requires_grad_()
        loss = PAIRS[name](z, z.detach().clone())
        assert loss.abs().max() < 1e-12
        assert torch.autograd.grad(loss.sum(), z)[0].abs().max() < 1e-12


@each
def test_half_precision_is_summed_in_float32(distance):
    for dtype in (torch.float16, torch.bfloat16):
        a, b = draw(2, 2, 8, 8, seed=1, dtype=torch.float32).to(dtype), draw(2, 2, 8, 8, seed=2).to(dtype)
        half, full = distance(a, b), distance(a.float(), b.float())
        assert half.dtype == torch.float32
        # What runs inside the nets, and the mixtures of arguments made above, keep their own precision.
        assert torch.allclose(half, full, rtol=0.02)


@each
def test_shapes_that_would_broadcast_are_refused(distance):
    with pytest.raises((ValueError, RuntimeError)):
        distance(draw(2, 2, 4, 6), draw(1, 2, 4, 6))


def test_errors_in_units_of_the_teachers_deviation():
    student, teacher, scale = draw(3, 2, 4, 5), draw(3, 2, 4, 5, seed=1), torch.tensor([0.1, 7.0], dtype=F64)
    column = scale.view(-1, 1, 1)
    for distance in (match.latent_mse, match.latent_l1, match.latent_huber, match.statistics_distance):
        plain = distance(student, teacher)
        for form in (scale, column):
            assert torch.allclose(distance(student * column, teacher * column, form), plain, rtol=1e-5)
    e = student - teacher
    assert torch.allclose(match.latent_mse(student, teacher), e.square().mean((1, 2, 3)))
    assert torch.allclose(match.latent_l1(student, teacher), e.abs().mean((1, 2, 3)))


@pytest.mark.parametrize("delta", [0.15, 1.0])
def test_huber_is_a_parabola_that_goes_on_as_its_tangent(delta):
    for e in (0.1 * delta, delta, 3 * delta):
        zero = torch.zeros(1, 1, 2, 2, dtype=F64)
        loss = match.latent_huber(zero - e, zero, delta=delta)
        assert float(loss) == pytest.approx(e**2 / 2 if e <= delta else delta * (e - delta / 2))


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.5])
def test_the_kl_of_posteriors_is_that_of_gaussians_with_noise_added(floor):
    mean, logvar, mean_t, logvar_t = posteriors()
    q, p = (Normal(m, (v.exp() + floor).sqrt()) for m, v in ((mean, logvar), (mean_t, logvar_t)))
    expected = kl_divergence(q, p).mean((1, 2, 3))
    assert torch.allclose(match.posterior_kl(mean, logvar, mean_t, logvar_t, floor), expected, rtol=1e-10)


def test_the_floor_bounds_what_a_certain_teacher_may_ask():
    """A teacher of variance e^-30: without the floor an error of 0.1 would weigh 5e10; with it, e^2 / 2 floor."""
    zero, sure = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), -30.0)
    assert float(match.posterior_kl(zero + 0.1, sure, zero, sure, 0.01)) == pytest.approx(0.01 / 0.02, rel=1e-3)
    assert float(match.posterior_kl(zero, sure, zero, sure, 0.01)) == 0
    logvar = torch.full((1, 1, 2, 2), 0.0, requires_grad=True)      # too unsure: it must become surer
    match.posterior_kl(zero, logvar, zero, sure).sum().backward()
    assert (logvar.grad > 0).all()


def test_the_kl_to_the_unit_gaussian_is_a_sum():
    mean, logvar, _, _ = posteriors()
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0 * mean, 1 + 0 * mean)).sum((1, 2, 3))
    assert torch.allclose(match.unit_kl(mean, logvar), expected, rtol=1e-12)


def test_wasserstein_is_the_squared_distance_of_quantiles():
    """In one dimension W2^2 is the integral of (F^-1(q) - G^-1(q))^2 over q."""
    a, b = Normal(torch.tensor(0.7, dtype=F64), 0.4), Normal(torch.tensor(-0.2, dtype=F64), 1.3)
    q = (torch.arange(2_000_000, dtype=F64) + 0.5) / 2_000_000
    expected = float((a.icdf(q) - b.icdf(q)).square().mean())
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    ours = match.wasserstein2(0.7 * one, 2 * math.log(0.4) * one, -0.2 * one, 2 * math.log(1.3) * one)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logvar", [-6e4, -30.0, 20.0, 6e4])
@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_no_posterior_overflows(dtype, logvar, floor):
    mean = torch.full((1, 2, 2, 2), 3e4, dtype=dtype, requires_grad=True)
    v = torch.full((1, 2, 2, 2), logvar, dtype=dtype, requires_grad=True)
    for loss in (match.posterior_kl(mean, v, -mean.detach(), -v.detach(), floor),
                 match.posterior_kl(mean, v, mean.detach(), v.detach(), floor),
                 match.wasserstein2(mean, v, -mean.detach(), -v.detach()), match.unit_kl(mean, v)):
        assert loss.isfinite().all() and loss.dtype == torch.float32
        g = torch.autograd.grad(loss.sum(), [mean, v])
        assert not any(part.isnan().any() for part in g)


def test_statistics_see_each_channel_and_not_where_things_are():
    z, other = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = z.flatten(2)[..., order].unflatten(2, (4, 5))
    assert match.statistics_distance(z, shuffled).max() < 1e-12 < match.latent_mse(z, shuffled).min()
    expected = (z.mean((2, 3)) - other.mean((2, 3))) ** 2 + (
        z.std((2, 3), correction=0) - other.std((2, 3), correction=0)) ** 2
    assert torch.allclose(match.statistics_distance(z, other), expected.mean(1), rtol=1e-4)
    assert match.statistics_distance(z[..., :1, :1], other[..., :1, :1]).isfinite().all()     # one latent is enough


def test_feature_distance_is_the_mean_of_maps_and_leaves_borders_out():
    a, b = [draw(2, 3, 10, 20), draw(2, 5, 5, 5, seed=1)], [draw(2, 3, 10, 20, seed=2), draw(2, 5, 5, 5, seed=3)]
    expected = sum((x - y).abs().mean((1, 2, 3)) for x, y in zip(a, b, strict=True)) / 2
    assert torch.allclose(match.feature_distance(a, b), expected)
    inside = [x.clone() for x in a]
    inside[0][..., 2:8, 4:16] = b[0][..., 2:8, 4:16]
    inside[1][..., 1:4, 1:4] = b[1][..., 1:4, 1:4]
    assert (match.feature_distance(inside, b) > 0).all() and (match.feature_distance(inside, b, 0.2) == 0).all()
    with pytest.raises(ValueError, match="argument"):
        match.feature_distance(a, b[:1])
    with pytest.raises(ValueError, match="border"):
        match.feature_distance(a, b, 0.5)


@pytest.mark.parametrize("k, m", [(0, 0), (1, 0), (3, 5), (15, 0), (15, 11), (8, 6)])
def test_high_frequency_energy_has_its_gain_at_every_frequency(k, m):
    """Cosines of the DCT continue by repeating their edge, so the filter only scales them."""
    rows, columns = torch.arange(16, dtype=F64) + 0.5, torch.arange(12, dtype=F64) + 0.5
    u, v = math.pi * k / 16, math.pi * m / 12
    x = ((u * rows).cos()[:, None] * (v * columns).cos())[None, None]
    gain = 1 - math.cos(u / 2) ** 2 * math.cos(v / 2) ** 2
    expected = gain**2 * float(x.square().mean())
    assert float(match.high_frequency_energy(x)) == pytest.approx(expected, abs=1e-14)


def test_blur_is_the_relative_deficit():
    x = draw(2, 3, 16, 16)
    for contrast in (0.0, 0.5, 0.9):
        faint = match.blur(contrast * x + 0.3, x)
        assert torch.allclose(faint, torch.full_like(faint, 1 - contrast**2), atol=1e-5)
    assert (match.blur(2 * x, x) == 0).all()
    assert (match.blur(x, torch.zeros_like(x)) == 0).all()
    assert match.blur(x[..., :1, :1], x[..., :1, :1]).isfinite().all()
    soft = torch.nn.functional.avg_pool2d(x, 3, 1, 1).requires_grad_()
    loss = match.blur(soft, x)
    loss.sum().backward()
    assert (match.blur(soft.detach() - 1e-3 * soft.grad, x) < loss).all()


def test_high_frequencies_are_measured_in_float32_under_autocast():
    x = 0.9 + 1e-3 * draw(1, 3, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = match.high_frequency_energy(x)
    assert torch.equal(inside, match.high_frequency_energy(x))


@pytest.mark.parametrize("term", [
    lambda decoder, z, x: match.pixel_error(decoder(z), x),
    lambda decoder, z, x: match.blur(0.1 * decoder(z), x),
    lambda decoder, z, x: match.feature_distance(decoder.features(z), decoder.features(x[:, :2, ::2, ::2])),
], ids=["pixels", "blur", "features"])
def test_a_frozen_decoder_passes_the_gradient_on_and_takes_none(term):
    torch.manual_seed(0)
    decoder = Decoder(2, 8, (1, 1)).to(F64).requires_grad_(False)
    z, x = draw(2, 2, 4, 4).requires_grad_(), draw(2, 3, 8, 8, seed=1)
    term(decoder, z, x).sum().backward()
    assert (z.grad.flatten(1).abs().max(1).values > 0).all() and all(p.grad is None for p in decoder.parameters())
    direction = draw(2, 2, 4, 4, seed=2)
    plus, minus = (term(decoder, z.detach() + h * direction, x).sum() for h in (1e-6, -1e-6))
    assert float((z.grad * direction).sum()) == pytest.approx(float((plus - minus) / 2e-6), rel=1e-4)


def test_pixel_error_is_the_sum_of_both():
    x, reference = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    l1, mse = (x - reference).abs().mean((1, 2, 3)), (x - reference).square().mean((1, 2, 3))
    assert torch.allclose(match.pixel_error(x, reference), l1 + mse)
    assert torch.allclose(match.pixel_error(x, reference, l1=0, mse=3), 3 * mse)

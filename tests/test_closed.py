"""Oracles of the closed forms: autograd, brute force, and integration on a grid."""

import math
from typing import get_args

import pytest
import torch

from closed_forms import F64, draws, each_path, gaussian, mixture, natively
from stillroom.flows import AutoGuided, During, Gaussian, Guided, Mixture, Noised, Shaped
from stillroom.paths import Cosine, Kind


@each_path
@pytest.mark.parametrize("label", [None, 0, 1, 2, 3])
def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density(path, label):
    exact = mixture(path)
    x, t = 2 * draws(64, 2), torch.linspace(0.05, 0.95, 64, dtype=F64)
    y = None if label is None else torch.full((64,), label)
    x.requires_grad_()
    gradient = torch.autograd.grad(exact.log_density(x, t, y).sum(), x)[0]
    assert torch.allclose(exact.score(x.detach(), t, y), gradient, rtol=1e-10, atol=1e-10)


@each_path
def test_the_score_of_a_gaussian_is_the_gradient_of_its_log_density(path):
    exact = gaussian(path)
    x, t = 2 * draws(64, 3), torch.linspace(0.05, 0.95, 64, dtype=F64)
    x.requires_grad_()
    gradient = torch.autograd.grad(exact.log_density(x, t).sum(), x)[0]
    assert torch.allclose(exact.score(x.detach(), t), gradient, rtol=1e-10, atol=1e-10)


@each_path
def test_a_gaussian_is_a_mixture_of_one(path):
    mean = draws(1, 3, seed=5)
    one = Mixture(mean, torch.tensor([0.7], dtype=F64), path=path)
    same = Gaussian(mean[0], 0.49 * torch.eye(3, dtype=F64), path)
    x, t = draws(64, 3), torch.linspace(0.01, 0.99, 64, dtype=F64)
    assert torch.allclose(one(x, t), same(x, t), rtol=1e-11, atol=1e-12)
    assert torch.allclose(one.log_density(x, t), same.log_density(x, t), rtol=1e-11)


def test_a_gaussian_takes_images_and_flat_directions():
    variances = torch.arange(12.0, dtype=F64)  # one direction has none
    flat = Gaussian(torch.zeros(12, dtype=F64), torch.diag(variances))
    x, t = draws(4, 3, 2, 2), torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=F64)
    answer = flat(x, t)
    assert answer.shape == x.shape and torch.isfinite(answer).all()
    assert torch.equal(answer.flatten(1), flat(x.flatten(1), t))
    assert torch.allclose(answer[0].flatten()[1:], x[0].flatten()[1:])  # at t=0 x_t is the data
    assert (answer.flatten(1)[:, 0] == 0).all()


@each_path
@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_class_of_a_mixture_is_the_mixture_of_its_components(path, label):
    exact = mixture(path)
    kept = exact.labels == label
    alone = Mixture(exact.means[kept], exact.stds[kept], exact.weights[kept], path=path)
    x, t, y = 2 * draws(64, 2), torch.linspace(0.02, 0.98, 64, dtype=F64), torch.full((64,), label)
    assert torch.allclose(exact(x, t, y), alone(x, t), rtol=1e-12, atol=1e-12)
    log_p_y = exact.weights[kept].sum().log()
    assert torch.allclose(exact.log_density(x, t, y), alone.log_density(x, t) + log_p_y, rtol=1e-11, atol=1e-11)


def test_the_null_label_keeps_all_components_and_labels_may_differ_within_a_batch():
    exact = mixture()
    x, t = draws(4, 2), torch.full((4,), 0.6, dtype=F64)
    y = torch.tensor([0, 3, 2, 1])
    mixed = exact(x, t, y)
    assert torch.equal(exact(x, t, torch.full((4,), 3)), exact(x, t))
    for i in range(4):
        assert torch.allclose(mixed[i], exact(x[i : i + 1], t[:1], y[i : i + 1])[0], rtol=1e-14)


@each_path
def test_the_posterior_mean_of_a_mixture_in_1d_by_integration(path):
    exact = mixture(path, dim=1)
    x0 = torch.linspace(-30, 30, 20_001, dtype=F64)
    component = torch.distributions.Normal(exact.means[:, 0], exact.stds)
    prior = (exact.weights * component.log_prob(x0[:, None]).exp()).sum(1)
    for time in (0.1, 0.5, 0.9):
        t = torch.tensor([time], dtype=F64)
        c = path.at(t)
        for x_t in (-2.0, 0.3, 1.7):
            x_t = x_t * float((c.alpha**2 + c.sigma**2).sqrt())
            posterior = prior * torch.exp(-((x_t - c.alpha * x0) ** 2) / (2 * c.sigma**2))
            mean = (posterior * x0).sum() / posterior.sum()  # a sum over equal steps is exact for such densities
            x = torch.tensor([[x_t]], dtype=F64)
            assert math.isclose(float(exact(x, t)), float(mean), rel_tol=1e-8, abs_tol=1e-9)
            area = float(posterior.sum() / (math.sqrt(2 * math.pi) * c.sigma)) * 60 / 20_000
            assert math.isclose(float(exact.log_density(x, t)), math.log(area), abs_tol=1e-8)


def test_the_posterior_mean_of_a_class_in_2d_by_integration():
    exact = mixture(Cosine())
    axis = torch.linspace(-16, 16, 641, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)  # [G, 2]
    kept = exact.labels == 1
    distance2 = (grid[:, None] - exact.means[kept]).square().sum(-1)
    prior = (exact.weights[kept] / exact.stds[kept] ** 2 * torch.exp(-distance2 / (2 * exact.stds[kept] ** 2))).sum(1)
    t, x_t = torch.tensor([0.45], dtype=F64), torch.tensor([[0.4, -0.9]], dtype=F64)
    c = exact.path.at(t)
    posterior = prior * torch.exp(-(x_t - c.alpha * grid).square().sum(1) / (2 * c.sigma**2))
    mean = (posterior[:, None] * grid).sum(0) / posterior.sum()
    assert torch.allclose(exact(x_t, t, torch.tensor([1]))[0], mean, rtol=1e-8, atol=1e-9)


def test_draws_have_the_moments_of_their_closed_forms():
    exact = gaussian()
    x = exact.draw(draws(200_000, 3))
    covariance = exact.vectors @ torch.diag(exact.values) @ exact.vectors.T
    assert torch.allclose(x.mean(0), exact.mean, atol=0.02) and torch.allclose(x.T.cov(), covariance, atol=0.02)
    many = mixture()
    x, y = many.draw(200_000, torch.Generator().manual_seed(0))
    assert torch.allclose(x.mean(0), many.weights @ many.means, atol=0.03)
    for label in range(3):
        assert abs(float((y == label).double().mean()) - float(many.weights[many.labels == label].sum())) < 0.005


def test_points_of_a_class_are_placed_about_its_components_alone_in_their_shares():
    exact = mixture()
    y = torch.arange(4).repeat_interleave(20_000)
    u = torch.rand(len(y), generator=torch.Generator().manual_seed(0), dtype=F64)
    u[::1000] = 0                                                       # a draw may be exactly that
    x, labels = exact.place(torch.zeros(len(y), 2, dtype=F64), u, y)
    k = torch.cdist(x, exact.means).argmin(1)
    assert torch.equal(labels, exact.labels[k]) and torch.equal(labels[y < 3], y[y < 3])
    for label in range(4):
        kept = exact.kept(torch.tensor([label]))[0]
        shares = k[y == label].bincount(minlength=5) / 20_000
        assert torch.allclose(shares.double(), exact.weights * kept / exact.weights[kept].sum(), atol=0.012)


def test_autocast_does_not_touch_closed_forms():
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(64, 2, generator=generator), torch.rand(64, generator=generator)
    for denoiser in (Mixture.ring(5), Gaussian(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))):
        with torch.autocast("cpu", torch.bfloat16):
            cast = denoiser.x0(x_t, t)
        assert torch.equal(cast, denoiser.x0(x_t, t))


@each_path
@pytest.mark.parametrize("make", [mixture, gaussian])
def test_a_time_per_frame_is_that_time_for_the_frame(path, make):
    exact = make(path)
    x, t = 2 * draws(6, 5, 2 if make is mixture else 3), torch.linspace(0.05, 0.95, 30, dtype=F64).view(6, 5)
    asked = [exact, Shaped(exact), natively(exact, "v"), Noised(exact, 0.3), AutoGuided(exact, make(path), 2.0)]
    y = None
    if make is mixture:
        y = torch.tensor([0, 1, 2, 3, 0, 1])
        asked += [Guided(exact, 2.0), During(Guided(exact, 2.0), exact, 0.2, 0.7)]
    for denoiser in asked:
        for kind in get_args(Kind):
            each = torch.stack([denoiser.predict(kind, x[:, f], t[:, f], y) for f in range(5)], 1)
            assert torch.allclose(denoiser.predict(kind, x, t, y), each, rtol=1e-10, atol=1e-12)
    density = torch.stack([exact.log_density(x[:, f], t[:, f], y) for f in range(5)], 1)
    assert torch.allclose(exact.log_density(x, t, y), density, rtol=1e-12)
    with pytest.raises(ValueError, match=r"t has shape \(5, 6\): expected the leading shape of x_t \(6, 5,"):
        exact(x, t.T)
    if make is mixture:     # of as many frames as samples, times of samples would be taken for those of frames
        with pytest.raises(ValueError, match="give a time for each"):
            exact(x[:, [0, 1, 2, 3, 4, 0]], t[:, 0])

"""Oracles of samplers: their order on an exact flow map, and where they are exact."""

import pytest
import torch

from closed_forms import F64, draws, each_path, gaussian, mixture
from stillroom.flows import Gaussian, ddim, dpmpp_2m, euler, heun
from stillroom.paths import VE, Cosine, Linear, Tabulated, karras_grid, uniform_grid


def flow_map(exact: Gaussian, x, t, s):
    """The exact solution of the probability flow from t to s: in the eigenbasis the standard deviations scale."""
    now, then = exact.path.at(t), exact.path.at(s)
    std = [(c.alpha**2 * exact.values + c.sigma**2).sqrt() for c in (now, then)]
    whitened = (x - now.alpha * exact.mean) @ exact.vectors / std[0]
    return then.alpha * exact.mean + (whitened * std[1]) @ exact.vectors.T


def order(sampler, exact, counts, start=0.9, end=0.1):
    t, s = torch.tensor(start, dtype=F64), torch.tensor(end, dtype=F64)
    x = draws(64, 3, seed=8) * float(exact.path.at(t).sigma)
    truth = flow_map(exact, x, t, s)
    errors = [float((sampler(exact, x, uniform_grid(n, start, end)) - truth).norm()) for n in counts]
    h, e = torch.tensor(counts, dtype=F64).log(), torch.tensor(errors, dtype=F64).log()
    return -float(((h - h.mean()) * (e - e.mean())).sum() / (h - h.mean()).square().sum())


@pytest.mark.parametrize(("sampler", "expected"), [(euler, 1), (heun, 2), (ddim, 1), (dpmpp_2m, 2)],
                         ids=["euler", "heun", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("path", [Linear(), Cosine(), VE(3.0)], ids=lambda p: type(p).__name__)
def test_the_order_of_a_sampler_on_the_gaussian_flow(path, sampler, expected):
    assert abs(order(sampler, gaussian(path), [64, 96, 128, 192, 256, 384]) - expected) < 0.15


@each_path
def test_uneven_steps_of_dpmpp_2m_are_those_of_the_paper(path):
    """Its algorithm 2, line by line. The order cannot tell: errors of the ratio of steps cancel over a grid."""
    exact, x = mixture(path), draws(16, 2)
    times = torch.tensor([0.9, 0.75, 0.3], dtype=F64)
    c = path.at(times)
    half_log_snr = (c.alpha / c.sigma).log()
    h1, h2 = half_log_snr.diff()
    d0 = exact.x0(x, times[0].expand(16))
    x1 = c.sigma[1] / c.sigma[0] * x - c.alpha[1] * torch.expm1(-h1) * d0
    d1, r = exact.x0(x1, times[1].expand(16)), h1 / h2
    d = (1 + 1 / (2 * r)) * d1 - 1 / (2 * r) * d0
    x2 = c.sigma[2] / c.sigma[1] * x1 - c.alpha[2] * torch.expm1(-h2) * d
    assert torch.allclose(dpmpp_2m(exact, x, times), x2, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("sampler", "expected"), [(ddim, 1), (dpmpp_2m, 2)], ids=["ddim", "dpmpp_2m"])
def test_the_order_of_samplers_on_a_table(sampler, expected):
    """Grids that fall on discrete times; few enough steps that the kinks of the table stay below the error."""
    assert abs(order(sampler, gaussian(Tabulated.ddpm()), [40, 50, 80, 100, 160, 200]) - expected) < 0.15


@each_path
@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_is_exact_for_a_point_mass(path, steps):
    point = Gaussian(draws(3, seed=9), torch.zeros(3, 3, dtype=F64), path)
    eps = draws(16, 3)
    start, middle = torch.ones(16, dtype=F64), torch.full((16,), 0.3, dtype=F64)
    x0 = point.mean.expand(16, 3)
    x = path.noise(x0, start, eps)
    there = ddim(point, x, uniform_grid(steps, 1.0, 0.3))
    assert torch.allclose(there, path.noise(x0, middle, eps), rtol=1e-9, atol=1e-9)
    for sampler in (ddim, dpmpp_2m):
        assert torch.allclose(sampler(point, x, uniform_grid(steps)), x0, atol=1e-9)


@pytest.mark.parametrize("sampler", [euler, heun, ddim, dpmpp_2m])
@pytest.mark.parametrize("path", [Linear(), Cosine(), Tabulated.ddpm()], ids=lambda p: type(p).__name__)
def test_samplers_reach_the_data_from_pure_noise(path, sampler):
    """Singular ends included: what comes out has the Gaussian's own mean and covariance."""
    exact = gaussian(path)
    x = sampler(exact, draws(10_000, 3), uniform_grid(100))
    covariance = exact.vectors @ torch.diag(exact.values) @ exact.vectors.T
    assert torch.allclose(x.mean(0), exact.mean, atol=0.05)
    assert torch.allclose(x.T.cov(), covariance, atol=0.1)


def test_along_a_table_the_last_step_of_heun_leaves_noise_and_those_of_the_exponential_samplers_none():
    """sigma rises as the root of t there, and a straight step to 0 from t keeps sigma - t sigma' of the noise."""
    point = Gaussian(torch.zeros(3, dtype=F64), torch.zeros(3, 3, dtype=F64), Tabulated.ddpm())
    left = {each: float(each(point, draws(4000, 3), uniform_grid(18)).std()) for each in (heun, ddim, dpmpp_2m)}
    assert 0.0155 < left[heun] < 0.0165 and left[ddim] < 1e-9 and left[dpmpp_2m] < 1e-9


def test_a_karras_grid_carries_a_variance_exploding_flow():
    exact = gaussian(VE(80.0))
    x = heun(exact, 80 * draws(20_000, 3), karras_grid(exact.path, 30))
    covariance = exact.vectors @ torch.diag(exact.values) @ exact.vectors.T
    assert torch.allclose(x.mean(0), exact.mean, atol=0.05) and torch.allclose(x.T.cov(), covariance, atol=0.1)


@pytest.mark.parametrize("sampler", [euler, heun, ddim, dpmpp_2m])
def test_a_callback_sees_every_state_and_its_x0(sampler):
    exact, seen = mixture(), []
    x = draws(8, 2)
    y = torch.arange(8) % 3
    sampler(exact, x, uniform_grid(5), y, lambda i, x, x0: seen.append((i, x, x0)))
    times = uniform_grid(5)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4] and torch.equal(seen[0][1], x)
    for i, state, x0 in seen:
        assert torch.allclose(x0, exact.x0(state, times[i].expand(8), y), atol=1e-9)

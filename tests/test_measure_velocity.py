"""Velocity irreducible variance against closed forms."""

import pytest
import torch

from stillroom.flows import Gaussian, Mixture
from stillroom.measure.velocity import in_sample, linear, viv
from stillroom.settings import Refusal

TIMES = (0.05, 0.3, 0.5, 0.8, 0.95)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_gaussian(variances: torch.Tensor, t: float) -> float:
    """Var[x0 | x_t] = l t^2 / ((1-t)^2 l + t^2) in each direction; over t^2, and over the variance of v."""
    return float((variances / ((1 - t) ** 2 * variances + t**2)).sum() / (1 + variances).sum())


def test_white_noise_halfway_is_told_nothing():
    assert of_gaussian(torch.ones(3), 0.5) == 1         # eps - x0 and eps + x0 are independent


@pytest.mark.parametrize("variances", [[1.0], [2.0, 0.1], [1.0, 1.0, 1e-4]])
def test_a_gaussian_is_bracketed_and_met_by_the_linear_answer(variances):
    each = torch.tensor(variances, dtype=torch.float64)
    turn = torch.linalg.qr(normal(len(each), len(each), seed=4)).Q
    x, held_out = ((normal(4000, len(each), seed=s) * each.sqrt()) @ turn + 5 for s in (1, 2))
    found = viv(x, held_out, TIMES)
    for t, low, high in zip(*found, strict=True):
        exact = of_gaussian(each, t)
        assert abs(high - exact) < 0.03 * exact + 0.003
        assert low < 1.08 * exact                       # from 512 draws
        if t >= 0.3:                                    # there the samples lie close enough
            assert low > 0.85 * exact
    assert found.means[0] < found.means[1]


def test_in_sample_is_exact_for_the_samples_themselves():
    """Two points are a law of their own: the posterior of a Mixture of them."""
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    law = Mixture(x, torch.full((2,), 1e-6, dtype=torch.float64))
    draws = normal(200_000, 2, seed=3)
    for t in (0.3, 0.6, 0.9):
        x0 = x[torch.arange(len(draws)) % 2]
        x_t = (1 - t) * x0 + t * draws
        risk = (law(x_t, torch.full((len(x_t),), t, dtype=torch.float64)) - x0).square().sum(1).mean() / t**2
        expected = float(risk / ((x - x.mean(0)).square().sum(1).mean() + 2))
        assert abs(in_sample(x, t, queries=50_000) - expected) < 0.02 * expected + 1e-4


def test_samples_that_are_few_for_their_dimension_understate():
    x, held_out = normal(300, 200, seed=1), normal(300, 200, seed=2)
    low, high = viv(x, held_out, (0.2, 0.5))[1:]
    exact = [of_gaussian(torch.ones(200), t) for t in (0.2, 0.5)]
    assert low[0] < 0.05 * exact[0] and low[1] < 0.5 * exact[1]
    assert all(abs(h - e) < 0.05 * e for h, e in zip(high, exact, strict=True))    # shrunk to the white law that it is


def test_more_dimensions_than_samples():
    """The way through inner products is the way through the covariance."""
    each = torch.linspace(2, 0.01, 40, dtype=torch.float64)
    x, held_out = (normal(n, 40, seed=s) * each.sqrt() for n, s in ((60, 1), (500, 2)))
    padded, also = (torch.cat([v, torch.zeros(len(v), 60, dtype=v.dtype)], 1) for v in (x, held_out))   # 100 > 60
    wide, narrow = linear(padded, also, TIMES), linear(x, held_out, TIMES)
    for t, w, n in zip(TIMES, wide, narrow, strict=True):
        assert w <= 1.2 and n < 1.1 * of_gaussian(each, t) + 0.1
    exact = Gaussian(torch.zeros(40, dtype=torch.float64), torch.diag(each))
    x_t = 0.5 * held_out + 0.5 * normal(500, 40, seed=8)
    risk = (exact(x_t, torch.full((500,), 0.5, dtype=torch.float64)) - held_out).square().sum(1).mean() / 0.25
    assert narrow[2] >= 0.97 * float(risk / (held_out.square().sum(1).mean() + 40))       # no better than the best


def test_clusters_are_told_apart_where_a_line_cannot():
    y = torch.arange(3000) % 2
    x = torch.stack([2.0 * y - 1, 0.0 * y], 1) + 0.05 * normal(3000, 2)
    low, high = (f[0] for f in viv(x[:2000], x[2000:], (0.3,))[1:])
    assert low < 0.8 * high


def test_refusals():
    x = normal(10, 3)
    for told, arguments in {"between 0 and 1": (x, x, (0.0, 0.5)), "two or more": (x[:1], x, (0.5,)),
                            "held-out": (x, normal(10, 4), (0.5,))}.items():
        with pytest.raises(Refusal, match=told):
            viv(*arguments)

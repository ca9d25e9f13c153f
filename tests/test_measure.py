"""Oracles of distances between samples and of the share of modes."""

import math

import pytest
import torch

from stillroom.measure import energy_distance, median_bandwidth, mmd2, modes, total_variation

DISTANCES = [lambda x, y: mmd2(x, y, 1.0), energy_distance]
each_distance = pytest.mark.parametrize("distance", DISTANCES, ids=["mmd2", "energy"])


def points(n, seed, mean=0.0, dim=2, dtype=torch.float32):
    return mean + torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@each_distance
def test_distances_are_unbiased(distance):
    same = torch.stack([distance(points(24, 2 * i), points(30, 2 * i + 1)) for i in range(600)])
    assert abs(float(same.mean())) < 4 * float(same.std()) / math.sqrt(600)
    assert float(same.min()) < 0  # an unbiased estimate of 0 goes below it; a biased one cannot
    apart = torch.stack([distance(points(24, 2 * i), points(30, 2 * i + 1, mean=0.7)) for i in range(50)])
    assert float(apart.mean()) > 10 * abs(float(same.mean()))


def test_the_energy_distance_of_gaussians_is_its_expectation():
    """In one dimension E|X - Y| is in closed form: for means m apart, sqrt(2) times the folded normal's mean."""
    m = 0.8

    def folded(mu):  # E |N(mu, 2)|
        return 2 / math.sqrt(math.pi) * math.exp(-(mu**2) / 4) + mu * math.erf(mu / 2)

    exact = 2 * folded(m) - 2 * folded(0.0)
    pairs = [(points(400, 2 * i, dim=1), points(400, 2 * i + 1, m, dim=1)) for i in range(40)]
    found = torch.stack([energy_distance(x, y) for x, y in pairs])
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(40)


def test_the_mmd_of_gaussians_is_its_expectation():
    """E k(X, Y) of two standard normals m apart: (b^2 / (b^2 + 2))^(d/2) exp(-m^2 / (2 (b^2 + 2)))."""
    b, m, d = 1.3, 0.9, 2

    def k(gap2):
        return (b**2 / (b**2 + 2)) ** (d / 2) * math.exp(-gap2 / (2 * (b**2 + 2)))

    exact = 2 * k(0.0) - 2 * k(d * m**2)
    found = torch.stack([mmd2(points(300, 2 * i), points(300, 2 * i + 1, m), b) for i in range(40)])
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(40)


def test_distances_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    # cross distances 0, 3, 1, 2; within 1 and 3
    assert math.isclose(float(energy_distance(x, y)), 2 * 6 / 4 - 1 - 3, abs_tol=1e-6)

    def k(d):
        return math.exp(-(d**2) / (2 * 1.5**2))

    assert math.isclose(float(mmd2(x, y, 1.5)), k(1) + k(3) - (k(0) + k(3) + k(1) + k(2)) / 2, abs_tol=1e-6)


@each_distance
@pytest.mark.parametrize("n", [20, 200])  # torch takes another way to distances from 26 points on
def test_distances_do_not_see_where_the_origin_is(distance, n):
    x, y = points(n, 0), points(n, 1, mean=0.5)
    far = torch.tensor([1024.0, -512.0])  # exact in float32 up to the rounding of the points
    assert abs(float(distance(x + far, y + far) - distance(x, y))) < 2e-4
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert abs(float(distance(x @ turn, y @ turn) - distance(x, y))) < 1e-5
    assert abs(float(distance(x, y) - distance(y, x))) < 1e-6


def test_the_median_bandwidth_by_hand():
    assert float(median_bandwidth(torch.tensor([[0.0], [1.0], [5.0]]))) == 4.0  # of 1, 4, 5
    y = points(50, 0)
    assert math.isclose(float(median_bandwidth(3 * y)), 3 * float(median_bandwidth(y)), rel_tol=1e-5)


def test_modes_of_constructed_points():
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [10.0, 2.0], [10.0, -2.0], [10.0, 0.0], [10.0, 0.0]])
    found = modes(x, means)
    assert torch.allclose(found.share, torch.tensor([2 / 6, 4 / 6, 0.0]))
    # squares about each mode's own mean: 2 and 8; degrees of freedom (1 + 3) * 2
    assert math.isclose(float(found.spread), math.sqrt(10 / 8), rel_tol=1e-6)


def test_the_spread_is_of_the_modes_not_between_them():
    means = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    off_centre = torch.tensor([51.0, 1.0])
    x = torch.cat([points(5000, 0) * 0.3, points(15000, 1) * 0.3 + off_centre])
    found = modes(x, means)
    assert abs(float(found.spread) - 0.3) < 0.005 and found.share.tolist() == [0.25, 0.75]
    alone = modes(torch.tensor([[0.5, 0.5]]), means)  # one sample says nothing of spread
    assert float(alone.spread) == 0 and alone.share.tolist() == [1.0, 0.0]


def test_total_variation_by_hand():
    a, b = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert float(total_variation(a, b)) == 0.5 and float(total_variation(a, a)) == 0

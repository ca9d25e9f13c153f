"""Oracles of the bootstrap: exact distributions of small samples, coverage, and what shared images cancel."""

import math

import pytest
import torch

from stillroom.measure import bootstrap
from stillroom.measure.bootstrap import (
    difference_interval,
    mean_interval,
    resampled_means,
    sweet_spot,
    sweet_spot_gap,
)
from stillroom.settings import Refusal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_means_of_two_images_have_three_values():
    means = resampled_means(torch.tensor([0.0, 1.0], dtype=torch.float64), 20_000, 0)
    for value, share in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.25)):
        assert abs(float((means == value).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / 20_000)


def test_blocks_do_not_change_the_draws(monkeypatch):
    values = draw(30, 2)
    whole = resampled_means(values, 101, 7)
    monkeypatch.setattr(bootstrap, "BLOCK", 30 * 8)
    assert torch.allclose(resampled_means(values, 101, 7), whole, atol=1e-12)
    assert not torch.allclose(resampled_means(values, 101, 8), whole)


def test_the_interval_of_many_images_is_the_normal_one():
    values = 2 * draw(900) + 5
    value, low, high = mean_interval(values, resamples=8000)
    half = 1.96 * float(values.std(correction=0)) / 30
    assert value == float(values.mean())
    assert abs((high - low) / (2 * half) - 1) < 0.04 and abs((high + low) / 2 - value) < 0.05 * half
    narrow = mean_interval(values, level=0.5, resamples=8000)
    assert abs((narrow.high - narrow.low) / (2 * half * 0.6745 / 1.96) - 1) < 0.05


def test_intervals_cover_the_truth_as_often_as_they_say():
    hits = 0
    for trial in range(400):
        _, low, high = mean_interval(draw(60, seed=trial).exp(), level=0.9, resamples=400, seed=trial)
        hits += low <= math.exp(0.5) <= high
    assert 0.80 < hits / 400 < 0.93      # skewed data of 60: the percentile interval is known to fall a little short


def test_a_paired_difference_forgets_what_the_images_share():
    hard, gain = 10 * draw(50), 0.3 + 0.01 * draw(50, seed=1)
    value, low, high = difference_interval(hard + gain, hard)
    assert 0.29 < low < value < high < 0.31
    assert mean_interval(hard + gain).low < 0 < mean_interval(hard).high
    constant = difference_interval(torch.arange(8) + 2.0, torch.arange(8))
    assert constant == pytest.approx((2, 2, 2))


def test_the_sweet_spot_of_divided_images():
    """Three images of five gain at scale 1, two at scale 2: a resample prefers 1 if it holds three or more such."""
    values = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 3 + [[0.0, 0.0, 1.0, 0.0]] * 2)
    best = sweet_spot((0.5, 1, 2, 3), values, resamples=20_000)
    exact = sum(math.comb(5, k) * 0.6**k * 0.4 ** (5 - k) for k in (3, 4, 5))
    assert best.scale == 1 and not best.at_edge and (best.low, best.high) == (1, 2)
    assert abs(best.shares[1] - exact) < 0.015 and abs(best.shares[2] - (1 - exact)) < 0.015
    assert best.shares[0.5] == best.shares[3] == 0


def test_a_sweet_spot_at_the_edge_is_said_to_be_there():
    scales = (1.0, 1.5, 2.0)
    rising = torch.tensor([0.0, 1.0, 2.0]) + 0.01 * draw(20, 3)
    assert sweet_spot(scales, rising)[:3] == (2.0, 2.0, 2.0) and sweet_spot(scales, rising).at_edge
    assert sweet_spot(scales, -rising).scale == 1.0 and sweet_spot(scales, -rising).at_edge     # errors, with a minus


def test_two_sweet_spots_are_resampled_together():
    scales = (1.0, 1.25, 1.5, 2.0)
    values = torch.tensor([0.0, 1.0, 1.02, 0.0]) + draw(40, 4)
    assert sweet_spot(scales, values).low < sweet_spot(scales, values).high      # undecided between scales
    assert sweet_spot_gap(scales, values, values + draw(40, 1, seed=1)) == (0, 0, 0)
    shifted = torch.tensor([5.0, 0, 0, 0]) + 0.1 * draw(40, 4, seed=2)
    gap = sweet_spot_gap((1.0, 1.25, 1.5, 2.0), shifted.flip(1), shifted)
    assert gap == (1.0, 1.0, 1.0)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(Refusal, match="finite"):
        mean_interval(torch.tensor([1.0, math.inf]))
    with pytest.raises(Refusal, match=r"\[N\]"):
        mean_interval(torch.zeros(3, 2))
    with pytest.raises(Refusal, match=r"\[N\]"):
        mean_interval(torch.zeros(0))
    with pytest.raises(Refusal, match="5 and 4"):
        difference_interval(torch.zeros(5), torch.zeros(4))
    with pytest.raises(Refusal, match="level"):
        mean_interval(torch.zeros(5), level=95)
    with pytest.raises(Refusal, match="one column per scale"):
        sweet_spot((1, 2), torch.zeros(5, 3))
    with pytest.raises(Refusal, match="scales rising"):
        sweet_spot((2, 1), torch.zeros(5, 2))
    with pytest.raises(Refusal, match="same images"):
        sweet_spot_gap((1, 2), torch.zeros(5, 2), torch.zeros(4, 2))

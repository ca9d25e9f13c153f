"""Order: epochs are permutations, steps are pure functions, draws are uniform and independent of the batch."""

import pytest
import torch

from stillroom.data import order


@pytest.mark.parametrize(("count", "batch"), [(10, 10), (10, 3), (7, 16), (1, 4), (64, 64)])
def test_every_epoch_visits_each_item_exactly_once(count, batch):
    steps = 6 * count // batch + 1
    flat = [i for k in range(steps) for i in order.indices(count, 3, k, batch)]
    for epoch in range(len(flat) // count):
        assert sorted(flat[epoch * count:(epoch + 1) * count]) == list(range(count))


def test_a_step_is_a_pure_function_of_seed_and_step():
    forwards = [order.indices(50, 1, k, 8) for k in range(20)]
    order.permutation.cache_clear()
    backwards = [order.indices(50, 1, k, 8) for k in reversed(range(20))][::-1]
    assert forwards == backwards
    assert forwards != [order.indices(50, 2, k, 8) for k in range(20)]


def test_epochs_and_neighbouring_seeds_have_different_permutations():
    seen = {tuple(order.indices(20, seed, step, 20)) for seed in range(10) for step in range(10)}
    assert len(seen) == 100


def test_runs_name_the_epoch_of_each_piece():
    pieces = order.runs(5, 0, first=3, length=9)
    assert [(e, len(p)) for e, p in pieces] == [(0, 2), (1, 5), (2, 2)]
    assert [i for _, p in pieces for i in p] == (order.indices(5, 0, 0, 15))[3:12]


def test_draws_depend_on_index_and_key_alone():
    u = order.uniforms([4, 9, 4], key=7, count=3)
    assert torch.equal(u[0], u[2])
    assert torch.equal(u[1], order.uniforms([9], key=7, count=3)[0])
    assert torch.equal(u[1, :2], order.uniforms([9], key=7, count=2)[0])
    assert not torch.equal(u[1], order.uniforms([9], key=8, count=3)[0])


def test_draws_are_uniform_and_uncorrelated():
    n = 20_000
    u = torch.cat([order.uniforms(range(n), key=0, count=2), order.uniforms(range(n), key=1, count=1)], 1)  # [n, 3]
    assert u.min() >= 0 and u.max() < 1
    counts = torch.stack([torch.histc(c, 20, 0, 1) for c in u.T])
    chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum(1)
    assert (chi2 < 43.8).all()                        # 19 degrees of freedom: 99.9 %
    off = torch.corrcoef(u.T) - torch.eye(3)
    assert off.abs().max() < 4 / n**0.5
    assert torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1].abs() < 4 / n**0.5


def test_mirror_turns_only_the_drawn_images():
    x = torch.arange(12.0).view(2, 1, 2, 3)
    out = order.mirror(x, torch.tensor([0.2, 0.7]))
    assert torch.equal(out[0], x[0].flip(-1)) and torch.equal(out[1], x[1])

"""Taps, the bank, coverage, and the ideal denoiser of a set."""

import pytest
import torch

from stillroom.flows import Mixture
from stillroom.match import parzen_x0, uncovered
from stillroom.match.taps import TAPS, of_map, patches, placed, pooled, problems
from stillroom.nets.bank import Bank


def test_places_and_patches_agree_with_sums_by_hand():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(placed(x)[1, 6], x[1, :, 1, 2])                  # place 6 is row 1, column 2
    found = patches(2)(x)
    corner = x[0, :, 2:, :2].flatten(1)                                 # patch (1, 0), the third
    assert torch.allclose(found["mean 2x2"][0, 2], corner.mean(1), atol=1e-6)
    assert torch.allclose(found["deviation 2x2"][0, 2], (corner.var(1, correction=0) + 1e-6).sqrt(), atol=1e-5)
    assert torch.allclose(pooled(x)["mean"][:, 0], x.mean((2, 3)), atol=1e-6)


def test_a_flat_picture_has_a_finite_slope():
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    sum(v.sum() for v in of_map(x).values()).backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["deviation", "deviation 2x2", "deviation 4x4"])
def test_half_precision_maps_have_the_slopes_of_whole_ones(name):
    """A smooth map far from zero, whose squares less the square of the mean are rounding in bfloat16."""
    coarse = torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    x = (torch.nn.functional.interpolate(coarse, 16, mode="bilinear") + 3).bfloat16()

    def slope(x):
        x = x.detach().requires_grad_()
        made = of_map(x)[name]
        ((made - made.detach().roll(1, 0)) ** 2).sum().backward()
        return made.detach().double(), x.grad.double()

    (half, down), (whole, true) = slope(x), slope(x.float())
    assert torch.allclose(half, whole, rtol=1e-6)
    assert float((down - true).norm() / true.norm()) < 0.01


def test_problems_keep_groups_and_places_apart():
    x = torch.arange(2 * 3 * 4).view(6, 4, 1)                           # two groups of three samples, four places
    found = problems(x, 2)
    assert found.shape == (8, 3, 1)
    assert found[5, :, 0].tolist() == [x[3, 1], x[4, 1], x[5, 1]]       # group 1, place 1


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no whole number"):
        TAPS["patches2"](torch.randn(1, 2, 5, 4))


def test_a_bank_keeps_the_newest_of_each_class():
    bank = Bank(2, 3, (1,))
    bank.push(torch.arange(5.0)[:, None], torch.tensor([0, 0, 0, 0, 1]))
    assert bank.count.tolist() == [3, 1]
    assert sorted(bank.x[0, :, 0].tolist()) == [1, 2, 3]
    bank.push(torch.tensor([[9.0]]), torch.tensor([0]))
    assert sorted(bank.x[0, :, 0].tolist()) == [2, 3, 9]


def test_a_bank_draws_without_replacement_and_from_what_it_holds():
    bank = Bank(3, 8, (1,))
    bank.push(torch.arange(8.0)[:, None], torch.zeros(8, dtype=torch.int64))
    bank.push(torch.tensor([[20.0], [21.0]]), torch.tensor([1, 1]))
    bank.push(torch.tensor([[30.0]]), torch.tensor([2]))
    drawn = bank.draw(torch.tensor([0, 1]), 6, torch.rand(2, 8))[..., 0]
    assert len(set(drawn[0].tolist())) == 6 and set(drawn[0].tolist()) <= set(range(8))
    assert sorted(drawn[1].tolist()) == [20, 20, 20, 21, 21, 21]        # round and round
    anyone = bank.draw(torch.full((1,), 3), 8, torch.rand(1, 8))[0, :, 0]
    assert set(anyone.tolist()) <= {*range(8), 20, 21, 30}
    shares = bank.draw_any(torch.rand(1, 20_000))[0, :, 0]
    assert abs(float((shares < 8).float().mean()) - 8 / 11) < 0.02


def test_a_set_denoises_as_a_mixture_of_points_does():
    y, x_t = torch.randn(1, 6, 3, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    t = torch.full((5,), 0.4, dtype=torch.float64)
    exact = Mixture(y[0], torch.full((6,), 1e-9, dtype=torch.float64))(x_t[0], t)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    assert torch.allclose(parzen_x0(x_t, 0.6 * one, 0.4 * one, y)[0], exact, atol=1e-8)
    alone = parzen_x0(y, 0.6 * one, 0.4 * one, y, own=True)[0, 2]
    rest = y[:, [0, 1, 3, 4, 5]]
    assert torch.allclose(alone, parzen_x0(y[:, 2:3], 0.6 * one, 0.4 * one, rest)[0, 0])


def test_coverage_asks_for_nothing_where_anchors_are_covered_and_pulls_where_not():
    anchors = torch.randn(1, 64, 2)
    assert float(uncovered(torch.randn(1, 64, 2), anchors)) < 1e-3
    x = torch.full((1, 32, 2), 4.0, requires_grad=True)
    loss = uncovered(x, anchors)
    loss.sum().backward()
    assert float(loss.detach()) > 0.1 and x.grad is not None
    assert (x.grad.sum(1) > 0).all()                                    # downhill lies towards the anchors

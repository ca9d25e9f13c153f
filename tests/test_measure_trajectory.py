"""Trajectories with known geometry: straight lines, circles, and a Gaussian's own flow."""

import math

import pytest
import torch

from stillroom.flows import Gaussian
from stillroom.measure import trajectories
from stillroom.paths import shift, uniform_grid
from stillroom.settings import Refusal

NOISE = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_straight_flow():
    target = torch.tensor([3.0, -1.0], dtype=torch.float64) + 0.5 * NOISE.flip(0)
    found = trajectories(lambda x, t: NOISE - target, NOISE, uniform_grid(7))
    assert found[2:7] == pytest.approx((0, 1, 0, 0, 0), abs=1e-12)
    assert torch.all(found.bends == 0) and found.times.tolist() == pytest.approx([i / 7 for i in range(6, 0, -1)])


@pytest.mark.parametrize("angle", [0.5, 2.0])
def test_a_rotation(angle):
    """x turns by `angle` about 0: the chord is 2 r sin(a/2), the way r a, the curvature 1/r."""
    turn = angle * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    x1, steps = NOISE / NOISE.norm(dim=1, keepdim=True) * 2.5, 400
    found = trajectories(lambda x, t: x @ turn, x1, uniform_grid(steps))
    chord = 2 * math.sin(angle / 2)
    assert found.straightness == pytest.approx((angle / chord) ** 2 - 1, rel=1e-3)
    assert found.path_ratio == pytest.approx(angle / chord, rel=1e-4)
    assert found.turning == pytest.approx(angle * (steps - 1) / steps, rel=1e-3)
    assert found.curvature == pytest.approx(1 / 2.5, rel=1e-3)
    assert found.bends.mean() == pytest.approx(angle, rel=1e-3)
    miss = (1 - math.cos(angle)) ** 2 + (angle - math.sin(angle)) ** 2          # |x1 - a J x1 - R x1|^2 / r^2
    centre = float(x1.mean(0).square().sum()) / 2.5**2
    assert found.one_step_gap == pytest.approx(miss / (1 - centre), rel=1e-3)


def test_speed_alone_is_no_turn_of_the_way():
    """v changes its length only: the way is the chord, yet one step is not enough."""
    found = trajectories(lambda x, t: t[:, None] * NOISE, NOISE, uniform_grid(200))
    assert found.path_ratio == pytest.approx(1, abs=1e-9) and found.curvature == pytest.approx(0, abs=1e-9)
    assert found.straightness == pytest.approx(1 / 3, rel=1e-3)                 # int (t - 1/2)^2 dt / (1/2)^2
    assert found.turning == pytest.approx(2, rel=0.01)


def test_a_gaussians_flow_converges_with_the_square_of_the_step():
    """Linear path, data N(0, s^2): x_t = sqrt((1-t)^2 s^2 + t^2) z in every direction, so all is known."""
    s = 0.2
    denoiser = Gaussian(torch.zeros(2).double(), s**2 * torch.eye(2).double())
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    speed = (t - (1 - t) * s * s) / ((1 - t) ** 2 * s * s + t * t).sqrt()
    straight = float(torch.trapezoid(speed.square(), t)) / (1 - s) ** 2 - 1
    way = float(torch.trapezoid(speed.abs(), t)) / (1 - s)
    missed = []
    for steps in (20, 40, 80):
        found = trajectories(lambda x, t: denoiser.v(x, t), NOISE, uniform_grid(steps))
        missed.append((abs(found.straightness - straight), abs(found.path_ratio - way)))
        assert found.curvature == pytest.approx(0, abs=1e-9)                    # straight ways, uneven speed
    assert found.straightness == pytest.approx(straight, rel=0.01) and straight > 0.1
    assert found.path_ratio == pytest.approx(way, rel=0.01)
    for (a, _), (b, _) in ((missed[0], missed[1]), (missed[1], missed[2])):
        assert 3 < a / b < 5.5
    # At t = 1 the flow knows the mean, 0, alone: one step ends there, and misses all of the variance.
    spread = float((NOISE - NOISE.mean(0)).square().sum(1).mean() / NOISE.square().sum(1).mean())
    assert found.one_step_gap == pytest.approx(1 / spread, rel=1e-6)


def test_a_grid_need_not_be_even_nor_start_at_one():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    even = trajectories(lambda x, t: x @ turn, NOISE, uniform_grid(300, 0.9))
    shifted = trajectories(lambda x, t: x @ turn, NOISE, uniform_grid(300, float(shift(torch.tensor(0.9), 0.5)), s=2.0))
    assert even[2:4] == pytest.approx(shifted[2:4], rel=1e-3)
    assert even.straightness == pytest.approx((0.45 / math.sin(0.45)) ** 2 - 1, rel=1e-3)


def test_float32_images_keep_their_shape():
    x = NOISE.float().view(64, 2, 1, 1)
    seen = []
    found = trajectories(lambda x, t: seen.append((x.shape, t.shape, t.dtype)) or torch.sin(x), x, uniform_grid(3))
    assert set(seen) == {(x.shape, (64,), torch.float32)} and len(seen) == 7    # two a step, and one for the one step
    assert found.n == 64 and found.steps == 3


def test_bad_flows_are_one_line():
    with pytest.raises(Refusal, match="moves nothing"):
        trajectories(lambda x, t: torch.zeros_like(x), NOISE, uniform_grid(3))
    with pytest.raises(Refusal, match="not finite"):
        trajectories(lambda x, t: x / 0, NOISE, uniform_grid(3))
    with pytest.raises(Refusal, match="one point"):
        trajectories(lambda x, t: NOISE, NOISE, uniform_grid(3))
    with pytest.raises(Refusal, match="falling"):
        trajectories(lambda x, t: x, NOISE, torch.tensor([0.0, 0.5, 1.0]))

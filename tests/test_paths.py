"""Oracles of paths, conversions, time laws and time grids."""

import itertools
import json
import math
from typing import Any, get_args

import pytest
import torch

from stillroom.nets import build, describe
from stillroom.paths import (
    VE,
    Clocked,
    Cosine,
    Kind,
    Linear,
    LogitNormal,
    LogNormal,
    Restricted,
    Shifted,
    Tabulated,
    Uniform,
    clock,
    clock_at,
    convert,
    dimension_shift,
    karras_grid,
    law_of,
    shift,
    target,
    uniform_grid,
)

F64 = torch.float64
PATHS = [Linear(), Cosine(), Tabulated.ddpm(), VE()]
KINDS = get_args(Kind)
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def pair(n=256, dim=3, low=0.02, high=0.98):
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, dim, generator=g, dtype=F64) for _ in range(2))
    return x0, eps, low + (high - low) * torch.rand(n, generator=g, dtype=F64)


def relative(a, b):
    return float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max())


@each_path
@pytest.mark.parametrize(("a", "b"), list(itertools.product(KINDS, KINDS)))
def test_conversions_round_trip_and_hit_the_target(path, a, b):
    x0, eps, t = pair()
    c, x_t = path.over(t, x0), path.noise(x0, t, eps)
    said, meant = target(a, x0, eps, c), target(b, x0, eps, c)
    there = convert(said, x_t, c, a, b)
    # A noisy eps says x0 only to sigma/alpha rounding errors: the round trip is the exact statement.
    assert relative(convert(there, x_t, c, b, a), said) < 1e-12
    lost = (c.sigma / c.alpha).clamp(min=1) * (c.alpha / c.sigma).clamp(min=1)
    assert (there - meant).abs().div(lost * (1 + meant.abs().max())).max() < 1e-12


@each_path
def test_v_is_the_derivative_of_x_t(path):
    x0, eps, t = pair()
    steps = 1000
    # Inside the intervals of the table, where its derivative exists.
    t = ((t * steps).floor() + 0.5 + 0.3 * torch.sin(torch.arange(len(t), dtype=F64))) / steps
    t.requires_grad_()
    x_t = path.noise(x0, t, eps)
    slopes = torch.stack([torch.autograd.grad(x_t[:, i].sum(), t, retain_graph=True)[0] for i in range(3)], 1)
    v = target("v", x0, eps, path.over(t.detach(), x0))
    assert torch.allclose(v, slopes, rtol=1e-10, atol=1e-10)
    h = 1e-5
    c, up, down = path.at(t.detach()), path.at(t.detach() + h), path.at(t.detach() - h)
    for f, df in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        difference = (getattr(up, f) - getattr(down, f)) / (2 * h)
        assert torch.allclose(getattr(c, df), difference, rtol=1e-6, atol=1e-8)


@each_path
def test_data_is_clean_at_0_and_noise_grows(path):
    t = torch.linspace(0, 1, 501, dtype=F64)
    c = path.at(t)
    assert c.alpha[0] == 1 and c.sigma[0] == 0
    ratio = c.sigma / c.alpha
    assert (ratio.diff() > 0).all()
    variance_preserving = isinstance(path, Cosine | Tabulated)
    assert not variance_preserving or torch.allclose(c.alpha**2 + c.sigma**2, torch.ones_like(t), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cosine_ends_at_exactly_no_data(dtype):
    c = Cosine().at(torch.ones(1, dtype=dtype))
    assert c.alpha == 0 and c.sigma == 1


@each_path
def test_time_inverts_the_noise_ratio(path):
    t = torch.linspace(0.001, 0.999, 997, dtype=F64)
    c = path.at(t)
    assert torch.allclose(path.time(c.sigma / c.alpha), t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tabulated_is_the_chain_of_diffusers(schedule):
    diffusers: Any = pytest.importorskip("diffusers")
    steps = 1000
    theirs = diffusers.DDPMScheduler(steps, beta_schedule=schedule, beta_start=8e-4, beta_end=0.015)
    path = Tabulated(schedule, steps, 8e-4, 0.015)
    k = torch.arange(steps)
    alpha_bar = path.at((k.double() + 1) / steps).alpha ** 2
    assert torch.allclose(alpha_bar.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)
    x0, eps, _ = pair(steps)
    x0, eps = x0.float(), eps.float()
    ours = path.noise(x0, (k.float() + 1) / steps, eps)
    assert torch.allclose(ours, theirs.add_noise(x0, eps, k), atol=1e-5)
    written_out = Tabulated(betas=tuple(theirs.betas.tolist())).at((k.double() + 1) / steps)
    assert torch.allclose(written_out.alpha**2, alpha_bar, atol=1e-6)


def test_tabulated_keeps_float64_between_its_discrete_times():
    path, t = Tabulated.ddpm(), torch.tensor([0.30051], dtype=F64)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    log = torch.log1p(-betas[:300]).sum() + 0.51 * torch.log1p(-betas[300])
    assert abs(float(path.at(t).alpha.log() * 2 - log)) < 1e-13


@each_path
def test_renoise_composes(path):
    x0, eps, _ = pair()
    s, t, u = (torch.full((len(x0),), v, dtype=F64) for v in (0.15, 0.4, 0.8))
    zero = torch.zeros_like(x0)

    def kernel(start, end):  # its mean's factor and its standard deviation, read off the function itself
        return path.renoise(torch.ones_like(x0), start, end, zero), path.renoise(zero, start, end, torch.ones_like(x0))

    (a1, b1), (a2, b2), (a, b) = kernel(s, t), kernel(t, u), kernel(s, u)
    assert torch.allclose(a1 * a2, a, rtol=1e-12)
    assert torch.allclose(((a2 * b1) ** 2 + b2**2).sqrt(), b, rtol=1e-12)
    # and from data it is the noising itself
    start = torch.zeros_like(s)
    assert torch.allclose(path.renoise(x0, start, u, eps), path.noise(x0, u, eps), rtol=1e-12)


@each_path
def test_a_time_per_frame_is_that_time_for_the_frame(path):
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(4, 5, 3, 2, generator=g, dtype=F64) for _ in range(2))  # [B, frames, C, N]
    t = 0.1 + 0.8 * torch.rand(4, 5, generator=g, dtype=F64)
    x_t = path.noise(x0, t, eps)
    c = path.over(t, x0)
    for f in range(5):
        alone = path.over(t[:, f], x0[:, f])
        assert torch.equal(x_t[:, f], path.noise(x0[:, f], t[:, f], eps[:, f]))
        for a, b in itertools.permutations(KINDS, 2):
            both = convert(eps, x_t, c, a, b)[:, f], convert(eps[:, f], x_t[:, f], alone, a, b)
            assert torch.equal(*both)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="velocity"):
        target("velocity", torch.ones(1, 1), torch.ones(1, 1), Linear().over(torch.ones(1) / 2, torch.ones(1, 1)))  # pyright: ignore


# Time laws

LAWS = [
    Uniform(), Uniform(0.2, 0.7), LogitNormal(), LogitNormal(-0.8, 1.6), LogNormal(Linear()), LogNormal(Cosine()),
    LogNormal(Tabulated.ddpm(), -1.2, 1.0), LogNormal(VE()), Shifted(Uniform(), 3.0), Shifted(LogitNormal(), 0.4),
    Restricted(LogitNormal(), 0.1, 0.6), Restricted(Shifted(Uniform(), 2.0), 0.0, 0.5),
    Restricted(LogNormal(Cosine()), 0.3, 1.0), Clocked(Uniform(0.02, 0.98), VE()),
    Shifted(Clocked(LogitNormal(), VE()), 2.0),
]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: str(law)[:60])


@each_law
def test_cdf_inverts_the_quantile(law):
    u = torch.linspace(0.001, 0.999, 999, dtype=F64)
    t = law.quantile(u)
    assert torch.allclose(law.cdf(t), u, atol=1e-10)
    assert (t.diff() > 0).all() and (t >= 0).all() and (t <= 1).all()


@each_law
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_law_is_finite_at_the_ends_of_uniform_draws(law, dtype):
    u = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    t = law.quantile(u)
    assert t.dtype == dtype and torch.isfinite(t).all() and (t >= 0).all() and (t <= 1).all()
    assert torch.isfinite(law.cdf(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))).all()


@each_law
def test_a_law_is_written_down_and_built_again(law):
    assert build(json.loads(json.dumps(describe(law)))) == law


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_noise_grows_on_a_ve_path_as_on_the_grid_of_karras(dtype):
    u, path = torch.linspace(0, 1, 101, dtype=dtype), VE(50.0)
    t = clock(path, u)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    assert torch.allclose(clock_at(path, t), u, atol=1e-4 if dtype == torch.float32 else 1e-12)
    ratios = karras_grid(path, 101, high=50.0).flip(0)[1:] * 50             # 0.002 to 50
    assert torch.allclose(t[1:].double() * 50, ratios[1:] - 0.002, rtol=1e-3)
    for other in (Linear(), Cosine(), Tabulated.ddpm()):
        assert clock(other, u) is u and clock_at(other, u) is u


def test_laws_by_name_are_kept_within_shares_of_the_way():
    u = torch.linspace(0.01, 0.99, 99, dtype=F64)
    for path in (Linear(), VE()):
        low, high = (float(clock(path, torch.tensor(share, dtype=F64))) for share in (0.2, 0.7))
        uniform, normal = (law_of(name, path, 1.0, 0.2, 0.7) for name in ("uniform", "logit-normal"))
        assert torch.allclose(uniform.quantile(u), clock(path, 0.2 + 0.5 * u))
        assert torch.allclose(normal.quantile(u), clock(path, Restricted(LogitNormal(), 0.2, 0.7).quantile(u)))
        assert torch.allclose(law_of("log-normal", path, 1.0, 0.2, 0.7).quantile(u),
                              Restricted(LogNormal(path), low, high).quantile(u))
        assert torch.allclose(law_of("uniform", path, 3.0).quantile(u), shift(clock(path, u), 3.0))


@pytest.mark.parametrize("law", [LogitNormal(-0.4, 1.2), LogNormal(Cosine()), Shifted(Uniform(), 3.0)], ids=str)
def test_restricted_has_the_conditional_law(law):
    low, high = 0.25, 0.6
    restricted = Restricted(law, low, high)
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=F64)
    t = restricted.quantile(u)
    assert (t >= low).all() and (t <= high).all()
    # P(T <= s | low <= T <= high) by counting draws of the law itself
    every = law.quantile(torch.linspace(0, 1, 2_000_001, dtype=F64)[1:-1])
    kept = every[(every >= low) & (every <= high)]
    for s in (0.3, 0.4, 0.5, 0.59):
        share = float((kept <= s).double().mean())
        assert abs(float((t <= s).double().mean()) - share) < 2e-3
        assert abs(float(restricted.cdf(torch.tensor([s], dtype=F64))) - share) < 1e-5


def test_restricted_is_fine_in_a_lower_tail_in_float32():
    t = Restricted(LogitNormal(), 0.0, 0.01).quantile(torch.linspace(0.01, 0.99, 99))
    exact = Restricted(LogitNormal(), 0.0, 0.01).quantile(torch.linspace(0.01, 0.99, 99, dtype=F64))
    assert torch.allclose(t.double(), exact, rtol=1e-3)


def test_moments_of_the_logit_normal_by_quadrature():
    law = LogitNormal(-0.6, 1.3)
    z = torch.linspace(-10, 10, 20_001, dtype=F64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    for power in (1, 2):
        moment = torch.trapezoid(torch.sigmoid(-0.6 + 1.3 * z) ** power * density, z)
        assert abs(float((law.quantile(u) ** power).mean() - moment)) < 1e-7
    # symmetric about 1/2 without a mean
    assert torch.allclose(LogitNormal().quantile(u) + LogitNormal().quantile(1 - u), torch.ones_like(u), atol=1e-12)


@each_path
def test_the_log_normal_law_is_normal_in_log_ratio(path):
    u = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    c = path.at(LogNormal(path, -1.0, 0.9).quantile(u))
    log = (c.sigma / c.alpha).log()
    assert abs(float(log.mean()) + 1.0) < 1e-4 and abs(float(log.std()) - 0.9) < 1e-3


def test_shifts_compose_by_multiplying():
    t = torch.linspace(0, 1, 101, dtype=F64)
    assert torch.allclose(shift(shift(t, 3.0), 0.7), shift(t, 2.1), atol=1e-14)
    assert torch.allclose(shift(shift(t, 2.5), 1 / 2.5), t, atol=1e-14)
    assert shift(t, 1.0).equal(t)
    for s in (0.1, 1.7, 6.93):  # both ends stay where they are, exactly
        assert shift(t, s)[0] == 0 and shift(t, s)[-1] == 1


def test_a_shift_multiplies_the_noise_ratio_of_the_linear_path():
    """Which is why s = sqrt(m/n) keeps the signal-to-noise of an average over m/n times as many elements."""
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    s = dimension_shift(16384, 4096)
    before, after = Linear().at(t), Linear().at(shift(t, s))
    assert s == 2 and torch.allclose(after.sigma / after.alpha, s * before.sigma / before.alpha, rtol=1e-12)
    assert math.isclose(dimension_shift(3072) * dimension_shift(4096, 3072), 1.0)


def test_the_uniform_grid():
    assert uniform_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    grid = uniform_grid(10, s=3.0)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all() and abs(float(grid[5]) - 0.75) < 1e-15


@each_path
def test_the_karras_grid(path):
    grid = karras_grid(path, 18)
    assert len(grid) == 19 and (grid.diff() < 0).all() and grid[-1] == 0
    c = path.at(grid[:-1])
    ratio = c.sigma / c.alpha
    assert math.isclose(float(ratio[0]), 80.0, rel_tol=1e-9) and math.isclose(float(ratio[-1]), 0.002, rel_tol=1e-9)
    root = ratio ** (1 / 7)
    assert torch.allclose(root.diff(), root.diff()[0].expand(17), rtol=1e-7)


def test_the_karras_grid_starts_where_a_quiet_path_ends():
    grid = karras_grid(Tabulated("scaled_linear", 1000, 0.00085, 0.012), 18)  # sigma/alpha ends at 14.6
    assert abs(float(grid[0]) - 1) < 1e-12 and (grid.diff() < 0).all()

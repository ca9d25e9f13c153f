"""Oracles of distances between sets of features: closed forms, brute force, invariances, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from stillroom.measure import (
    METRICS,
    Moments,
    Statistics,
    distance_between,
    energy_distance,
    held_modes,
    kid,
    median_bandwidth,
    mmd2,
    overlap,
    paired_error,
    panel,
    read_statistics,
    sliced_wasserstein,
)
from stillroom.measure import pairs as pairs_module
from stillroom.measure.coverage import radii_of
from stillroom.measure.distances import directions, w2_squared
from stillroom.measure.metrics import HIGHER_IS_BETTER, halves, is_few
from stillroom.measure.reference import INCEPTION, read_samples
from stillroom.settings import Refusal


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turn(dim, seed=9):
    return torch.linalg.qr(draw(dim, dim, seed=seed, dtype=torch.float64))[0]


# ---- KID ----


def test_kid_is_unbiased_and_has_the_closed_form_of_gaussians():
    """E (x.y / D + 1)^3 over independent pairs of normal vectors, by a quadrature that is exact for cubes."""
    d, n, repeats = 3, 60, 300
    pairs = [(draw(n, d, seed=2 * i), draw(n, d, seed=2 * i + 1)) for i in range(repeats)]
    same = torch.tensor([kid(x, y, subsets=4).mean for x, y in pairs])
    assert abs(float(same.mean())) < 4 * float(same.std()) / math.sqrt(repeats) and float(same.min()) < 0

    m = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)

    def moment(mu, nu):
        z, w = np.polynomial.hermite_e.hermegauss(4)
        w = w / w.sum()
        grids = np.meshgrid(*[z] * (2 * d), indexing="ij")
        weights = np.prod(np.meshgrid(*[w] * (2 * d), indexing="ij"), axis=0)
        s = sum((grids[i] + float(mu[i])) * (grids[d + i] + float(nu[i])) for i in range(d)) / d
        return float((weights * (s + 1) ** 3).sum())

    zero = torch.zeros(d, dtype=torch.float64)
    exact = moment(zero, zero) + moment(m, m) - 2 * moment(zero, m)
    apart = torch.tensor([kid(x, y + m.float(), subsets=4).mean for x, y in pairs])
    assert abs(float(apart.mean()) - exact) < 4 * float(apart.std()) / math.sqrt(repeats) and exact > 0.05


def test_kid_by_hand_turned_and_in_any_order():
    x, y = draw(40, 5), draw(40, 5, seed=1) + 0.3

    def k(a, b):
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    found = kid(x, y, subsets=3, size=20)
    assert found == kid(x, y, subsets=3, size=20) and found.std > 0
    q = turn(5).float()
    assert math.isclose(kid(x @ q, y @ q, subsets=3, size=20).mean, found.mean, rel_tol=1e-4)
    x, y = draw(2, 5), draw(2, 5, seed=1)
    one = kid(torch.cat([x, x]), torch.cat([y, y]), subsets=1, size=2, seed=3)     # two of each are looked at
    picks = [torch.randperm(4, generator=g)[:2] % 2 for g in [torch.Generator().manual_seed(3)] for _ in range(2)]
    a, b = x[picks[0]], y[picks[1]]
    by_hand = k(a[0], a[1]) + k(b[0], b[1]) - 0.5 * sum(k(p, q) for p in a for q in b)
    assert math.isclose(one.mean, by_hand, rel_tol=1e-5)


# ---- precision, recall, density, coverage ----


def brute(real, x, k):
    d = {(a, b): torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
         for a, b in ((real, real), (x, x), (x, real))}
    rr, xx, xr = d[real, real], d[x, x], d[x, real]
    ball, own = np.sort(rr, 1)[:, k], np.sort(xx, 1)[:, k]
    precision = np.mean([any(xr[i, j] <= ball[j] for j in range(len(real))) for i in range(len(x))])
    recall = np.mean([any(xr[i, j] <= own[i] for i in range(len(x))) for j in range(len(real))])
    density = sum(xr[i, j] <= ball[j] for i in range(len(x)) for j in range(len(real))) / (k * len(x))
    coverage = np.mean([any(xr[i, j] <= ball[j] for i in range(len(x))) for j in range(len(real))])
    return precision, recall, density, coverage


@pytest.mark.parametrize("entries", [2**24, 70])        # of a block: everything at once, or two rows
@pytest.mark.parametrize(("n", "m", "k"), [(30, 30, 5), (25, 40, 3), (40, 25, 1)])
def test_overlap_is_that_of_four_loops(monkeypatch, entries, n, m, k):
    monkeypatch.setattr(pairs_module, "ENTRIES", entries)
    real, x = draw(n, 3), 1.2 * draw(m, 3, seed=1) + 0.5
    assert overlap(real, x, k) == pytest.approx(brute(real, x, k))
    far = 1000 * torch.ones(3)      # about their own centre: nothing is lost
    assert overlap(real + far, x + far, k) == pytest.approx(brute(real, x, k), abs=0.02)


def test_overlap_of_equal_laws_has_its_expectations():
    """Naeem et al. 2020, section 3.2: density 1, and coverage 1 - (N-1)...(N-k) / ((N+M-1)...(N+M-k))."""
    n, k, repeats = 200, 5, 30
    found = [overlap(draw(n, 4, seed=2 * i), draw(n, 4, seed=2 * i + 1), k) for i in range(repeats)]
    exact = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    for values, expected in (([f.density for f in found], 1.0), ([f.coverage for f in found], exact)):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(repeats)
    assert abs(np.mean([f.precision - f.recall for f in found])) < 0.02      # they are each other's mirror image


def test_overlap_of_clusters_far_narrower_than_they_lie_apart():
    """In single precision their points would be equal."""
    means = 8 * torch.nn.functional.normalize(draw(10, 64), dim=1)
    real, x = (means[torch.arange(300) % 10] + 1e-3 * draw(300, 64, seed=seed) for seed in (1, 2))
    assert overlap(real, x) == pytest.approx(brute(real, x, 5))


def test_overlap_tells_a_lost_mode_from_a_bad_sample():
    modes = torch.tensor([[-10.0, 0.0], [10.0, 0.0]])
    real = modes[torch.arange(400) % 2] + draw(400, 2)
    half, stray = modes[:1] + draw(400, 2, seed=1), modes[torch.arange(400) % 2] + draw(400, 2, seed=2)
    stray[:200] = 100 + draw(200, 2, seed=3)
    lost, bad = overlap(real, half), overlap(real, stray)
    assert lost.precision > 0.95 and abs(lost.recall - 0.5) < 0.05 and abs(lost.coverage - 0.5) < 0.05
    assert abs(bad.precision - 0.5) < 0.05 and bad.recall > 0.9 and bad.coverage > 0.7


def test_balls_of_equal_points():
    """Rounding in the matrix product must not put a point outside of the ball that it is the centre of."""
    x = draw(50, 64) * 100
    twice = torch.cat([x, x, x])
    assert float(radii_of(twice, 2).max()) == 0
    same = overlap(twice, twice.flip(0), 2)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert overlap(torch.ones(8, 3), torch.ones(8, 3), 5)[:2] == (1, 1)
    assert overlap(torch.ones(8, 3), torch.zeros(8, 3), 5) == (0, 0, 0, 0)


# ---- sliced Wasserstein ----


@pytest.mark.parametrize(("n", "m"), [(7, 7), (4, 6), (5, 1), (3, 12)])
def test_on_a_line_it_is_the_best_assignment(n, m):
    """Both sets repeated to one size, assigned by scipy."""
    a, b = draw(n, 2, dtype=torch.float64), draw(m, 2, seed=1, dtype=torch.float64) + 1
    both = math.lcm(n, m)
    for k in range(2):
        cost = (a[:, k].repeat_interleave(both // n)[:, None] - b[:, k].repeat_interleave(both // m)).square().numpy()
        exact = cost[linear_sum_assignment(cost)].mean()
        assert math.isclose(float(w2_squared(a, b)[k]), exact, rel_tol=1e-12)


def test_sliced_wasserstein_of_gaussians():
    """W2^2 between N(0, 1) and N(m.u, s^2) is (m.u)^2 + (1 - s)^2; the mean of (m.u)^2 over the sphere is |m|^2 / D."""
    x, y = draw(6000, 4), 1.5 * draw(6000, 4, seed=1) + torch.tensor([1.0, 0, 0, 2.0])
    exact = math.sqrt(5 / 4 + 0.25)
    assert math.isclose(sliced_wasserstein(x, y, count=1000), exact, rel_tol=0.04)
    assert math.isclose(sliced_wasserstein(x, y[:2500], count=1000), exact, rel_tol=0.05)
    assert sliced_wasserstein(x, x.flip(0)) == 0 and sliced_wasserstein(x, torch.cat([x, x])) < 1e-7
    shift = torch.tensor([0.3, 0.4, 0, 0])      # a shift alone: the mean over just these directions, exactly
    by_hand = float((shift @ directions(4, 256)).square().mean().sqrt())
    assert math.isclose(sliced_wasserstein(x, x + shift), by_hand, rel_tol=1e-4)


# ---- what they have in common ----


def test_metrics_do_not_see_rotations_or_order():
    x, real = draw(300, 6), 1.3 * draw(400, 6, seed=1) + 0.2
    q, whole = turn(6).float(), panel(x, real)
    turned, flipped = panel(x @ q, real @ q), panel(x.flip(0), real.flip(0))
    for name in METRICS:
        if name != "sliced_w2":                                 # its directions are fixed
            assert math.isclose(turned[name], whole[name], rel_tol=1e-3, abs_tol=2e-5), name
        if name not in ("kid", *HIGHER_IS_BETTER):              # these look at subsets
            assert math.isclose(flipped[name], whole[name], rel_tol=1e-4, abs_tol=1e-6), name


def test_files_sorted_by_class_are_not_looked_at_by_their_first_classes():
    """Overlap takes 100 of each side: of both modes, although all of the first one come first."""
    modes = torch.tensor([[-10.0, 0.0], [10.0, 0.0]])[torch.arange(1000) // 500]
    found = panel(modes + draw(1000, 2), (modes + draw(1000, 2, seed=1))[::10])
    assert found["recall"] > 0.8 and found["coverage"] > 0.9


def test_every_metric_is_worse_for_worse_samples():
    real, fresh = draw(500, 8), draw(500, 8, seed=1)
    near, far = (panel(fresh + shift, real) for shift in (0.0, 1.0))
    for name in METRICS:
        assert (far[name] < near[name]) == (name in HIGHER_IS_BETTER), name
        assert math.isfinite(near[name])


def test_blocks_change_nothing(monkeypatch):
    x, y = draw(60, 5), draw(45, 5, seed=1)
    whole = energy_distance(x, y), mmd2(x, y, median_bandwidth(y)), radii_of(x, 3)
    monkeypatch.setattr(pairs_module, "ENTRIES", 100)
    for a, b in zip(whole, (energy_distance(x, y), mmd2(x, y, median_bandwidth(y)), radii_of(x, 3)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_all_equal_samples_are_measured_without_nan():
    one, other = torch.ones(20, 4), torch.zeros(20, 4)
    same, apart = panel(one, one), panel(one, other)
    assert all(math.isfinite(v) for v in (*same.values(), *apart.values()))
    assert max(abs(same[k]) for k in ("frechet", "kid", "sliced_w2", "energy", "mmd")) < 1e-12
    assert (apart["frechet"], apart["energy"], apart["mmd"]) == pytest.approx((4, 4, 2))


def test_fewer_samples_than_dimensions():
    """The distance of two small sets is that of the plane that they span."""
    x, y = draw(12, 5, dtype=torch.float64), draw(15, 5, seed=1, dtype=torch.float64) + 1
    wide = turn(400)[:5]
    exact = distance_between(Moments(5).add(x), Moments(5).add(y))
    assert math.isclose(distance_between(Moments(400).add(x @ wide), Moments(400).add(y @ wide)), exact, rel_tol=1e-9)
    assert is_few(12, 400) and not is_few(800, 400)


def test_the_parts_of_a_reference_are_disjoint():
    kept, aside = halves(100, 30)
    assert len(kept) == 70 and len(aside) == 30 and sorted([*kept.tolist(), *aside.tolist()]) == list(range(100))
    assert torch.equal(halves(100, 30)[1], aside) and len(halves(100, 80)[1]) == 50


# ---- modes, and pairs ----


def test_modes_that_are_held():
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([means[:1].expand(60, 2), means[1:2].expand(39, 2), torch.tensor([[0.0, 9.9]])])
    assert held_modes(x, means, 0.5) == (2, 1.0)        # one of a hundred is below a tenth of the third's share
    stray = torch.cat([x, torch.full((100, 2), 50.0)])
    assert held_modes(stray, means, 0.5) == (2, 0.5)
    assert held_modes(torch.full((5, 2), 50.0), means, 0.5) == (0, 0.0)


def test_a_paired_error_is_between_equal_and_unrelated():
    teacher, other = draw(4000, 3, 2), draw(4000, 3, 2, seed=1)
    assert paired_error(teacher, teacher) == (0, 0)
    unrelated = paired_error(other, teacher)
    assert unrelated.rms == pytest.approx(math.sqrt(2), rel=0.02) and unrelated.relative == pytest.approx(1, rel=0.02)
    near = paired_error(teacher + 0.1 * other, teacher)
    assert near.rms == pytest.approx(0.1, rel=0.02) and near.relative == pytest.approx(0.01 / 2.01, rel=0.03)


def test_pairs_that_are_not_finite_are_not_equal():
    x = draw(6, 2)
    for a, b in ((x, x / 0), (x * math.nan, x)):
        with pytest.raises(Refusal, match="NaN or infinity"):
            paired_error(a, b)


def test_kid_of_samples_that_have_run_away_is_a_number():
    """A diverged generator's: the cube of an inner product leaves single precision at features of about a million."""
    x, y = draw(40, 5), draw(40, 5, seed=1)
    far = kid(1e8 * x, y, subsets=2, size=20)
    exact = kid(1e8 * x.double(), y.double(), subsets=2, size=20)
    assert math.isfinite(far.mean) and math.isclose(far.mean, exact.mean, rel_tol=1e-6) and far.mean > 1e30


def test_a_class_in_common_is_no_trajectory_in_common():
    y = torch.arange(4000) % 2
    centres = 100.0 * y[:, None]
    x, teacher = draw(4000, 1) + centres, draw(4000, 1, seed=1) + centres
    assert paired_error(x, teacher).relative < 0.01             # looks like a good student
    assert paired_error(x, teacher, y).relative == pytest.approx(1, rel=0.1)


def test_an_item_alone_in_its_class_is_not_its_own_foreign_pair():
    teacher, other = draw(400, 3), draw(400, 3, seed=1)
    x, y = teacher + 0.1 * other, torch.arange(400)
    assert paired_error(x, teacher, y) == paired_error(x, teacher)          # no class has two: any other item
    half = y.clamp(max=200)                                                 # 200 classes of one, and one of 200
    assert paired_error(x, teacher, half).relative == paired_error(x[200:], teacher[200:]).relative
    assert paired_error(x, teacher, half).rms == paired_error(x, teacher).rms


# ---- files ----


def statistics(dim=6, name="latents", seed=0):
    return Statistics.of(Moments(dim).add(draw(50, dim, seed=seed)), name, reference="a test", crop="centre 8")


def test_statistics_come_back_as_they_were(tmp_path):
    mine = statistics()
    mine.save(tmp_path / "s.npz")
    back = read_statistics(tmp_path / "s.npz")
    assert (back.features, back.n, dict(back.how)) == ("latents", 50, {"reference": "a test", "crop": "centre 8"})
    assert torch.equal(back.mean, mine.mean) and torch.equal(back.cov, mine.cov) and back.distance(mine) < 1e-10
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_files_of_pytorch_fid_and_adm(tmp_path):
    """Both are of Inception's features, and say neither this nor of how many."""
    x, y = Moments(2048).add(draw(20, 2048)), Moments(2048).add(draw(30, 2048, seed=1))
    np.savez(tmp_path / "fid.npz", mu=x.mean.numpy(), sigma=x.cov.numpy())
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=y.mean.numpy().astype(np.float32),
             sigma=y.cov.numpy().astype(np.float32), mu_s=np.zeros(3), sigma_s=np.eye(3))
    a, b = read_statistics(tmp_path / "fid.npz"), read_statistics(tmp_path / "adm.npz")
    assert a.features == b.features == INCEPTION and a.n is None
    assert torch.equal(a.mean, x.mean) and torch.equal(a.cov, x.cov) and torch.equal(b.cov, y.cov.float().double())


def test_adms_pictures_and_our_arrays(tmp_path):
    bytes8 = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", bytes8, np.arange(5))
    adm = read_samples(tmp_path / "adm.npz")
    (first, rest) = adm.batches(3)
    x = torch.cat([first, rest])
    assert adm.shape == (3, 4, 6) and len(first) == 3
    assert np.array_equal(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), bytes8)
    card = {"encoding": None}
    np.savez(tmp_path / "ours.npz", x=draw(5, 4, 2, 2).numpy(), y=np.arange(5), card=np.array(json.dumps(card)))
    ours = read_samples(tmp_path / "ours.npz")
    assert torch.equal(next(ours.batches(9, torch.arange(4))), draw(5, 4, 2, 2)[:4])
    assert ours.y is not None and ours.card == card


def broken(**arrays):
    def write(file):
        np.savez(file, **arrays)
    return write


GOOD = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
ABOUT = {"stillroom": 1, "features": "f", "n": 3, "how": {}}


@pytest.mark.parametrize(("write", "line"), [
    (broken(mu=np.zeros(3)), "holds mu; statistics are mu and sigma"),
    (broken(mu=np.zeros(768), sigma=np.eye(768)), "not of Inception's last layer"),
    (broken(mu=np.zeros(2048), sigma=np.eye(4)), "a covariance of"),
    (broken(mu=GOOD["mu"] + np.nan, sigma=GOOD["sigma"]), "NaN or infinity"),
    (broken(mu=GOOD["mu"], sigma=np.triu(np.ones((2048, 2048)))), "not symmetric"),
    (broken(mu=np.array(["a"]), sigma=np.eye(1)), "not numbers"),
    (broken(mu=np.array([None]), sigma=np.eye(1)), "not readable"),         # an object array would have to be unpickled
    (broken(mu=np.zeros(2), sigma=np.eye(2), about=np.array("{")), "not statistics that this stillroom understands"),
    (broken(mu=np.zeros(2), sigma=np.eye(2), about=np.array(json.dumps({**ABOUT, "stillroom": 2}))), "format 2"),
    (broken(mu=np.zeros(2), sigma=np.eye(2), about=np.array(json.dumps({**ABOUT, "n": "x"}))), "understands"),
    (lambda file: file.write_bytes(b"PK\x03\x04 no"), "not a readable .npz"),
    (lambda file: file.write_bytes(b""), "not a readable .npz"),
    (lambda file: np.save(file.open("wb"), np.zeros(3)), "a single array"),
    (lambda file: None, "no such file"),
])
def test_files_that_are_no_statistics(tmp_path, write, line):
    write(tmp_path / "s.npz")
    with pytest.raises(Refusal, match=line) as told:
        read_statistics(tmp_path / "s.npz")
    assert "s.npz" in str(told.value)


@pytest.mark.parametrize(("write", "line"), [
    (broken(z=np.zeros(3)), "samples are x, or arr_0"),
    (broken(x=np.zeros((0, 3))), "samples are floats"),
    (broken(x=np.zeros((4, 3), int)), "samples are floats"),
    (broken(arr_0=np.zeros((4, 3), np.uint8)), "uint8"),
    (broken(arr_0=np.zeros((4, 3, 8, 8), np.uint8)), "channels come last"),
    (broken(arr_0=np.zeros((4, 8, 8, 4), np.uint8)), "such as alpha"),
    (broken(x=np.zeros((4, 3)), y=np.zeros(3)), "labels of shape"),
    (broken(x=np.zeros((4, 3)), card=np.array("{")), "not a record in JSON"),
])
def test_files_that_are_no_samples(tmp_path, write, line):
    write(tmp_path / "x.npz")
    with pytest.raises(Refusal, match=line):
        read_samples(tmp_path / "x.npz")


def test_other_feature_spaces_are_not_compared():
    with pytest.raises(Refusal, match="latents and in pixels cannot be compared"):
        statistics().distance(statistics(name="pixels"))
    with pytest.raises(Refusal, match="of 6 features and of 7"):
        statistics().distance(statistics(7))


@pytest.mark.parametrize(("call", "line"), [
    (lambda: kid(draw(3, 2), draw(9, 2)), "four samples"),
    (lambda: overlap(draw(5, 2), draw(9, 2), 5), "more than 5 points"),
    (lambda: energy_distance(draw(1, 2), draw(9, 2)), "two samples"),
    (lambda: median_bandwidth(draw(1, 2)), "two samples"),
    (lambda: paired_error(draw(3, 2), draw(3, 3)), "of one shape"),
    (lambda: panel(draw(9, 2), draw(90, 2)), "vectors of 10 or more"),
    (lambda: panel(draw(20, 2) / 0, draw(90, 2)), "NaN or infinity"),
    (lambda: panel(draw(20, 2), draw(90, 3)), "another feature space"),
])
def test_sets_that_cannot_be_compared(call, line):
    with pytest.raises(Refusal, match=line):
        call()

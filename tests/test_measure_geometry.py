"""Geometry of clouds: closed forms of Gaussians and mixtures, U-statistics by brute force, invariances, bad input."""

import itertools
import math

import pytest
import torch

from stillroom.flows import Mixture
from stillroom.match.drift import temperature_for
from stillroom.measure import Cloud, cloud_of, participation_ratio, portrait, spectrum
from stillroom.measure.geometry import (
    classes,
    concentration,
    equivalent_time,
    predicted_share,
    residual,
    scatter,
    seen,
    temperature_at,
    two_nn,
    unbiased,
    vectors,
)
from stillroom.measure.groups import Grouping, between_of, by_clusters, by_labels, kappa, kmeans, reading
from stillroom.measure.portrait import Abstains
from stillroom.settings import Refusal


def normal(n: int, d: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(n: int, values: list[float], seed: int = 0) -> torch.Tensor:
    return normal(n, len(values), seed) * torch.tensor(values).sqrt()


def test_both_traces_are_the_u_statistics():
    """Over all quadruples of different samples: E (x1-x2).(x3-x4) squared is 4 tr S^2, and so on."""
    x = gaussian(7, [1.0, 4.0, 9.0]).double()
    i, j, k, m = torch.tensor(list(itertools.permutations(range(7), 4))).T
    square = ((x[i] - x[j]) * (x[k] - x[m])).sum(1).square().mean() / 4
    total = ((x[i] - x[j]).square().sum(1) * (x[k] - x[m]).square().sum(1)).mean() / 4
    s, q = x.T.cov(), (x - x.mean(0)).square().sum(1).square().sum() / 6
    first, second = unbiased(torch.tensor(7.0).double(), s.trace(), (s @ s).trace(), q)
    assert float(first) == pytest.approx(float(total), rel=1e-12)
    assert float(second) == pytest.approx(float(square), rel=1e-12)


def test_the_participation_ratio_is_right_where_the_plain_one_counts_samples():
    found = spectrum(Cloud(normal(100, 400)))
    assert found.plain < 82                                             # about n d / (n + d)
    assert found.participation == pytest.approx(400, rel=0.1)
    values = [1 / i for i in range(1, 201)]
    true = sum(values) ** 2 / sum(v * v for v in values)                # 21.2
    drawn = [spectrum(Cloud(gaussian(60, values, seed))) for seed in range(20)]
    assert sum(f.participation for f in drawn) / 20 == pytest.approx(true, rel=0.08)
    assert sum(f.plain for f in drawn) / 20 < 0.85 * true
    assert participation_ratio(normal(3, 5)) <= 2                       # too few for the corrected one


def test_a_wide_cloud_and_a_tall_one_say_the_same():
    """d > n goes through inner products, d <= n through the covariance: zeros in more dimensions change nothing."""
    x, y = normal(40, 30).double() * torch.linspace(0.1, 2, 30).double(), torch.arange(40) % 3
    wide = torch.cat([x, torch.zeros(40, 30)], 1)
    for scope in ("global", "within class"):
        a, b = spectrum(Cloud(x, y), scope), spectrum(Cloud(wide, y), scope)
        assert (a.participation, a.plain, a.effective_rank) == pytest.approx((b.participation, b.plain,
                                                                              b.effective_rank), rel=1e-9)
        assert torch.allclose(a.values, b.values[:30], atol=1e-10)
        assert (a.floored, b.floored) == (0, 30) and a.taken.d == 30 and b.taken.d == 60


def test_spectrum_of_a_known_gaussian():
    found = spectrum(Cloud(gaussian(40_000, [8.0, 4.0, 2.0, 2.0])))
    share = torch.tensor([8.0, 4.0, 2.0, 2.0]) / 16
    assert found.participation == pytest.approx(256 / 88, rel=0.02)
    assert found.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()), rel=0.02)
    assert found.condition == pytest.approx(4, rel=0.05)
    assert found.top == pytest.approx({1: 0.5}, rel=0.02)


def test_within_a_class_the_means_do_not_count():
    y = torch.arange(400) % 4
    x = gaussian(400, [1.0] * 10) + 20 * normal(4, 10, 1)[y]
    inside, outside = spectrum(Cloud(x, y), "within class"), spectrum(Cloud(x, y))
    assert outside.participation < 3 and inside.participation == pytest.approx(10, rel=0.05)
    assert inside.taken.scope == "within class"
    same = spectrum(Cloud(residual(x.double(), y), y), "within class")
    assert same.participation == pytest.approx(inside.participation, rel=1e-6)


@pytest.mark.parametrize("change", ["shift", "scale", "rotate", "order"])
def test_statistics_do_not_depend_on_the_frame(change):
    x, y = gaussian(200, [4.0, 1.0, 1.0, 0.2, 0.1], 3).double(), torch.arange(200) % 3
    q = torch.linalg.qr(normal(5, 5, 9, torch.float64))[0]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)) if change == "order" else torch.arange(200)
    other = {"shift": x + 50, "scale": 7 * x, "rotate": x @ q, "order": x[order]}[change]
    a, b = Cloud(x, y), Cloud(other, y[order])
    for scope in ("global", "within class"):
        assert spectrum(a, scope).participation == pytest.approx(spectrum(b, scope).participation, rel=1e-6)
        assert concentration(a, scope).variation == pytest.approx(concentration(b, scope).variation, rel=1e-6)
    assert two_nn(a).dimension == pytest.approx(two_nn(b).dimension, rel=1e-6)
    assert classes(a)[2:] == pytest.approx(classes(b)[2:], rel=1e-6)


def test_two_nn_finds_the_dimension_below_the_coordinates():
    flat = normal(2000, 3) @ normal(3, 40, 1)
    found = two_nn(Cloud(flat))
    assert abs(found.dimension - 3) < 4 * found.error < 0.5
    doubled = two_nn(Cloud(torch.cat([flat, flat[:150]])))
    assert doubled.duplicates == 150
    assert doubled.dimension == pytest.approx(found.dimension, rel=1e-3)
    with pytest.raises(Refusal, match="lattice"):
        two_nn(Cloud(torch.randint(0, 60, (500, 2), generator=torch.Generator().manual_seed(0)).float()))


def test_the_error_of_two_nn_is_that_of_drawing_other_samples():
    found = [two_nn(Cloud(normal(100, 2, seed))) for seed in range(300)]
    deviation = torch.tensor([f.dimension for f in found]).std()
    assert float(deviation) == pytest.approx(sum(f.error for f in found) / 300, rel=0.12)


def test_the_classes_of_one_gaussian_are_not_apart():
    """tr S_b of sample means is K / n tr S_w even where the classes are one: without bias it is 0 on average."""
    y, ratios, plain = torch.arange(60) % 6, [], []
    for seed in range(30):
        x = normal(60, 50, seed)
        between, within = scatter(Cloud(x), y)
        ratios.append(between / within)
        plain.append(float(between_of(x, y) / residual(x, y).square().sum()))
    assert sum(plain) / 30 > 0.08 and sum(ratios) / 30 < 0.01


def test_fisher_and_eta_of_known_classes():
    y = torch.arange(3000) % 3
    means = 2.0 * torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    found = classes(Cloud(normal(3000, 4) + means[y], y))
    true = 8 / 3 / 4                                                    # mean squared distance to the centre over 4
    assert found.fisher == pytest.approx(true, rel=0.06)
    assert found.eta == pytest.approx(true / (1 + true), rel=0.05)
    assert found.chance == pytest.approx(1 / 3, rel=0.01) and 0.5 < found.purity < 0.9
    far = classes(Cloud(normal(300, 4) + 1000 * means[y[:300]], y[:300]))
    assert far.purity == 1 and far.eta == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("d", [8, 32, 128])
def test_distances_concentrate_as_the_participation_ratio_says(d):
    assert concentration(Cloud(normal(1000, d))).variation == pytest.approx(1 / math.sqrt(2 * d), rel=0.06)


def test_what_a_kernel_sees():
    cloud = Cloud(normal(1000, 256))
    found = seen(cloud, "global", 256, 64, (0.001, 0.05, 0.2, 100.0))
    assert found.measured[0] < 1.5 / 64 and found.measured[-1] == pytest.approx(1, abs=1e-4)
    assert found.measured[2] == pytest.approx(found.predicted[2], abs=0.03)         # the notes: .955 and .952
    assert list(found.measured) == sorted(found.measured) and min(found.predicted) == 1 / 64
    chosen = temperature_for(256, 64, 32)
    assert predicted_share(256, chosen) == pytest.approx(0.5, rel=1e-12)
    assert temperature_at(found._replace(temperatures=(1.0, 4.0), measured=(0.2, 0.6)), 0.4) == pytest.approx(2)
    tight = normal(120, 8) * torch.where(torch.arange(120) < 22, 0.02, 1.0)[:, None]      # the largest of six classes
    labels = torch.cat([torch.zeros(22), 1 + torch.arange(98) % 5]).long()
    alone = seen(Cloud(tight[22:], labels[22:]), "within class", 8, 64, (0.1,))
    with_it = seen(Cloud(tight, labels), "within class", 8, 64, (0.1,))
    assert alone.particles == with_it.particles == 19 and abs(alone.measured[0] - with_it.measured[0]) < 0.2
    few = seen(Cloud(normal(60, 8), torch.arange(60) % 10), "within class", 8, 64, (0.1,))
    assert few.particles == 5                                           # a class has six samples


def test_the_equivalent_noise_of_the_notes():
    for pr, ratios in {8: (0.57, 0.92, 1.96), 64: (1.6, 2.6, 5.5), 768: (5.6, 9.0, 19)}.items():
        for r, s in zip((0.02, 0.05, 0.2), ratios, strict=True):
            found = equivalent_time(pr, r)
            assert found.ratio == pytest.approx(s, rel=0.02) and found.time == pytest.approx(s / (1 + s), rel=0.01)


def ring(noise: int, spread: float, std: float = 0.15, n: int = 1200) -> Cloud:
    """Eight modes of unit variance per coordinate among nuisance dimensions."""
    x, _ = Mixture.ring(8, math.sqrt(2 * (1 - std**2)), std).draw(n, torch.Generator().manual_seed(0))
    y = ((torch.atan2(x[:, 1], x[:, 0]) * 4 / math.pi).round() % 8).long()
    return Cloud(torch.cat([x, spread * normal(n, noise, 5)], 1), y)


@pytest.mark.parametrize(("noise", "spread", "index"), [(0, 0.0, 24.5), (126, 0.3, 3.7), (126, 1.0, 0.39)])
def test_kappa_of_the_pilots_rings(noise, spread, index):
    found = by_labels(ring(noise, spread))
    eta = 2 * (1 - 0.15**2) / (2 + noise * spread**2)
    assert found.eta == pytest.approx(eta, rel=0.06, abs=0.003)
    assert kappa(found.eta, 0.02) == pytest.approx(index, rel=0.12)
    assert reading(found, 0.02) == ("works" if index > 3 else "fails")


def test_clusters_are_found_where_there_are_some_and_not_in_a_gaussian():
    blobs = normal(300, 6) + 8 * normal(4, 6, 1)[torch.arange(300) % 4]
    found = by_clusters(Cloud(blobs))
    assert found.real and found.count == (4, 4) and found.eta > 0.9 > (found.null or 1)
    plain = by_clusters(Cloud(gaussian(300, [5.0, 2.0, 1.0, 0.5, 0.5, 0.1])))
    assert plain.eta > 0.3 and plain.eta == pytest.approx(plain.null, abs=0.1)      # k-means always finds something
    assert not plain.real and reading(plain, 0.02) == "abstains"
    y = torch.arange(300) % 2
    split = normal(300, 6) + 8 * y[:, None] + 8 * normal(2, 6, 1)[torch.arange(300) // 2 % 2]
    inside = by_clusters(Cloud(split, y), "within class")
    assert inside.real and inside.count == (2, 2) and inside.taken.scope == "within class"


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_a_cube_has_no_clusters_and_the_pilots_ring_has(dims):
    cube = by_clusters(Cloud(torch.rand(400, dims, generator=torch.Generator().manual_seed(dims))))
    assert not cube.real and cube.eta > 0.5
    hidden = by_clusters(ring(30, 0.3))
    assert hidden.real and hidden.eta < 0.5


def test_kmeans_is_a_function_of_its_seed_and_numbers_its_groups():
    x = normal(80, 3).double()
    a, b = (kmeans(x, 5, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(a, b) and a.unique().tolist() == list(range(int(a.max()) + 1))
    centres = torch.stack([x[a == k].mean(0) for k in range(5)])
    assert torch.equal(torch.cdist(x, centres).argmin(1), a)            # Lloyd's fixed point
    assert len(kmeans(torch.ones(10, 2).double(), 3, torch.Generator().manual_seed(0))) == 10


def test_a_grouping_says_what_kmeans_finds_in_nothing():
    taken = Cloud(normal(5, 2)).taken("global")
    assert Grouping(taken, "labels", (2, 2), 0.01, None, None).real
    assert not Grouping(taken, "clusters", (2, 2), 0.31, 0.30, 0.001).real
    assert Grouping(taken, "clusters", (2, 2), 0.40, 0.30, 0.001).real
    assert not Grouping(taken, "clusters", (2, 2), 0.40, 0.30, 0.05).real


def test_vectors_of_tokens_maps_and_elements():
    x = torch.arange(2 * 3 * 2 * 2).float().view(2, 3, 2, 2)
    assert torch.equal(vectors(x, "token")[:4], x[0].flatten(1).T)
    assert torch.equal(vectors(x, "token"), vectors(x.flatten(2).transpose(1, 2), "token"))
    assert torch.equal(vectors(x, "pooled"), x.mean((2, 3)))
    assert torch.equal(vectors(x, "element"), x.flatten(1))
    y = torch.tensor([5, 7])
    found = cloud_of(x, y, "token", "before", 100)
    assert found.labels is not None and found.labels.tolist() == [5] * 4 + [7] * 4
    assert len(cloud_of(x, y, "token", "before", 3).x) == 3
    assert spectrum(found).taken == ("token", "global", "before", 8, 3)


def test_bad_clouds_are_one_line():
    with pytest.raises(Refusal, match="all samples are equal"):
        spectrum(Cloud(torch.full((20, 3), 7.3)))
    with pytest.raises(Refusal, match="all samples are equal"):
        spectrum(Cloud(torch.full((20, 30), 1e8) + 1e-2 * normal(20, 30)))          # rounding is no variance
    with pytest.raises(Refusal, match="NaN"):
        Cloud(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(Refusal, match="2 samples"):
        spectrum(Cloud(normal(2, 3)))
    with pytest.raises(Refusal, match="one class"):
        classes(Cloud(normal(20, 3), torch.zeros(20).long()))
    with pytest.raises(Refusal, match="every class has one sample"):
        classes(Cloud(normal(20, 3), torch.arange(20)))
    with pytest.raises(Refusal, match="more than 0 and fewer"):
        temperature_for(10, 64, 64)


def test_a_portrait_abstains_in_words():
    found = portrait(Cloud(normal(60, 4)))
    assert found.classes == Abstains("there are no labels") and found.groupings["labels"] == found.classes
    assert found.spectra["within class"] == found.classes and not isinstance(found.spectra["global"], Abstains)
    single = portrait(Cloud(normal(60, 4), torch.full((60,), 3)))
    assert single.classes == Abstains("all samples are of one class")
    tiny = portrait(Cloud(normal(60, 4), torch.arange(60) // 4))
    inner = tiny.groupings["clusters within class"]
    assert isinstance(inner, Abstains) and "fewer than 24" in inner.why
    collapsed = portrait(Cloud(normal(3, 4)[torch.arange(60) % 3], torch.arange(60) % 3))
    assert collapsed.spectra["within class"] == Abstains("all samples of a class are equal")

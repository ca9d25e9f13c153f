"""Oracles of the Fréchet distance (closed forms), of running moments, and of the Inception network under it."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch.nn import functional

from stillroom.measure.frechet import Moments, distance_between, frechet_distance, moments_of
from stillroom.measure.inception import FidInception, MixedA, MixedB, MixedC, MixedD, MixedE, average, maximum
from stillroom.settings import Refusal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim, seed):
    a = draw(dim, 2 * dim, seed=seed)
    return a @ a.T / (2 * dim)


def test_commuting_gaussians_are_apart_by_their_deviations():
    a, b, gap = draw(20).square() + 0.1, draw(20, seed=1).square() + 0.1, draw(20, seed=2)
    exact = float(gap.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    turn, _ = torch.linalg.qr(draw(20, 20, seed=3))
    for q in (torch.eye(20, dtype=torch.float64), turn):        # a common rotation changes nothing
        found = frechet_distance(q @ gap, q @ a.diag() @ q.T, torch.zeros(20), q @ b.diag() @ q.T)
        assert math.isclose(found, exact, rel_tol=1e-10)


def test_general_gaussians_agree_with_a_matrix_root():
    s, t, mu = covariance(30, 0), covariance(30, 1), draw(30)
    root = linalg.sqrtm((s @ t).numpy()).real
    exact = float(mu.square().sum() + s.trace() + t.trace()) - 2 * np.trace(root)
    assert math.isclose(frechet_distance(mu, s, 0 * mu, t), exact, rel_tol=1e-9)
    assert math.isclose(frechet_distance(0 * mu, t, mu, s), exact, rel_tol=1e-9)
    assert math.isclose(frechet_distance(3 * mu, 9 * s, 0 * mu, 9 * t), 9 * exact, rel_tol=1e-9)


@pytest.mark.parametrize("count", [200, 12, 2])     # of 64 features: more, fewer, next to none
def test_equal_sets_are_at_zero(count):
    x = 3 * draw(count, 64) + 5
    moments = Moments(64).add(x)
    assert distance_between(moments, moments) < 1e-8
    turned = Moments(64).add(x.flip(0))
    assert distance_between(moments, turned) < 1e-8


def test_fewer_pictures_than_features():
    """Through the small Gram matrix instead: the roots are the singular values of X Y^T / sqrt((n - 1) (m - 1))."""
    x, y = draw(9, 80), 1.5 * draw(14, 80, seed=1) + 0.2
    u, v = x - x.mean(0), y - y.mean(0)
    common = np.linalg.svd((u @ v.T).numpy() / math.sqrt(8 * 13), compute_uv=False).sum()
    exact = float((x.mean(0) - y.mean(0)).square().sum() + u.square().sum() / 8 + v.square().sum() / 13) - 2 * common
    assert math.isclose(distance_between(Moments(80).add(x), Moments(80).add(y)), exact, rel_tol=1e-10)


def test_gaussians_without_common_directions():
    a, b = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    a[:4], b[6:] = 2.0, 5.0
    zero = torch.zeros(10)
    assert math.isclose(frechet_distance(zero, a.diag(), zero, b.diag()), 4 * 2 + 4 * 5, rel_tol=1e-12)
    assert math.isclose(frechet_distance(zero, a.diag(), zero, 0 * a.diag()), 8, rel_tol=1e-12)     # against a point
    assert frechet_distance(zero, 0 * a.diag(), zero, 0 * a.diag()) == 0


def test_moments_do_not_depend_on_batches():
    x = (draw(57, 6) * torch.arange(1, 7) + 1e5).float()
    whole = Moments(6).add(x)
    assert np.allclose(whole.cov.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)
    assert torch.allclose(whole.mean, x.double().mean(0), rtol=1e-12)
    pieces = Moments(6)
    for batch in x.split([1, 20, 0, 5, 31]):
        pieces.add(batch)
    assert pieces.count == 57
    assert torch.allclose(pieces.cov, whole.cov, rtol=1e-9) and torch.allclose(pieces.mean, whole.mean, rtol=1e-12)


def test_the_distance_of_known_features():
    """Mean colours as features: two sets apart by a constant are apart by its square, and spread by its share."""
    def colours(x):
        return x.mean((2, 3))

    def apart(some, others):
        return distance_between(moments_of(colours, some), moments_of(colours, others))

    levels = torch.randint(60, 140, (40, 3, 1, 1), generator=torch.Generator().manual_seed(0)).float()
    a = (levels / 127.5 - 1).expand(-1, -1, 4, 4)
    b = a + 20 / 127.5
    exact = 3 * (20 / 127.5) ** 2
    assert math.isclose(apart(a.split(7), b.split(40)), exact, rel_tol=1e-5)
    assert apart(a.split(7), (a + 0.4 / 127.5).split(9)) < 1e-10       # the same pictures in 8 bits
    assert moments_of(colours, a.split(7)).count == 40


def test_what_has_no_moments_is_refused():
    with pytest.raises(Refusal, match="two pictures"):
        _ = Moments(3).add(draw(1, 3)).cov
    with pytest.raises(Refusal, match=r"\[N, 3\]"):
        Moments(3).add(draw(5, 4))
    with pytest.raises(Refusal, match="not finite"):
        Moments(3).add(draw(5, 3) / 0)
    with pytest.raises(Refusal, match="no pictures"):
        moments_of(lambda x: x.mean((2, 3)), [])


# --- the network of FID


def weights_of(module, seed=0):
    """Random weights under the module's names; variances and scales stay positive, energy about constant."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, x in module.state_dict().items():
        if x.ndim > 1:
            weights[name] = torch.randn(x.shape, generator=g) * (2 / x[0].numel()) ** 0.5
        elif x.is_floating_point():
            weights[name] = torch.rand(x.shape, generator=g) + (0.5 if name.endswith(("var", "bn.weight")) else -0.5)
        else:
            weights[name] = x
    return weights


def unit(weights, name, x, padding, stride=1):
    """Convolution, normalisation with eps 1e-3, rectifier: by the weights' public names."""
    w = {k.removeprefix(f"{name}."): v.double() for k, v in weights.items() if k.startswith(f"{name}.")}
    x = functional.conv2d(x, w["conv.weight"], padding=padding, stride=stride)
    mean, var, scale, bias = (w[f"bn.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
    return ((x - mean) / (var + 1e-3).sqrt() * scale + bias).clamp(min=0)


def mean_of_neighbours(x):
    """3 x 3, over those inside the map."""
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    box = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    sums = functional.conv2d(x.flatten(0, 1)[:, None], box, padding=1).view(x.shape)
    return sums / functional.conv2d(ones, box, padding=1)


def largest_of_neighbours(x):
    return functional.pad(x, (1, 1, 1, 1), value=-math.inf).unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))


def chain(weights, x, *names):
    for name, *geometry in names:
        x = unit(weights, name, x, *geometry)
    return x


def block_a(w, x):
    return [chain(w, x, ("branch1x1", 0)), chain(w, x, ("branch5x5_1", 0), ("branch5x5_2", 2)),
            chain(w, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)),
            chain(w, mean_of_neighbours(x), ("branch_pool", 0))]


def largest_of_every_second(x):
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def block_b(w, x):
    return [chain(w, x, ("branch3x3", 0, 2)),
            chain(w, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 0, 2)),
            largest_of_every_second(x)]


def block_d(w, x):
    return [chain(w, x, ("branch3x3_1", 0), ("branch3x3_2", 0, 2)),
            chain(w, x, ("branch7x7x3_1", 0), ("branch7x7x3_2", (0, 3)), ("branch7x7x3_3", (3, 0)),
                  ("branch7x7x3_4", 0, 2)),
            largest_of_every_second(x)]


def block_c(w, x):
    row, column = (0, 3), (3, 0)
    return [chain(w, x, ("branch1x1", 0)),
            chain(w, x, ("branch7x7_1", 0), ("branch7x7_2", row), ("branch7x7_3", column)),
            chain(w, x, ("branch7x7dbl_1", 0), ("branch7x7dbl_2", column), ("branch7x7dbl_3", row),
                  ("branch7x7dbl_4", column), ("branch7x7dbl_5", row)),
            chain(w, mean_of_neighbours(x), ("branch_pool", 0))]


def block_e(w, x, pool):
    row, column = (0, 1), (1, 0)
    once, twice = chain(w, x, ("branch3x3_1", 0)), chain(w, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
    return [chain(w, x, ("branch1x1", 0)),
            chain(w, once, ("branch3x3_2a", row)), chain(w, once, ("branch3x3_2b", column)),
            chain(w, twice, ("branch3x3dbl_3a", row)), chain(w, twice, ("branch3x3dbl_3b", column)),
            chain(w, pool(x), ("branch_pool", 0))]


BLOCKS = {
    "A": (lambda: MixedA(192, 32), 192, block_a),
    "B": (lambda: MixedB(288), 288, block_b),
    "C": (lambda: MixedC(768, 128), 768, block_c),
    "D": (lambda: MixedD(768), 768, block_d),
    "E with averages": (lambda: MixedE(1280, average), 1280, lambda w, x: block_e(w, x, mean_of_neighbours)),
    "E with a maximum": (lambda: MixedE(2048, maximum), 2048, lambda w, x: block_e(w, x, largest_of_neighbours)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_inception_blocks_are_their_formulas(name):
    build, channels, formula = BLOCKS[name]
    block = build().eval()
    weights = weights_of(block)
    block.load_state_dict(weights)
    x = draw(1, channels, 5, 6)
    with torch.no_grad():
        assert torch.allclose(block(x.float()).double(), torch.cat(formula(weights, x), 1), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights_of(FidInception()), file)
    return file, FidInception.from_file(file)


def test_inception_has_the_public_size_and_names(inception):
    _, net = inception
    # The public network of 27,161,264 without its auxiliary head, and with 1008 logits in the place of 1000.
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000
    assert sum(p.numel() for p in net.parameters()) == 27_161_264 - auxiliary + 8 * 2049 == 23_850_960
    names = net.state_dict()
    assert len(names) == 94 * 6 + 2     # 94 convolutions, each with a normalisation of five tensors; one linear layer
    shapes = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,), "fc.bias": (1008,),
              "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1), "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
              "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7), "fc.weight": (1008, 2048),
              "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
              "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "Mixed_7b.branch1x1.bn.num_batches_tracked": ()}
    assert {k: tuple(names[k].shape) for k in shapes} == shapes
    assert net.Mixed_7b.pool is average and net.Mixed_7c.pool is maximum


@torch.no_grad()
def test_inception_answers_2048_features_per_picture(inception):
    _, net = inception
    seen = {}
    hooks = [getattr(net, k).register_forward_hook(lambda _m, _i, o, k=k: seen.update({k: tuple(o.shape[1:])}))
             for k in ("Conv2d_2b_3x3", "Mixed_5b", "Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7a", "Mixed_7c")]
    x = torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = net(x)
    for hook in hooks:
        hook.remove()
    assert seen == {"Conv2d_2b_3x3": (64, 147, 147), "Mixed_5b": (256, 35, 35), "Mixed_5d": (288, 35, 35),
                    "Mixed_6a": (768, 17, 17), "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8),
                    "Mixed_7c": (2048, 8, 8)}
    assert features.shape == (2, 2048) and bool(features.isfinite().all())
    assert float((features[0] - features[1]).norm() / features[0].norm()) > 1e-3        # they tell pictures apart
    large = functional.interpolate(x[:1], (299, 299), mode="bilinear", align_corners=False)    # as the reference does
    assert torch.allclose(net(large), features[:1], rtol=1e-3, atol=1e-4)
    assert torch.allclose(net.logits(x[:1]), features[:1] @ net.fc.weight.T + net.fc.bias, rtol=1e-3, atol=1e-3)


def test_inception_refuses_other_files(inception, tmp_path):
    file, net = inception
    weights = torch.load(file, weights_only=True)
    del weights["Mixed_7c.branch_pool.bn.running_var"]
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(Refusal, match=r"1 missing .Mixed_7c\.branch_pool\.bn\.running_var"):
        FidInception.from_file(tmp_path / "other.pth")
    with pytest.raises(Refusal, match="3, H, W"):
        net(torch.zeros(1, 1, 32, 32))

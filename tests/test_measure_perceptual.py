"""Oracles of LPIPS: its formula and the backbones in numpy and float64, from files laid out as the public ones."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stillroom.measure.perceptual import BACKBONES, Lpips, RandomFeatures, feature_distance_of, lpips_in, pooled
from stillroom.settings import Refusal

NETS = ["alex", "vgg", "squeeze"]
each_net = pytest.mark.parametrize("net", NETS)


# The public layouts, once more and otherwise: (number, kind, arguments); taps are the numbers that LPIPS looks at.
def _plan(net):
    if net == "alex":
        conv = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1),
                10: (256, 256, 3, 1, 1)}
        return conv, {}, {2: (3, False), 5: (3, False)}, [1, 4, 7, 9, 11]
    if net == "vgg":
        widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512,
                  28: 512}
        before = dict(zip(widths, [3, *widths.values()], strict=False))
        conv = {n: (before[n], w, 3, 1, 1) for n, w in widths.items()}
        return conv, {}, dict.fromkeys((4, 9, 16, 23), (2, False)), [3, 8, 15, 22, 29]
    fire = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128), 9: (256, 48, 192),
            10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
    return {0: (3, 64, 3, 2, 0)}, fire, dict.fromkeys((2, 5, 8), (3, True)), [1, 4, 7, 9, 10, 11, 12]


CLASSIFIER = {"alex": (1, 4, 6), "vgg": (0, 3, 6), "squeeze": (1,)}


def backbone_weights(net):
    g = torch.Generator().manual_seed(1)
    conv, fire, _, _ = _plan(net)
    weights = {}

    def layer(name, before, width, kernel):
        scale = (2 / (before * kernel**2)) ** 0.5
        weights[f"{name}.weight"] = scale * torch.randn(width, before, kernel, kernel, generator=g)
        weights[f"{name}.bias"] = 0.1 * torch.randn(width, generator=g)

    for n, (before, width, kernel, *_) in conv.items():
        layer(f"features.{n}", before, width, kernel)
    for n, (before, squeezed, expanded) in fire.items():
        layer(f"features.{n}.squeeze", before, squeezed, 1)
        layer(f"features.{n}.expand1x1", squeezed, expanded, 1)
        layer(f"features.{n}.expand3x3", squeezed, expanded, 3)
    beside = {f"classifier.{n}.{kind}": torch.zeros(2) for n in CLASSIFIER[net] for kind in ("weight", "bias")}
    return weights | beside


def head_weights(net):
    g = torch.Generator().manual_seed(2)
    widths = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512],
              "squeeze": [64, 128, 256, 384, 384, 512, 512]}[net]
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=g) for k, c in enumerate(widths)}


def conv2d(x, w, b, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.moveaxis(np.tensordot(patches, w, axes=([1, 4, 5], [1, 2, 3])), -1, 1) + b[:, None, None]


def max_pool(x, kernel, ceil):
    if ceil:        # one column or row more where the last window would begin inside
        more = [(-(n - kernel)) % 2 if n >= kernel else kernel - n for n in x.shape[2:]]
        x = np.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))[:, :, ::2, ::2].max((4, 5))


def maps_in_float64(net, weights, x):
    conv, fire, pool, taps = _plan(net)
    w = {k: v.double().numpy() for k, v in weights.items()}
    maps = []
    for n in range(max(taps) + 1):
        name = f"features.{n}"
        if n in conv:
            x = conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], *conv[n][3:])
        elif n in pool:
            x = max_pool(x, *pool[n])
        elif n in fire:
            s = np.maximum(conv2d(x, w[f"{name}.squeeze.weight"], w[f"{name}.squeeze.bias"]), 0)
            x = np.concatenate([conv2d(s, w[f"{name}.expand1x1.weight"], w[f"{name}.expand1x1.bias"]),
                                conv2d(s, w[f"{name}.expand3x3.weight"], w[f"{name}.expand3x3.bias"], 1, 1)], 1)
            x = np.maximum(x, 0)
        else:
            x = np.maximum(x, 0)
        if n in taps:
            maps.append(x)
    return maps


def lpips_in_float64(net, x, y):
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])

    def unit_maps(x):
        x = (x.double().numpy() - shift[:, None, None]) / scale[:, None, None]
        maps = maps_in_float64(net, backbone_weights(net), x)
        return [a / (np.sqrt((a**2).sum(1, keepdims=True)) + 1e-10) for a in maps]

    total = 0
    for head, a, b in zip(head_weights(net).values(), unit_maps(x), unit_maps(y), strict=True):
        total = total + ((a - b) ** 2 * head.double().numpy()).sum(1).mean((1, 2))
    return total


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for net in NETS:
        torch.save(backbone_weights(net), folder / f"{net}-backbone.pth")
        torch.save(head_weights(net), folder / f"{net}.pth")
    return folder


def load(files, net):
    return Lpips.from_files(net, files / f"{net}-backbone.pth", files / f"{net}.pth")


def pictures(seed, count=2, size=(41, 38)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@each_net
def test_lpips_is_the_published_formula(files, net):
    x, y = pictures(0), pictures(1)
    y[1] = x[1] + 0.05 * y[1]
    exact = lpips_in_float64(net, x, y)
    found = load(files, net)(x, y)
    assert found.shape == (2,)
    assert np.allclose(found.numpy(), exact, rtol=1e-4)
    assert found[1] < 0.5 * found[0]


@each_net
def test_lpips_is_a_distance_that_can_be_learned_from(files, net):
    lpips = load(files, net)
    x, y = pictures(0), pictures(1)
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert torch.allclose(lpips(x, y), lpips(y, x))
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    flat = torch.zeros(1, 3, 40, 40, requires_grad=True)        # where whole maps may be 0, a root has no slope
    lpips(flat, pictures(2, 1, (40, 40))).sum().backward()
    assert flat.grad is not None and bool(flat.grad.isfinite().all()) and float(flat.grad.abs().max()) > 0


@each_net
def test_the_smallest_picture_is_what_is_said(files, net):
    lpips, smallest = load(files, net), BACKBONES[net].smallest
    x, y = pictures(0, 1, (smallest, smallest)), pictures(1, 1, (smallest, smallest))
    assert np.allclose(lpips(x, y).numpy(), lpips_in_float64(net, x, y), rtol=1e-4)
    with pytest.raises(Refusal, match=f"{smallest} pixels"):
        lpips(x[..., 1:], y[..., 1:])
    with pytest.raises(Refusal, match="3, H, W"):
        lpips(x[:, :1], y[:, :1])


def test_unit_heads_are_no_heads(files):
    lpips = load(files, "squeeze")
    for head in lpips.heads.parameters():
        head.fill_(1.0)
    x, y = pictures(0), pictures(1)
    assert torch.allclose(feature_distance_of(lpips.backbone)(x, y), lpips(x, y), rtol=1e-5)


def test_safetensors_hold_the_same(files, tmp_path):
    save_file(backbone_weights("squeeze"), tmp_path / "b.safetensors")
    save_file(head_weights("squeeze"), tmp_path / "h.safetensors")
    same = Lpips.from_files("squeeze", tmp_path / "b.safetensors", tmp_path / "h.safetensors")
    x, y = pictures(0), pictures(1)
    assert torch.equal(same(x, y), load(files, "squeeze")(x, y))


def test_heads_are_those_of_version_01(tmp_path):
    """The lpips package has weights/v0.0 and weights/v0.1."""
    torch.save(backbone_weights("squeeze"), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    for version, factor in (("v0.0", 2), ("v0.1", 1)):
        (tmp_path / "weights" / version).mkdir(parents=True)
        torch.save({k: factor * v for k, v in head_weights("squeeze").items()},
                   tmp_path / "weights" / version / "squeeze.pth")
    x, y = pictures(0), pictures(1)
    found = lpips_in(tmp_path)["squeeze"](x, y)
    assert np.allclose(found.numpy(), lpips_in_float64("squeeze", x, y), rtol=1e-4)
    torch.save(head_weights("squeeze"), tmp_path / "squeeze.pth")
    with pytest.raises(Refusal, match=r"holds squeeze.pth and weights/v0.1/squeeze.pth, which may differ"):
        lpips_in(tmp_path)
    torch.save(backbone_weights("squeeze"), tmp_path / "weights" / "v0.0" / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(Refusal, match="no pair of public files"):
        lpips_in(tmp_path / "weights" / "v0.0")


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_wrong_files_are_refused(files, tmp_path, capsys):
    heads, path = files / "squeeze.pth", tmp_path / "b.pth"

    def refused(weights, match):
        torch.save(weights, path)
        with pytest.raises(Refusal, match=match) as caught:
            Lpips.from_files("squeeze", path, heads)
        assert str(path) in str(caught.value)

    weights = backbone_weights("squeeze")
    name = "features.7.squeeze.bias"
    refused({k: v for k, v in weights.items() if k != name}, f"1 missing .{name}")
    refused(weights | {"features.13.weight": torch.zeros(1)}, r"1 unexpected .features\.13\.weight")
    refused(weights | {"classifier.7.weight": torch.zeros(1)}, r"1 unexpected .classifier\.7\.weight")
    refused(weights | {"features.0.weight": torch.zeros(64, 3, 5, 5)}, r"another shape .features\.0\.weight")
    refused(backbone_weights("alex"), "another network")
    refused({"state_dict": weights}, "more than tensors by name")
    refused(Harmful(), "more than tensors, or is damaged")
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(Refusal, match="more than tensors, or is damaged"):
        Lpips.from_files("squeeze", path, heads)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"lin5\.model\.1\.weight"):
        Lpips.from_files("squeeze", files / "squeeze-backbone.pth", files / "alex.pth")
    with pytest.raises(Refusal, match="the weight file is missing"):
        Lpips.from_files("squeeze", tmp_path / "none.pth", heads)
    with pytest.raises(Refusal, match=r"\.safetensors, \.pth or \.pt"):
        Lpips.from_files("squeeze", __file__, heads)
    with pytest.raises(Refusal, match="did you mean 'squeeze'"):
        Lpips.from_files("squeezenet", path, heads)


def test_random_features_are_the_seeds_own():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = RandomFeatures(3), RandomFeatures(3), RandomFeatures(4)
    assert torch.equal(torch.get_rng_state(), state)
    x, y = pictures(0), pictures(1)
    distances = [feature_distance_of(f)(x, y) for f in (first, again, other)]
    assert torch.equal(distances[0], distances[1]) and not torch.allclose(distances[0], distances[2], rtol=1e-3)


def test_random_features_see_more_damage_as_farther():
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    clean = torch.stack([torch.sin(9 * x * y), torch.sign(x - y**2), x])[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        distance = feature_distance_of(RandomFeatures(seed))
        noisy = [float(distance(clean + s * noise, clean)) for s in (0, 0.02, 0.1, 0.3)]
        assert noisy[0] == 0 and noisy == sorted(noisy) and noisy[1] < 0.2 * noisy[3]
        blurred = clean
        before = 0.0
        for _ in range(3):
            blurred = torch.nn.functional.avg_pool2d(blurred, 3, 1, 1, count_include_pad=False)
            assert (before := float(distance(blurred, clean))) > 0
        assert before > float(distance(torch.nn.functional.avg_pool2d(clean, 3, 1, 1, count_include_pad=False), clean))


def test_pooled_features_are_the_means_of_maps():
    features, x = RandomFeatures(0, (4, 6)), pictures(0, 3, (9, 7))
    first, second = features(x)
    assert first.shape == (3, 4, 9, 7) and second.shape == (3, 6, 5, 4)     # no row or column is lost
    vectors = pooled(features)(x)
    assert torch.allclose(vectors[:, :4], first.mean((2, 3))) and torch.allclose(vectors[:, 4:], second.mean((2, 3)))

"""The closed-form codec against what is known of the KLT."""

import json

import pytest
import torch
from torch.nn import functional

from stillroom.codecs.folders import require_usable
from stillroom.codecs.klt import equal_budget, fit_klt, moments
from stillroom.nets import build, describe
from stillroom.settings import Refusal
from stillroom.train import Product
from stillroom.train.product import load_product, save_product


def pictures(count=24, size=32, seed=0):
    """Smooth, with correlated colours, so that few numbers say much."""
    g = torch.Generator().manual_seed(seed)
    x = sum(
        functional.interpolate(torch.randn(count, 3, n, n, generator=g), size=(size, size), mode="bilinear") / n**0.5
        for n in (2, 4, 8, 32)
    )
    mix = torch.tensor([[1.0, 0.6, 0.5], [0.0, 0.4, 0.3], [0.0, 0.0, 0.2]])
    return torch.einsum("ck,bkhw->bchw", mix.T, torch.as_tensor(x)).mul(0.4).clamp(-1, 1)


def error(codec, x):
    """Squared error per block, before clamping."""
    with torch.no_grad():
        again = codec.decode(codec.encode(x))
    return float((again - x).double().square().sum() / (x.numel() / (3 * codec.space.factor**2)))


@pytest.mark.parametrize("block", [2, 4, 8])
def test_all_channels_are_exact(block):
    x = pictures()
    codec = fit_klt(x, block, 3 * block**2)
    again = codec.reconstruct(x)
    assert float((again - x).abs().max()) < 2e-5
    odd = pictures(2, 32, seed=5)[..., :29, :19]
    assert codec.reconstruct(odd).shape == odd.shape and float((codec.reconstruct(odd) - odd).abs().max()) < 2e-5


@pytest.mark.parametrize("channels", [1, 5, 16, 40])
def test_the_error_is_the_sum_of_the_dropped_eigenvalues(channels):
    x = pictures()
    values = torch.linalg.eigvalsh(moments([x], 4)[1])
    dropped = float(values[: 48 - channels].sum())
    assert error(fit_klt(x, 4, channels), x) == pytest.approx(dropped, rel=1e-4)


def test_the_moments_are_those_of_the_blocks():
    x = pictures(3, 16)
    mean, covariance = moments([x], 4)
    rows = torch.stack([x[b, :, i : i + 4, j : j + 4].reshape(-1) for b in range(3) for i in range(0, 16, 4)
                        for j in range(0, 16, 4)]).double()
    assert torch.allclose(mean, rows.mean(0)) and torch.allclose(covariance, rows.T.cov(correction=0), atol=1e-12)
    ragged = torch.cat([x, torch.ones(3, 3, 16, 3)], 3)     # half a block more, which is left out
    assert torch.allclose(moments([ragged], 4)[1], covariance)


def test_no_other_basis_of_its_size_is_better():
    x = pictures()
    codec = fit_klt(x, 4, 8)
    best = error(codec, x)
    g = torch.Generator().manual_seed(1)
    for step in (0.03, 0.3, 3.0):
        other = fit_klt(x, 4, 8)
        turned = other.encoder.basis.flatten(1) + step * torch.randn(8, 48, generator=g) / 48**0.5
        turned = torch.linalg.qr(turned.T)[0].T.view(8, 3, 4, 4)
        for half in (other.encoder, other.decoder):
            half.basis.copy_(turned)
        assert error(other, x) > best


def test_latents_are_white_and_the_basis_orthonormal():
    x = pictures()
    codec = fit_klt(x, 4, 12)
    basis = codec.encoder.basis.flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(12), atol=1e-6)
    with torch.no_grad():
        z = codec.encode(x).transpose(0, 1).flatten(1)      # [12, all blocks]
    assert torch.allclose(z.cov(correction=0), torch.eye(12), atol=1e-3) and float(z.mean(1).abs().max()) < 1e-4
    assert list(codec.space.scale) == sorted(codec.space.scale, reverse=True)
    assert codec.space.offset == 1.5 and codec.space.factor == 4


def test_signs_are_ours_and_not_the_solvers(monkeypatch):
    x = pictures()
    codec, solve = fit_klt(x, 4, 12), torch.linalg.eigh
    flips = torch.where(torch.rand(48, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)

    def other(matrix):
        values, vectors = solve(matrix)
        return values, vectors * flips

    monkeypatch.setattr(torch.linalg, "eigh", other)
    assert torch.equal(fit_klt(x, 4, 12).encoder.basis, codec.encoder.basis)  # pyright: ignore


def test_the_order_of_pictures_does_not_matter():
    x = pictures()
    codec = fit_klt(x, 4, 12)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    bright = x[:1].clamp(min=0)
    assert fit_klt([bright, x], 4, 12).space != codec.space         # one bright picture alone is no mistake
    for same in (x[order], [x[:5], x[5:6], x[6:]], x.flip(0)):
        other = fit_klt(same, 4, 12)
        assert torch.allclose(other.encoder.basis, codec.encoder.basis, atol=1e-5)
        assert torch.allclose(other.encode(x), codec.encode(x), atol=1e-3)
    # whatever the signs: of mirrored pictures, the reconstructions are the mirrored ones
    mirrored = fit_klt(x.flip(-1), 4, 12)
    assert torch.allclose(mirrored.reconstruct(x.flip(-1)).flip(-1), codec.reconstruct(x), atol=1e-4)


def test_fewer_channels_are_the_first_of_more():
    x = pictures()
    few, many = fit_klt(x, 4, 6), fit_klt(x, 4, 20)
    assert torch.allclose(few.encode(x), many.encode(x)[:, :6], atol=1e-5)
    assert error(many, x) < error(few, x)


def test_grey_pictures_give_no_infinite_scale():
    x = pictures().mean(1, keepdim=True)
    codec = fit_klt(x, 2, 12)
    with torch.no_grad():
        assert float((codec.reconstruct(x) - x).abs().max()) < 1e-4 and codec.encode(x).isfinite().all()


def test_equal_budget_has_the_latents_of_the_enlarged_picture():
    x = pictures(4, 32)
    for scale, channels in ((1.0, 4), (1.5, 9), (2.0, 16), (0.1, 1), (9.0, 48)):
        assert equal_budget(x, scale, 4, 4).space.channels == channels
    remapped = fit_klt(x, 4, 4).remapped(2.0).encode(x)
    assert equal_budget(x, 2.0, 4, 4).encode(x).numel() == remapped.numel()


def test_it_is_written_down_and_built_again(tmp_path):
    x = pictures()
    codec = fit_klt(x, 4, 10)
    require_usable(codec, x, "KLT")
    again = build(json.loads(json.dumps(describe(codec))))
    again.load_state_dict(codec.state_dict())
    assert torch.allclose(again.encode(x), codec.encode(x), atol=1e-5)
    save_product(Product("codec", {"codec": codec}, {}), tmp_path / "product")
    loaded = load_product(tmp_path / "product").parts["codec"]
    assert torch.allclose(loaded.reconstruct(x), codec.reconstruct(x), atol=1e-5)  # pyright: ignore
    assert not list(codec.parameters()) and len(json.dumps(describe(codec))) < 1500


def test_gradients_reach_latents_through_the_decoder():
    """Linear and orthonormal: the gradient of |D z - D w|^2 / 2 is scale^2 (z - w)."""
    codec = fit_klt(pictures(), 4, 6)
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(1, 6, 2, 2, generator=g, requires_grad=True), torch.randn(1, 6, 2, 2, generator=g)
    (grad,) = torch.autograd.grad((codec.decode(z) - codec.decode(w)).square().sum() / 2, z)
    scale = torch.tensor(codec.space.scale).view(-1, 1, 1)
    assert torch.allclose(grad, scale**2 * (z - w), atol=1e-5)


@pytest.mark.parametrize(("x", "block", "channels", "match"), [
    (pictures(2), 4, 49, "1 to 48 channels, not 49"),
    (pictures(2), 4, 0, "1 to 48 channels, not 0"),
    (pictures(2).abs(), 4, 4, "2 \\* x - 1"),
    (pictures(2)[..., :3], 4, 4, "no picture holds a block of 4x4"),
    (torch.full((1, 3, 8, 8), -0.5), 4, 4, "all blocks are the same"),
    ([], 4, 4, "no picture holds"),
    (torch.zeros(1, 4, 8, 8), 4, 4, "alpha"),
])
def test_refuses(x, block, channels, match):
    with pytest.raises(Refusal, match=match):
        fit_klt(x, block, channels)

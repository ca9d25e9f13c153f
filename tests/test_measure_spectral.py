"""Slopes of fields whose spectrum is known, and encoders that move with their pictures."""

import pytest
import torch
from torch.nn import functional

from stillroom.measure.spectral import cosine_power, cosines, equivariance, spectral_slope
from stillroom.settings import Refusal


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(exponent: float, n: int, side: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """[n, 2, h, w] with power 1 / f^exponent: normal coefficients of cosines."""
    h, w = side
    radius = ((torch.arange(h, dtype=torch.float64)[:, None] / h) ** 2 + (torch.arange(w) / w) ** 2).sqrt()
    radius[0, 0] = 1
    return cosines(h).T @ (normal(n, 2, h, w, seed=seed) * radius ** (-exponent / 2)) @ cosines(w)


@pytest.mark.parametrize("side", [(4, 4), (16, 16), (8, 24)])
@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.5])
def test_the_slope_of_a_field_is_its_exponent(side, exponent):
    x = field(exponent, 4000 if side == (4, 4) else 600, side)
    assert abs(spectral_slope(x + 3).slope - exponent) < 0.06       # whatever its mean


def test_the_slope_is_exact_where_the_power_is():
    h, w = 8, 8
    radius = ((torch.arange(h, dtype=torch.float64)[:, None] / h) ** 2 + (torch.arange(w) / w) ** 2).sqrt()
    x = cosines(h).T @ radius.clamp(min=1e-3) ** -0.85 @ cosines(w)     # one map, every coefficient as it should be
    found = spectral_slope(x[None, None])
    assert abs(found.slope - 1.7) < 1e-9
    assert found.radii == tuple(sorted(found.radii)) and len(found.radii) == len(found.power)
    assert torch.allclose(torch.tensor(found.power), torch.tensor(found.radii) ** -1.7)
    assert abs(spectral_slope(1e3 * x[None, None]).slope - 1.7) < 1e-9


def test_cosines_are_orthonormal_and_keep_energy():
    assert torch.allclose(cosines(7) @ cosines(7).T, torch.eye(7, dtype=torch.float64), atol=1e-12)
    x = normal(300, 3, 5, 6)
    assert torch.allclose(cosine_power(x).sum(), x.square().sum((2, 3)).mean())


def test_a_ramp_across_edges_is_no_detail():
    """A Fourier transform sees the jump between opposite edges as power ~ 1 / f^2; here a ramp is 1 / f^4."""
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64)
    x = ramp[:, None] * normal(200, 1, 1, 1) + ramp * normal(200, 1, 1, 1, seed=1) + 1e-9 * normal(200, 1, 32, 32)
    line = cosine_power(x)[1::2, 0]
    fall = torch.log(line[0] / line[3]) / torch.log(torch.tensor(7.0))      # coefficients 1 and 7
    assert abs(float(fall) - 4) < 0.1


def test_an_encoder_that_averages_moves_with_its_picture():
    x = normal(12, 3, 16, 16)
    found = equivariance(lambda x: functional.avg_pool2d(x, 4), x)
    assert set(found) == {"flip", "rotate", "halve"} and all(v is not None and v < 1e-20 for v in found.values())


def test_encoders_that_do_not():
    x = normal(64, 1, 8, 8)

    def ramped(x):
        return functional.avg_pool2d(x * torch.arange(float(x.shape[-1]), dtype=x.dtype), 2)

    sided = equivariance(ramped, x)             # left and right are unlike
    assert sided["flip"] > 0.1 and sided["rotate"] > 0.1
    kernel = normal(4, 1, 2, 2, seed=5)
    drawn = equivariance(lambda x: functional.conv2d(x, kernel, stride=2), x)
    flipped = kernel.flip(-1)       # E(flip x) against flip E(x): E's kernel against its mirror, on white noise
    exact = (kernel - flipped).square().sum() / (2 * kernel.square().sum())
    assert abs(drawn["flip"] - float(exact)) < 0.12


def test_moves_that_sizes_do_not_allow_are_none():
    def pool(x):
        return functional.avg_pool2d(x, 4)

    assert equivariance(pool, normal(4, 1, 12, 12))["halve"] is None        # three latents a side
    assert equivariance(pool, normal(4, 1, 8, 16))["rotate"] is None

    def only(x):
        if x.shape[-1] != 16:
            raise Refusal("of 16 pixels alone")
        return pool(x)

    found = equivariance(only, normal(4, 1, 16, 16))
    assert found["halve"] is None and found["flip"] is not None and found["flip"] < 1e-20


def test_rounding_has_no_slope():
    """Maps that are one number each have power at frequency 0, and elsewhere what the transform rounds."""
    flat = normal(4, 2, 1, 1).expand(4, 2, 8, 8).float()
    assert 0 < float(cosine_power(flat).flatten()[1:].max()) < 1e-28
    with pytest.raises(Refusal, match="no power at some frequencies"):
        spectral_slope(flat)
    assert spectral_slope(flat + 1e-5 * normal(4, 2, 8, 8)).slope == pytest.approx(0, abs=0.5)


def test_refusals():
    for told, x in {"2 x 2 places": normal(5, 3, 1, 9), "no power": torch.ones(5, 3, 4, 4)}.items():
        with pytest.raises(Refusal, match=told):
            spectral_slope(x)

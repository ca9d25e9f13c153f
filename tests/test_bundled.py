"""The codec that comes with the package is what its card says, and better than the linear code of its size."""

import pytest
import torch

from stillroom.codecs import fit_klt, require_usable
from stillroom.data import CREDITS, open_source, pictures, sample
from stillroom.measure import as_8bit, psnr
from stillroom.settings import Images
from stillroom.train import load_product
from stillroom.train.teacher import BUNDLED, open_codec

CARD = load_product(BUNDLED).card
MINE, KLT = CARD["PSNR in dB, held-out photographs"], CARD["PSNR in dB, KLT of the same size"]


@pytest.fixture(scope="module")
def photographs():
    return dict(pictures("photos:test"))


def decibels(codec, x):
    with torch.inference_mode():
        return float(psnr(as_8bit(codec.reconstruct(x[None])), x[None])[0])


def test_it_reconstructs_what_its_card_says(photographs):
    codec = open_codec("bundled")
    assert set(MINE) == set(KLT) == set(photographs)
    for name, x in photographs.items():
        assert decibels(codec, x) == pytest.approx(MINE[name], abs=0.05), name


def test_it_is_better_than_the_linear_code_on_every_held_out_photograph(photographs):
    space = open_codec("bundled").space
    data = Images(data=CARD["data"], size=64, crop="shrink", shrink=(0.7, 8.0))
    linear = fit_klt(sample(open_source(data), 1024, 0).x, space.factor, space.channels)
    for name, x in photographs.items():
        assert decibels(linear, x) == pytest.approx(KLT[name], abs=0.3), name
        assert MINE[name] > KLT[name] + 1, name


def test_its_latents_have_mean_0_and_deviation_1():
    x = sample(open_source(Images(data=CARD["data"], size=64, crop="shrink", shrink=(0.7, 8.0))), 256, 1).x
    codec = open_codec("bundled")
    require_usable(codec, x, "bundled")
    with torch.inference_mode():
        z = codec.encode(x)
    assert z.mean((0, 2, 3)).abs().max() < 0.15 and (z.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_it_is_small_and_names_whom_it_learned_from():
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) < 4_000_000
    assert CARD["credits"] == [str(c) for c in CREDITS if c.split == "train"]
    assert "shared" not in (BUNDLED / "product.json").read_text()

"""Tiles: the same answer as untiled where nets reach a finite distance; partitions of unity where they do not."""

import pytest
import torch
from torch import nn

from stillroom.codecs.bits import in_bfloat16
from stillroom.codecs.codec import Codec, Remapped
from stillroom.codecs.klt import fit_klt
from stillroom.codecs.tiles import Tiled, blended_spans, exact_spans, margins, reach
from stillroom.data import LatentSpace
from stillroom.nets.bottleneck import Bottleneck, Projected
from stillroom.nets.vit import ViT


class Early(nn.Module):
    """Pads right and below only, as AutoencoderKL does."""

    def forward(self, x):
        return nn.functional.pad(x, (0, 1, 0, 1))


def conv(inner, outer):
    return nn.Conv2d(inner, outer, 3, padding=1)


def down(width, early):
    strided = [Early(), nn.Conv2d(width, width, 3, 2)] if early else [nn.Conv2d(width, width, 3, 2, 1)]
    return [*strided, conv(width, width), nn.ReLU()]


def up(width):
    return [nn.ReLU(), nn.Upsample(scale_factor=2), conv(width, width)]


def codec(channels=4, width=12, levels=3, early=False, norm=False, seed=0):
    torch.manual_seed(seed)
    middle = [nn.GroupNorm(4, width)] if norm else []
    encoder = nn.Sequential(conv(3, width), nn.ReLU(), *(x for _ in range(levels) for x in down(width, early)),
                            *middle, conv(width, channels))
    decoder = nn.Sequential(conv(channels, width), *middle, *(x for _ in range(levels) for x in up(width)),
                            conv(width, 3))
    space = LatentSpace(channels, 2**levels, (0.1,) * channels, (0.3,) * channels)
    return Codec(encoder, decoder, space).requires_grad_(False)


def picture(height, width, batch=1, seed=1):
    torch.manual_seed(seed)
    return torch.rand(batch, 3, height, width) * 2 - 1


def spread(x):
    return float(x.max() - x.min())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("size", [(300, 420), (299, 431), (1, 700), (513, 3), (64, 2000), (40, 40)])
def test_tiles_of_a_net_of_finite_reach_change_nothing(early, size):
    whole, x = codec(early=early), picture(*size)
    tiled = Tiled(whole, side=96)
    z = whole.encode(x)
    assert (tiled.encode(x) - z).abs().max() < 1e-5 * spread(z)
    assert tiled.encode(x).shape == z.shape
    y = whole.decode(z, size)
    assert (tiled.decode(z, size) - y).abs().max() < 1e-5 * spread(y)
    assert (tiled.reconstruct(x) - whole.reconstruct(x)).abs().max() < 2e-5


def test_pictures_of_a_batch_keep_their_places():
    whole, x = codec(), picture(200, 130, batch=3)
    assert (Tiled(whole, 64).encode(x) - whole.encode(x)).abs().max() < 1e-5 * spread(whole.encode(x))


def test_grey_becomes_three_channels_in_tiles_too():
    whole, x = codec(), picture(200, 130)[:, :1]
    assert torch.allclose(Tiled(whole, 64).encode(x), whole.encode(x), atol=1e-5)


def test_reach_is_the_receptive_field_of_the_convolutions():
    # Three 3x3 convolutions one after the other, all weights equal: felt 3 positions away, and one is added.
    net = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)))
    for p in net.parameters():
        nn.init.ones_(p)
    with torch.no_grad():
        assert reach(net, lambda h, w: torch.rand(1, 1, h, w)) == 3 + 1
    # Longer than high: the larger of the two axes counts.
    with torch.no_grad():
        assert reach(nn.Conv2d(1, 1, (3, 11), padding=(1, 5)), lambda h, w: torch.rand(1, 1, h, w)) == 5 + 1


def test_reach_counts_latents_not_pixels():
    # Stride 8 alone: a latent sees its own block. A kernel of 3 over latents sees the neighbours.
    block = nn.Conv2d(3, 2, 8, 8)
    wide = nn.Sequential(block, nn.Conv2d(2, 2, 3, padding=1))
    with torch.no_grad():
        assert [reach(net, lambda h, w: torch.rand(1, 3, 8 * h, 8 * w)) for net in (block, wide)] == [1, 2]


def test_dead_activations_do_not_hide_padding():
    # The first layer's answer is constant, yet zero padding of the second one changes it at a cut.
    first, second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        for conv, weight, bias in ((first, 0, 1), (second, 1, 0)):
            for name, value in (("weight", weight), ("bias", bias)):
                conv.state_dict()[name].fill_(value)
        assert reach(nn.Sequential(first, second), lambda h, w: torch.rand(1, 1, h, w)) == 2


def test_global_nets_are_found_and_blended_without_steps():
    whole = codec(norm=True)
    assert [margins(whole)[half]() for half in ("encoder", "decoder")] == [None, None]
    x = picture(400, 300)
    tiled = Tiled(whole, side=160)
    z = tiled.encode(x)
    assert z.shape == whole.encode(x).shape and z.isfinite().all()
    # Statistics of noise hardly differ from tile to tile, so tiles agree with the whole nearly.
    assert (z - whole.encode(x)).abs().max() < 0.05 * spread(z)
    assert tiled.decode(z, (399, 291)).shape[-2:] == (399, 291)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 100, 1000])
@pytest.mark.parametrize("side", [1, 8, 64])
def test_weights_sum_to_one_everywhere(length, side):
    for spans in (exact_spans(length, side, 3), blended_spans(length, side)):
        total = torch.zeros(length, dtype=torch.float64)
        for s in spans:
            assert 0 <= s.start <= s.first and s.first + len(s.weight) <= s.stop <= length
            total[s.first : s.first + len(s.weight)] += s.weight.double()
        assert (total - 1).abs().max() < 1e-6


def test_blending_a_net_that_keeps_its_input_is_the_identity():
    # A linear net whose tiles agree: blending is exact up to rounding.
    whole = codec(norm=True)
    whole.encoder, whole.decoder = nn.Conv2d(3, 4, 8, 8), nn.ConvTranspose2d(4, 3, 8, 8)
    tiled = Tiled(whole, side=64)
    tiled._margins = {"encoder": None, "decoder": None}
    x = picture(200, 333)
    with torch.no_grad():
        assert (tiled.encode(x) - whole.encode(x)).abs().max() < 1e-5
        assert (tiled.reconstruct(x) - whole.reconstruct(x)).abs().max() < 1e-5


def test_no_net_sees_more_than_a_tile_and_its_margins():
    whole, seen = codec(), []
    whole.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    tiled = Tiled(whole, side=128)
    margin = 8 * (tiled.margin("encoder") or 0)
    seen.clear()
    tiled.encode(picture(1000, 700))
    assert max(max(s) for s in seen) <= 128 + 2 * margin and len(seen) == 8 * 6


def test_half_precision_nets_have_the_reach_of_their_float_weights():
    whole = codec()
    expected = margins(whole)["encoder"]()
    assert margins(in_bfloat16(whole))["encoder"]() == expected
    assert margins(whole.bfloat16())["encoder"]() == expected


def test_reach_is_asked_where_the_net_is():
    """Nets of buffers alone, which no CPU tells apart: the meta device stands for another one."""
    seen, linear = [], fit_klt(torch.rand(2, 3, 64, 64) * 2 - 1, channels=4).to("meta")
    linear.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].device.type))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        margins(linear)["encoder"]()
    assert seen == ["meta"]


@pytest.mark.parametrize("encoder", [ViT(8, 32, 1, 1), Projected(ViT(8, 32, 1, 1), Bottleneck(32, 4))])
@torch.no_grad()
def test_encoders_of_our_own_have_a_form_in_half_precision(encoder):
    codec = Codec(encoder, nn.Identity(), LatentSpace(4, 8, (0.0,) * 4, (1.0,) * 4))
    x = picture(32, 32)
    exact, half = encoder(x), in_bfloat16(codec).encoder(x)
    assert half.dtype == torch.float32 and 0 < float((half - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_a_tiled_codec_can_be_remapped():
    whole, x = codec(), picture(150, 133)
    tiled = Remapped(Tiled(whole, 64), 1.5)     # pyright: ignore[reportArgumentType]
    assert (tiled.reconstruct(x) - Remapped(whole, 1.5).reconstruct(x)).abs().max() < 1e-4

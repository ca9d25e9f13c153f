"""Oracles of the students: TAESD's layout to the last name, the place of their grids, exact constants."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderTiny, EncoderTiny
from diffusers.models.downsampling import Downsample2D

from stillroom.nets.build import build, describe
from stillroom.nets.coding import Block, Decoder, Encoder, LateConv, parameters_of, sized

F64 = torch.float64
STEMS = ["conv", "unshuffle", "strided"]
PADDINGS = ["symmetric", "asymmetric"]


def pictures(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def count(net):
    return sum(p.numel() for p in net.parameters())


def numbered(net):
    """Names as a TAESD file has them, with the shapes of weights."""
    return {name.removeprefix("layers."): tuple(w.shape) for name, w in net.state_dict().items()}


def test_the_encoder_is_taesds():
    reference = EncoderTiny(3, 16, (1, 3, 3, 3), (64,) * 4, "relu")
    x = pictures(2, 3, 40, 56)
    for net in (Encoder(16), Encoder(16, unit_range=True)):
        net.load_state_dict(reference.state_dict())
        # TAESD takes [0, 1]; diffusers' class shifts for it
        assert torch.equal(net(x if net.unit_range else (x + 1) / 2), reference(x))


def test_the_decoder_is_taesds():
    reference = DecoderTiny(16, 3, (3, 3, 3, 1), (64,) * 4, 2, "relu", "nearest")
    later = {}      # diffusers has no module for the clamp, so its layers stand one earlier
    for name, weight in reference.state_dict().items():
        _, number, rest = name.split(".", 2)
        later[f"layers.{int(number) + 1}.{rest}"] = weight
    z = 5 * pictures(2, 16, 5, 7)
    for net in (Decoder(16), Decoder(16, unit_range=True)):
        net.load_state_dict(later)
        assert torch.allclose(net(z) if net.unit_range else 2 * net(z) - 1, reference(z), atol=1e-6)


def test_the_layout_for_sana_has_its_published_names():
    """taesd.py, F32Encoder and F32Decoder: layer numbers and widths."""
    names = numbered(Encoder(32, 64, (0, 0, 1, 3, 3, 3), stem="strided"))
    assert (names["0.weight"], names["2.weight"]) == ((32, 3, 3, 3), (64, 32, 3, 3))
    assert "0.bias" in names and "2.bias" in names
    halvings = {n for n in names if n.count(".") == 1 and n.endswith("weight") and n[:-7] + ".bias" not in names}
    assert halvings == {"5.weight", "9.weight", "13.weight"}
    blocks = {int(n.split(".")[0]) for n in names if ".conv." in n}
    assert blocks == {4, 6, 7, 8, 10, 11, 12, 14, 15, 16} and names["17.weight"] == (32, 64, 3, 3)

    names = numbered(Decoder(32, (256, 128, 64, 64, 64, 64), (3, 3, 3, 3, 3, 1)))
    shapes = {n: names[f"{n}.weight"][:2] for n in (1, 7, 12, 17, 22, 27, 29)}
    assert shapes == {1: (256, 32), 7: (128, 256), 12: (64, 128), 17: (64, 64), 22: (64, 64), 27: (64, 64), 29: (3, 64)}
    assert "7.bias" not in names and "28.conv.4.bias" in names


def test_the_pool_branch_has_its_published_names_and_stands_in_the_coarsest_level():
    branch = {"pool.0.weight": (256, 64, 1, 1), "pool.1.weight": (256,), "pool.1.bias": (256,),
              "pool.3.weight": (64, 256, 1, 1)}
    for net, places in ((Encoder(32, pool=True), (11, 12, 13)), (Decoder(32, pool=True), (3, 4, 5))):
        pools = {name: shape for name, shape in numbered(net).items() if ".pool." in name}
        assert pools == {f"{i}.{name}": shape for i in places for name, shape in branch.items()}


def test_the_pool_branch_is_added_before_the_block_and_sees_the_whole_picture():
    torch.manual_seed(0)
    block = Block(8, pool=True).to(F64)
    x = pictures(1, 8, 24, 24, dtype=F64)
    inner = block.pool[0](x)
    groups = inner.unflatten(1, (4, 8))
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    normed = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
    with_pool = x + block.pool[3](normed.relu())
    assert torch.allclose(block(x), (with_pool + block.conv(with_pool)).relu(), atol=1e-12)

    far = x.clone()
    far[..., -1, -1] += 1
    assert (block(far) != block(x))[..., 0, 0].any()
    block.pool = None
    assert not (block(far) != block(x))[..., 0, 0].any()


@pytest.mark.parametrize("options, parameters", [
    ({}, 1_229_456), ({"moments": True}, 1_238_688), ({"width": 80}, 1_916_976), ({"width": 32}, 310_608),
    ({"width": 96, "blocks": (1, 2, 2, 2)}, 2_009_200), ({"blocks": (1, 1, 1, 1)}, 564_752),
])
def test_sizes_are_those_of_diffusers_tiny_encoders(options, parameters):
    assert count(Encoder(16, **options)) == parameters


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("levels", [2, 3, 5])
def test_latents_are_centred_where_the_offset_says(stem, padding, levels):
    """With equal positive weights a latent's gradient is symmetric about the pixel that it stands on."""
    net = Encoder(1, 8, (0,) * levels + (1,), stem=stem, padding=padding).to(F64)
    for p in net.parameters():
        torch.nn.init.constant_(p, 0.05)
    assert net.factor == 2**levels
    i, j = 8, 9
    x = torch.ones(1, 3, 16 * net.factor, 18 * net.factor, dtype=F64, requires_grad=True)
    z = net(x)
    assert z.shape[-2:] == (16, 18)
    felt = torch.autograd.grad(z[0, 0, i, j], x)[0].sum((0, 1))
    felt = felt / felt.sum()
    centre = [float((felt.sum(1 - axis) * torch.arange(felt.shape[axis])).sum()) for axis in (0, 1)]
    assert centre == pytest.approx([net.offset + net.factor * i, net.offset + net.factor * j], abs=0.02)


def test_asymmetric_padding_is_that_of_diffusers_autoencoders():
    theirs, ours = Downsample2D(8, use_conv=True, padding=0), LateConv(8, 8, bias=True)
    ours.load_state_dict(theirs.conv.state_dict())
    for size in ((6, 10), (7, 9)):
        x = pictures(2, 8, *size)
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("net", [
    *(Encoder(2, 8, (1, 0, 1, 1), stem=s, padding=p) for s in STEMS for p in PADDINGS),
    *(Decoder(2, 8, (1, 1, 0, 0), stem=s) for s in ("conv", "unshuffle")),
], ids=lambda n: f"{type(n).__name__}-{n.stem}-{getattr(n, 'padding', '')}")
def test_a_step_of_the_grid_in_is_a_step_of_the_grid_out(net):
    inside, step_in, step_out = (20, net.factor, 1) if isinstance(net, Encoder) else (20, 1, net.factor)
    net = net.to(F64)
    x = pictures(1, 3 if isinstance(net, Encoder) else 2, inside * step_in, inside * step_in, dtype=F64)
    moved = x.roll((step_in, step_in), (2, 3))
    keep = (..., slice(8 * step_out, -8 * step_out), slice(8 * step_out, -8 * step_out))
    expected = net(x).roll((step_out, step_out), (2, 3))
    assert torch.allclose(net(moved)[keep], expected[keep], atol=1e-12)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("constants", [("shift", "scale"), ("shift",), ("scale",), ()])
def test_constants_are_affine_and_fold_into_the_last_convolution(moments, constants):
    n = 6 if moments else 3
    values = {"shift": [i - 2.5 for i in range(n)], "scale": [0.5 + i for i in range(n)]}
    torch.manual_seed(0)
    net = Encoder(3, 8, (1, 1, 1, 1), pool=True, padding="asymmetric", moments=moments, unit_range=True,
                  **{name: tuple(values[name]) for name in constants}).to(F64)
    x = pictures(2, 3, 32, 40, dtype=F64)
    column = {name: torch.tensor(values[name], dtype=F64).view(-1, 1, 1) for name in constants}
    expected = net.layers((x + 1) / 2) * column.get("scale", 1) + column.get("shift", 0)
    assert torch.allclose(net(x), expected, atol=1e-14)

    folded = net.eval().folded()
    assert not folded.training and not {"shift", "scale"} & set(folded.state_dict())
    assert torch.allclose(folded(x), expected, atol=1e-13)
    assert numbered(folded) == {k: v for k, v in numbered(net).items() if k not in ("shift", "scale")}


def test_constants_survive_bfloat16():
    """Added to a bfloat16 answer in float32: at 100, bfloat16 alone would be 0.5 apart."""
    torch.manual_seed(0)
    net = Encoder(2, 8, (1, 1), shift=(100.1, -100.2), scale=(1e-2, 1e-2))
    x = pictures(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = net(x)
    assert z.dtype == torch.float32 and (z - net(x)).abs().max() < 1e-3


def test_a_decoder_with_constants_sees_the_diffusion_side():
    torch.manual_seed(0)
    plain = Decoder(3, 8, (2, 1, 1, 0), stem="unshuffle").to(F64)
    shift, scale = (1.0, -2.0, 0.5), (2.0, 0.25, 3.0)
    net = Decoder(3, 8, (2, 1, 1, 0), stem="unshuffle", shift=shift, scale=scale).to(F64)
    net.load_state_dict(plain.state_dict() | {"shift": net.shift, "scale": net.scale})
    z = pictures(2, 3, 4, 5, dtype=F64)
    raw = z * net.scale + net.shift
    assert torch.allclose(net(raw), plain(z), atol=1e-13)
    for a, b in zip(net.features(raw), plain.features(z), strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_features_are_the_decoders_own_first_maps():
    torch.manual_seed(0)
    net = Decoder(3, 8, (2, 1)).to(F64)
    z = pictures(1, 3, 4, 4, dtype=F64)
    maps = net.features(z)
    assert len(maps) == 3 and torch.equal(net.layers[5:](maps[-1]), net(z))
    h = net.layers[1](3 * (z / 3).tanh()).relu()
    assert torch.allclose(maps[0], h) and torch.allclose(maps[1], net.layers[3](h))


def test_the_soft_clamp_bounds_what_latents_can_do():
    torch.manual_seed(0)
    z = pictures(1, 3, 4, 4)
    for soft_clamp in (True, False):
        net = Decoder(3, 8, (1, 1), soft_clamp)
        assert torch.equal(net(1e4 * z), net(1e6 * z)) == soft_clamp


@pytest.mark.parametrize("net", [
    Encoder(2, (8, 16, 8), [1, 0, 1], padding="asymmetric", pool=True, moments=True, shift=[0.1] * 4, scale=(2.0,) * 4),
    Encoder(2, 8, (0, 0, 1), stem="strided", colours=1, unit_range=True),
    Decoder(2, [16, 8, 8], (1, 0, 0), False, "unshuffle", True, (0.1, 0.2), (1.0, 2.0), colours=1, unit_range=True),
], ids=["encoder", "grey", "decoder"])
def test_a_description_builds_the_same_net(net):
    again = build(describe(net))
    again.load_state_dict(net.state_dict())
    channels = net.colours if isinstance(net, Encoder) else net.channels
    x = pictures(1, channels, 16, 16)
    assert torch.equal(again(x), net(x)) and again.state_dict().keys() == net.state_dict().keys()
    assert describe(again) == describe(net)


@pytest.mark.parametrize("params", [1, 5_000, 20_001, 300_000, 2_000_000])
def test_sized_takes_the_nearest_width(params):
    def make(width):
        return Encoder(16, width)

    widths = range(8, 137, 8)
    nearest = min(widths, key=lambda w: abs(parameters_of(make, w) - params))
    torch.manual_seed(3)
    net = sized(params, make)
    assert net.width == nearest and count(net) == parameters_of(make, nearest)
    torch.manual_seed(3)        # the search draws no random numbers
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), make(nearest).parameters(), strict=True))


def test_sized_of_two_equally_near_takes_the_smaller_and_stops_at_the_widest():
    def make(width):
        return torch.nn.Linear(width, 1, bias=False)

    assert sized(12, make).in_features == 8 and sized(13, make).in_features == 16
    assert sized(10**6, make, range(8, 65, 8)).in_features == 64


@pytest.mark.parametrize("make, told", [
    (lambda: Encoder(4, stem="unshufle"), "stem 'unshufle'"),
    (lambda: Decoder(4, stem="strided"), "stem 'strided'"),
    (lambda: Encoder(4, padding="same"), "padding 'same'"),
    (lambda: Encoder(4, moments=True, shift=(0.0,) * 4), "4 and 0 constants for 8 channels"),
    (lambda: Decoder(4, scale=(1.0,) * 3), "0 and 3 constants for 4 channels"),
    (lambda: Encoder(4, blocks=(1, 1), stem="unshuffle"), "three levels"),
    (lambda: Encoder(4, blocks=(1, 1, 0), pool=True), "pool"),
    (lambda: Decoder(4, width=(64, 32)), "2 widths for 4 levels"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_built_is_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()

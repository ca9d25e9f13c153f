"""Raw TAESD-layout weight files against diffusers' AutoencoderTiny, and the published layer lists run by hand."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from stillroom.codecs.codec import Codec
from stillroom.codecs.taesd import from_taesd
from stillroom.settings import Refusal
from stillroom.train import Product
from stillroom.train.product import load_product, save_product

B3 = ["block"] * 3
F8 = ["conv", "block", "down", *B3, "down", *B3, "down", *B3, "conv"]
F8_DECODER = ["clamp", "conv", "relu", *B3, "up", "plain", *B3, "up", "plain", *B3, "up", "plain", "block", "conv"]
F32 = ["stem", "relu", "stem", "relu", "block", "down", *B3, "down", *B3, "down", *B3, "conv"]
F32_DECODER = ["clamp", "conv", "relu", *[*B3, "up", "plain"] * 5, "block", "conv"]
POOLED = {"encoder": (11, 12, 13), "decoder": (3, 4, 5)}       # TAEF2: the lowest stage's blocks


def weights(plan, widths, pooled=(), seed=0):
    """Random weights of a layer list; `widths` are the channels before each convolution and after the last."""
    g, w, at = torch.Generator().manual_seed(seed), {}, 0

    def conv(name, into, out, bias=True, k=3):
        w[f"{name}.weight"] = torch.randn(out, into, k, k, generator=g) * (1.5 / (into * k * k)) ** 0.5
        if bias:
            w[f"{name}.bias"] = torch.randn(out, generator=g) * 0.1

    for i, kind in enumerate(plan):
        width = widths[at]
        if kind in ("conv", "stem", "down", "plain"):
            conv(i, width, widths[at + 1], bias=kind in ("conv", "stem"))
            at += 1
        elif kind == "block":
            for k in (0, 2, 4):
                conv(f"{i}.conv.{k}", width, width)
            if i in pooled:
                conv(f"{i}.pool.0", width, 4 * width, bias=False, k=1)
                conv(f"{i}.pool.3", 4 * width, width, bias=False, k=1)
                w[f"{i}.pool.1.weight"] = 1 + 0.3 * torch.randn(4 * width, generator=g)
                w[f"{i}.pool.1.bias"] = 0.3 * torch.randn(4 * width, generator=g)
    return w


def run(plan, w, x):
    """The layer list by hand."""
    def conv(x, name, stride=1):
        weight = w[f"{name}.weight"]
        return functional.conv2d(x, weight, w.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    for i, kind in enumerate(plan):
        if kind == "clamp":
            x = 3 * torch.tanh(x / 3)
        elif kind == "relu":
            x = x.relu()
        elif kind == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif kind == "block":
            if f"{i}.pool.0.weight" in w:
                h = functional.group_norm(conv(x, f"{i}.pool.0"), 4, w[f"{i}.pool.1.weight"], w[f"{i}.pool.1.bias"])
                x = x + conv(h.relu(), f"{i}.pool.3")
            h = conv(conv(x, f"{i}.conv.0").relu(), f"{i}.conv.2").relu()
            x = (conv(h, f"{i}.conv.4") + x).relu()
        else:
            x = conv(x, i, 2 if kind in ("down", "stem") else 1)
    return x


CASES: dict[str, Any] = {   # plans, weights, channels, factor
    "f8": (F8, F8_DECODER, weights(F8, (3, 8, 8, 8, 8, 4)), weights(F8_DECODER, (4, 8, 8, 8, 8, 3), seed=1), 4, 8),
    "taef2": (F8, F8_DECODER, weights(F8, (3, 8, 8, 8, 8, 6), POOLED["encoder"]),
              weights(F8_DECODER, (6, 8, 8, 8, 8, 3), POOLED["decoder"], 1), 6, 8),
    "f32": (F32, F32_DECODER, weights(F32, (3, 32, 64, 64, 64, 64, 5)),
            weights(F32_DECODER, (5, 256, 128, 64, 64, 64, 64, 3), seed=1), 5, 32),
}


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    plan, decoder_plan, w, decoder_w, channels, factor = CASES[request.param]
    save_file(w, tmp_path / "tae_encoder.safetensors")
    save_file(decoder_w, tmp_path / "tae_decoder.safetensors")
    return tmp_path, plan, decoder_plan, w, decoder_w, channels, factor


@torch.no_grad()
def test_both_halves_are_the_published_layer_lists(case):
    folder, plan, decoder_plan, w, decoder_w, channels, factor = case
    codec = from_taesd(folder / "tae_encoder.safetensors")
    space = codec.space
    assert (space.channels, space.factor, space.offset, space.image_range) == (channels, factor, 0.0, (0.0, 1.0))
    x = images(1, 3, 64, 96)
    z = codec.encode(x)
    assert torch.allclose(z, run(plan, w, (x + 1) / 2), rtol=1e-4, atol=1e-4)
    again = run(decoder_plan, decoder_w, z)
    assert torch.allclose(codec.decode(z), 2 * again - 1, rtol=1e-4, atol=1e-4 * float(again.abs().max()))
    odd = images(1, 3, factor + 1, 5)
    assert codec.encode(odd).shape[-2:] == (2, 1) and codec.reconstruct(odd).shape == odd.shape


@torch.no_grad()
def test_a_product_holds_the_codec(case):
    folder = case[0]
    codec = from_taesd(folder / "tae_encoder.safetensors")
    save_product(Product("codec", {"codec": codec}, {}), folder / "product")
    again = load_product(folder / "product").parts["codec"]
    assert isinstance(again, Codec) and again.space == codec.space
    x = images(1, 3, 64, 64)
    assert torch.allclose(again.encode(x), codec.encode(x), atol=1e-5)


@torch.no_grad()
def test_diffusers_own_tiny_model_gives_the_same(tmp_path):
    diffusers: Any = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4,
                                    decoder_block_out_channels=(8,) * 4).eval()
    _, _, w, decoder_w, *_ = CASES["f8"]
    vae.encoder.load_state_dict({f"layers.{k}": v for k, v in w.items()})
    shifted = {k.partition(".")[::2]: v for k, v in decoder_w.items()}
    vae.decoder.load_state_dict({f"layers.{int(n) - 1}.{rest}": v for (n, rest), v in shifted.items()})
    save_file(w, tmp_path / "encoder.safetensors")
    save_file(decoder_w, tmp_path / "decoder.safetensors")
    vae.save_pretrained(tmp_path / "diffusers")     # one file of both halves, in diffusers' numbering
    x = images(2, 3, 32, 48)
    z = vae.encode(x).latents
    for file in (tmp_path / "encoder.safetensors", tmp_path / "diffusers/diffusion_pytorch_model.safetensors"):
        codec = from_taesd(file)
        assert torch.allclose(codec.encode(x), z, atol=1e-5)
        assert torch.allclose(codec.decode(z), vae.decode(z).sample, atol=1e-5)


def test_pairs_are_found(tmp_path):
    _, _, w, decoder_w, *_ = CASES["f8"]
    x = images(1, 3, 16, 16)
    torch.save(w, tmp_path / "taesd_encoder.pth")
    torch.save(decoder_w, tmp_path / "taesd_decoder.pth")
    truth = from_taesd(tmp_path / "taesd_encoder.pth").reconstruct(x)
    assert torch.equal(from_taesd(str(tmp_path / "taesd_decoder.pth")).reconstruct(x), truth)
    save_file({k: v.half() for k, v in w.items()}, tmp_path / "mine.safetensors")
    codec = from_taesd(tmp_path / "mine.safetensors", tmp_path / "taesd_decoder.pth")
    assert codec.encode(x).dtype == torch.float32 and torch.allclose(codec.reconstruct(x), truth, atol=5e-2)
    save_file(w, tmp_path / "taesd_encoder.safetensors")
    assert torch.equal(from_taesd(tmp_path / "taesd_encoder.safetensors").reconstruct(x), truth)   # beside a .pth


# Refusals

def refused(match, *files):
    with pytest.raises(Refusal, match=match) as told:
        from_taesd(*files)
    assert "\n" not in str(told.value)


def test_refuses_halves_without_their_pair(tmp_path):
    _, _, w, decoder_w, *_ = CASES["f8"]
    save_file(w, tmp_path / "taesd_encoder.safetensors")
    refused("no decoder beside it.*taesd_decoder.safetensors", tmp_path / "taesd_encoder.safetensors")
    save_file(decoder_w, tmp_path / "tae_decoder.safetensors")
    refused("no encoder beside it.*tae_encoder.safetensors", tmp_path / "tae_decoder.safetensors")
    save_file(w, tmp_path / "mine.safetensors")
    refused("name .*encoder.*or give the decoder", tmp_path / "mine.safetensors")
    refused("is missing", tmp_path / "nowhere_encoder.safetensors")
    other = CASES["f32"]
    save_file(other[3], tmp_path / "f32.safetensors")
    refused("4 channels of 8 pixels.*5 channels of 32", tmp_path / "mine.safetensors", tmp_path / "f32.safetensors")
    refused("a decoder where an encoder", tmp_path / "tae_decoder.safetensors", tmp_path / "mine.safetensors")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("name", CASES)
def test_refuses_weights_that_do_not_fit(tmp_path, name, half):
    w = {"encoder": CASES[name][2], "decoder": CASES[name][3]}
    files = {h: tmp_path / f"{h}.safetensors" for h in w}

    def given(changed):
        save_file({**w, half: changed}["encoder"], files["encoder"])
        save_file({**w, half: changed}["decoder"], files["decoder"])
        refused(match, files["encoder"], files["decoder"])

    mine, last = w[half], max(int(k.split(".")[0]) for k in w[half])
    block = next(k for k in mine if ".conv.2.bias" in k)
    match = f"1 missing .*{block}"
    given({k: v for k, v in mine.items() if k != block})
    match = "1 unexpected .*stray"
    given(mine | {f"{last}.stray": torch.zeros(2)})
    match = "1 of another shape"
    given(mine | {block: torch.zeros(3)})
    match = "no TAESD layout"
    given({k: v for k, v in mine.items() if not k.startswith(f"{last}.")})
    given(mine | {"conv_in.weight": torch.zeros(2)})
    given(mine | {f"{last}.weight": torch.zeros(2)})
    given({k: v for k, v in mine.items() if k != f"{last}.weight"})
    given({})


def test_refuses_pickles_and_what_is_no_tensor(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("opened",)

    torch.save({"0.weight": Evil()}, tmp_path / "encoder.pth")
    refused("holds more than tensors", tmp_path / "encoder.pth", tmp_path / "encoder.pth")
    torch.save([1, 2], tmp_path / "encoder.pth")
    refused("holds more than tensors", tmp_path / "encoder.pth", tmp_path / "encoder.pth")
    (tmp_path / "encoder.safetensors").write_bytes(b"nonsense")
    refused("damaged", tmp_path / "encoder.safetensors", tmp_path / "encoder.safetensors")
    (tmp_path / "encoder.onnx").write_bytes(b"nonsense")
    refused("a weight file ends in", tmp_path / "encoder.onnx", tmp_path / "encoder.onnx")

"""Codecs from diffusers folders against diffusers' own VAEs and what their pipelines do to latents."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from stillroom.codecs.codec import Codec, require_signed_as_given
from stillroom.codecs.folders import DiffusersDecoder, DiffusersEncoder, from_diffusers, require_usable
from stillroom.codecs.klt import BlockDecoder
from stillroom.data import LatentSpace, Photos, Tensors
from stillroom.nets import build, buildable, describe
from stillroom.nets.coding import Decoder
from stillroom.nets.vit import ViTDecoder
from stillroom.recipes._drawing import last_weight
from stillroom.settings import Refusal
from stillroom.train import Product
from stillroom.train.product import load_product, save_product

diffusers: Any = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"
MEANS, STDS = (0.2, -0.4, 0.1, 1.5), (0.5, 2.0, 1.25, 0.75)


def alive(vae):
    """Weights and statistics that nothing can be mistaken without being seen."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.3 / max(p[0].numel() if p.ndim > 1 else 16, 1) ** 0.5))
        for name, b in vae.named_buffers():
            if name in ("bn.running_mean", "bn.running_var"):
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return vae.eval()


def kl(levels=4, cls="AutoencoderKL", **more):
    return alive(getattr(diffusers, cls)(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, latent_channels=4, **more,
    ))


def tiny(**more):
    return alive(diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1), latent_channels=4, **more,
    ))


def dc(**more):
    return alive(diffusers.AutoencoderDC(**{
        "latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.41407,
        "encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16),
        "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_qkv_multiscales": ((), (), (5,)), "decoder_qkv_multiscales": ((), (), (5,)),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), **more,
    }))


def patched(z):
    """As Flux2Pipeline packs 2x2 latents: channel-major."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def column(values):
    return torch.tensor(values).view(1, -1, 1, 1)


def shifted(shift, scaling):
    return lambda vae, raw: (raw - shift) * scaling


def flux2_norm(vae, raw):
    mean, var = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
    return (patched(raw) - mean) / torch.sqrt(var + vae.config.batch_norm_eps)


CASES = {   # the VAE, what its pipeline does to raw latents, pixels per latent, centre of latent 0, channels
    "sd15": (lambda: kl(), shifted(0.0, 0.18215), 8, 7.0, 4),
    "sd3": (lambda: kl(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
            shifted(0.0609, 1.5305), 8, 7.0, 4),
    "playground": (lambda: kl(scaling_factor=0.5, latents_mean=MEANS, latents_std=STDS),
                   lambda vae, raw: (raw - column(MEANS)) * 0.5 / column(STDS), 8, 7.0, 4),
    "f4": (lambda: kl(3, scaling_factor=1.0), shifted(0.0, 1.0), 4, 3.0, 4),
    "flux2": (lambda: kl(cls="AutoencoderKLFlux2"), flux2_norm, 16, 11.0, 16),
    "tiny": (lambda: tiny(), shifted(0.0, 1.0), 8, 0.0, 4),
    "tiny scaled": (lambda: tiny(scaling_factor=0.8, shift_factor=0.3), shifted(0.3, 0.8), 8, 0.0, 4),
    "dc": (lambda: dc(), shifted(0.0, 0.41407), 4, 1.5, 4),
    "dc conv": (lambda: dc(downsample_block_type="Conv", upsample_block_type="interpolate"), shifted(0.0, 0.41407),
                4, 0.0, 4),
}


def raw_latents(vae, x):
    answer = vae.encode(x)
    if hasattr(answer, "latent_dist"):
        return answer.latent_dist.mode()
    return answer.latents if hasattr(answer, "latents") else answer.latent


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photograph_like(count=4, size=32, seed=0):
    """Smooth: large squares of colour under a little noise."""
    coarse = functional.interpolate(images(count, 3, size // 8, size // 8, seed=seed), size=(size, size))
    return (0.8 * coarse + 0.1 * images(count, 3, size, size, seed=seed + 1)).clamp(-1, 1)


def edit(folder: Path, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_diffusion_side_is_what_the_pipeline_computes(tmp_path, name):
    make, normalised, factor, offset, channels = CASES[name]
    vae = make()
    vae.save_pretrained(tmp_path)
    codec, x = from_diffusers(tmp_path), images(2, 3, 32, 48)
    assert (codec.space.factor, codec.space.offset, codec.space.channels) == (factor, offset, channels)
    raw = raw_latents(vae, x)
    z = codec.encode(x)
    assert torch.allclose(z, normalised(vae, raw), atol=2e-5)
    assert torch.allclose(codec.decode(z), vae.decode(raw).sample, atol=2e-5)


@torch.no_grad()
def test_the_posterior_has_the_variance_of_scaled_samples(tmp_path):
    vae = kl(scaling_factor=0.5, latents_mean=MEANS, latents_std=STDS)
    vae.save_pretrained(tmp_path)
    x = images(2, 3, 32, 32)
    posterior, theirs = from_diffusers(tmp_path).posterior(x), vae.encode(x).latent_dist
    assert posterior.logvar is not None
    assert torch.allclose((posterior.logvar / 2).exp(), theirs.std * 0.5 / column(STDS), rtol=1e-4)
    flux2 = kl(cls="AutoencoderKLFlux2")
    flux2.save_pretrained(tmp_path / "2")
    posterior, theirs = from_diffusers(tmp_path / "2").posterior(x), flux2.encode(x).latent_dist
    assert posterior.logvar is not None
    std = torch.sqrt(flux2.bn.running_var + flux2.config.batch_norm_eps).view(1, -1, 1, 1)
    assert torch.allclose((posterior.logvar / 2).exp(), patched(theirs.std) / std, rtol=1e-4)


PLAIN = {"encoder_block_types": "ResBlock", "encoder_qkv_multiscales": ((), (), ())}
MIRRORED = {
    "sd15": lambda: kl(mid_block_add_attention=False), "f4": lambda: kl(3, mid_block_add_attention=False),
    "flux2": lambda: kl(cls="AutoencoderKLFlux2", mid_block_add_attention=False), "tiny": tiny,
    "dc": lambda: dc(**PLAIN),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_latents_are_centred_where_the_space_says(tmp_path, name):
    """With kernels that equal their mirror images and one grey picture, what a latent looks at is symmetric about its
    centre. The measured centre is exact, so a wrong padding would be off by whole pixels."""
    vae = MIRRORED[name]()
    with torch.no_grad():
        for m in vae.encoder.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.add_(m.weight.flip(2)).add_(m.weight.flip(3))
                if name == "dc":        # 2x2 pixels folded into channels are mirrored too
                    m.weight.copy_(m.weight.mean(1, keepdim=True).expand_as(m.weight))
    vae.save_pretrained(tmp_path)
    codec = from_diffusers(tmp_path)
    f, offset = codec.space.factor, codec.space.offset
    x = torch.full((1, 3, 32 * f, 32 * f), 0.3, requires_grad=True)
    (grad,) = torch.autograd.grad(codec.answer(x)[0, : codec.space.channels, 16, 16].sum(), x)
    seen = grad[0].square().sum(0)
    seen = (seen - 1e-4 * seen.max()).clamp(min=0)      # norms look at everything, very faintly
    at = torch.arange(32 * f, dtype=torch.float32)
    for side in (0, 1):
        assert abs(float((seen.sum(side) * at).sum() / seen.sum()) - (16 * f + offset)) < 0.05


@pytest.mark.parametrize("name", ["sd15", "flux2", "tiny", "dc"])
@torch.no_grad()
def test_any_size_goes_in_and_comes_back(tmp_path, name):
    vae = CASES[name][0]()
    vae.save_pretrained(tmp_path)
    codec = from_diffusers(tmp_path)
    f = codec.space.factor
    for height, width in ((1, 1), (f + 1, 2 * f - 1), (f, 3 * f)):
        x = images(1, 3, height, width)
        z = codec.encode(x)
        assert z.shape[-2:] == (-(-height // f), -(-width // f)) and codec.reconstruct(x).shape == x.shape
        whole = functional.pad(x, (0, -width % f, 0, -height % f), mode="replicate")
        assert torch.allclose(z, codec.encode(whole), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_product_holds_the_codec(tmp_path, name):
    CASES[name][0]().save_pretrained(tmp_path / "vae")
    codec = from_diffusers(tmp_path / "vae")
    save_product(Product("codec", {"codec": codec}, {}), tmp_path / "product")
    again = load_product(tmp_path / "product").parts["codec"]
    assert isinstance(again, Codec) and again.space == codec.space
    x = images(2, 3, 32, 32)
    # not equal to the bit: other strides of the same weights take other kernels
    assert torch.allclose(again.encode(x), codec.encode(x), atol=1e-5)
    assert torch.allclose(again.reconstruct(x), codec.reconstruct(x), atol=1e-5)
    weights = load_file(tmp_path / "product/codec.safetensors")
    gone = next(k for k in weights if k.startswith("decoder."))
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "product/codec.safetensors")
    with pytest.raises(Refusal):
        load_product(tmp_path / "product")


@buildable
class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return self.conv(x)


def test_a_student_stands_on_the_teachers_decoder_alone(tmp_path):
    vae = kl()
    vae.save_pretrained(tmp_path / "vae")
    teacher = from_diffusers(tmp_path / "vae")
    codec = Codec(Student(), teacher.decoder, teacher.space)
    assert not any("quant_conv" in k and "post" not in k for k in codec.state_dict())
    assert sum(p.numel() for p in codec.decoder.parameters()) == sum(
        p.numel() for part in (vae.decoder, vae.post_quant_conv) for p in part.parameters()
    )
    save_product(Product("codec", {"codec": codec}, {}), tmp_path / "product")
    again = load_product(tmp_path / "product").parts["codec"]
    assert isinstance(again, Codec)
    z = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        assert torch.allclose(again.decode(z), vae.decode(z / 0.18215).sample, atol=2e-5)


def test_half_a_model_leaves_no_other_half_behind(monkeypatch):
    made = []
    build_vae = diffusers.AutoencoderKL.from_config

    def seen(config):
        vae = build_vae(config)
        made.append((weakref.ref(vae.encoder), weakref.ref(vae.decoder), weakref.ref(vae)))
        return vae

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_config", seen)
    config = {"block_out_channels": (8,), "norm_num_groups": 2}
    encoder, decoder = DiffusersEncoder("AutoencoderKL", config), DiffusersDecoder("AutoencoderKL", config)
    gc.collect()
    assert [[r() is None for r in refs] for refs in made] == [[False, True, True], [True, False, True]]
    assert all(k.startswith(("encoder.", "quant_conv.")) for k in encoder.state_dict())
    assert all(k.startswith(("decoder.", "post_quant_conv.")) for k in decoder.state_dict())
    assert isinstance(build(json.loads(json.dumps(describe(encoder)))), DiffusersEncoder)


@pytest.mark.parametrize("name", ["sd15", "flux2", "tiny", "dc"])
def test_features_are_what_the_decoder_sees_first(tmp_path, name):
    vae = CASES[name][0]()
    vae.save_pretrained(tmp_path)
    codec = from_diffusers(tmp_path)
    codec.decoder.requires_grad_(False)
    net: Any = codec.decoder.decoder
    seen = []
    inner = {"sd15": lambda: [net.mid_block], "flux2": lambda: [net.mid_block], "dc": lambda: [net.up_blocks[-1]],
             "tiny": lambda: [net.layers[2]]}[name]()
    hooks = [m.register_forward_hook(lambda m, i, o: seen.extend((i[0], o))) for m in inner]
    z = torch.randn(1, codec.space.channels, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    codec.decode(z)
    for hook in hooks:
        hook.remove()
    maps = codec.features(z)
    assert len(maps) == 2 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, seen, strict=True))
    (grad,) = torch.autograd.grad(maps[-1].square().sum(), z)
    assert float(grad.abs().min()) > 0


def last_run(net: nn.Module, z: torch.Tensor) -> nn.Module:
    """Of its convolutions and linear layers."""
    ran: list[nn.Module] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, i, o: ran.append(m)) for m in layers]
    net(z)
    for hook in hooks:
        hook.remove()
    return ran[-1]


@pytest.mark.parametrize("name", ["sd15", "flux2", "tiny", "dc", "conv", "unshuffle", "vit"])
@torch.no_grad()
def test_gradients_are_compared_at_the_layer_that_runs_last(tmp_path, name):
    if name in CASES:
        CASES[name][0]().save_pretrained(tmp_path)
        codec = from_diffusers(tmp_path)
        net, channels = codec.decoder, codec.space.channels
    else:
        channels = 4
        net = {"conv": lambda: Decoder(4, 8, (1, 1, 1)), "vit": lambda: ViTDecoder(4, 2, 4, 24, 1, 3),
               "unshuffle": lambda: Decoder(4, 8, (1, 1, 1, 1), stem="unshuffle")}[name]()
    assert last_weight(net) is last_run(net, torch.randn(1, channels, 4, 4)).weight


def test_a_half_without_layers_is_refused_where_gradients_are_to_be_compared():
    with pytest.raises(Refusal, match="BlockDecoder has no layers"):
        last_weight(BlockDecoder(4, 2))


def test_layouts_of_folders(tmp_path):
    vae, x = kl(), images(1, 3, 16, 16)
    vae.save_pretrained(tmp_path / "alone")
    truth = from_diffusers(tmp_path / "alone").encode(x)
    shutil.copytree(tmp_path / "alone", tmp_path / "pipeline/vae")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    assert torch.equal(from_diffusers(str(tmp_path / "pipeline")).encode(x), truth)
    vae.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(from_diffusers(tmp_path / "sharded").encode(x), truth)
    half = {k: v.half() for k, v in load_file(tmp_path / "alone" / WEIGHTS).items()}
    save_file(half, tmp_path / "alone" / WEIGHTS)
    z = from_diffusers(tmp_path / "alone").encode(x)
    assert z.dtype == torch.float32 and torch.allclose(z, truth, atol=1e-2)


def test_attention_keys_of_old_checkpoints_and_keys_of_pipelines(tmp_path):
    vae, x = kl(), images(1, 3, 16, 16)
    vae.save_pretrained(tmp_path)
    truth = from_diffusers(tmp_path).reconstruct(x)
    weights = load_file(tmp_path / WEIGHTS)
    for new, name in {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}.items():
        weights = {k.replace(new, name): w for k, w in weights.items()}
    assert sum(".query." in k for k in weights) == 4
    save_file(weights, tmp_path / WEIGHTS)
    assert torch.equal(from_diffusers(tmp_path).reconstruct(x), truth)
    kl(cls="AutoencoderKLFlux2").save_pretrained(tmp_path / "2")
    edit(tmp_path / "2", force_upcast=True)         # as the folder on the hub has it
    assert from_diffusers(tmp_path / "2").space.factor == 16


# Refusals

def refused(folder, match):
    with pytest.raises(Refusal, match=match) as told:
        from_diffusers(folder)
    assert "\n" not in str(told.value)


@pytest.fixture
def folder(tmp_path):
    kl().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "quant_conv.bias", "decoder.conv_out.bias"])
def test_refuses_weights_that_do_not_fit(folder, name):
    weights = load_file(folder / WEIGHTS)
    save_file({k: w for k, w in weights.items() if k != name}, folder / WEIGHTS)
    refused(folder, f"1 missing .{name}")
    save_file(weights | {"stray": torch.zeros(2)}, folder / WEIGHTS)
    refused(folder, "1 unexpected .stray")
    save_file(weights | {name: torch.zeros(1, 1)}, folder / WEIGHTS)
    refused(folder, "1 of another shape")
    (folder / WEIGHTS).write_bytes(b"never safetensors")
    refused(folder, "damaged")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    refused(folder, "is a pickle")


def test_refuses_a_flux2_without_its_statistics(tmp_path):
    kl(cls="AutoencoderKLFlux2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({k: w for k, w in weights.items() if k != "bn.running_var"}, tmp_path / WEIGHTS)
    refused(tmp_path, "1 missing .bn.running_var")
    save_file(weights, tmp_path / WEIGHTS)
    edit(tmp_path, scaling_factor=0.3611, shift_factor=0.1)
    refused(tmp_path, "contradicts the normaliser.*BatchNorm.*scaling_factor and shift_factor")
    edit(tmp_path, scaling_factor="drop", shift_factor="drop", patch_size=[1, 1])
    refused(tmp_path, r"patch_size \[1, 1\]")


@pytest.mark.parametrize(("changes", "match"), [
    ({"shift_factor": 0.1, "latents_mean": MEANS, "latents_std": STDS}, "shift_factor 0.1 and latents_mean both"),
    ({"latents_mean": MEANS}, "only latents_mean is set"),
    ({"latents_std": STDS}, "only latents_std is set"),
    ({"latents_mean": MEANS, "latents_std": STDS[:3]}, "4 latent channels, 4 latents_mean, 3 latents_std"),
    ({"latents_mean": MEANS, "latents_std": (1, 1, 0, 1)}, "above 0"),
    ({"scaling_factor": 0}, "scaling_factor 0 must be above 0"),
    ({"scaling_factor": -0.18}, "scaling_factor -0.18 must be above 0"),
])
def test_refuses_scaling_that_contradicts_the_normaliser(folder, changes, match):
    edit(folder, **changes)
    refused(folder, f"scaling contradicts the normaliser: .*{match}")


@pytest.mark.parametrize(("changes", "match"), [
    ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan has a time axis"),
    ({"_class_name": "AutoencoderKLTemporalDecoder"}, "time axis"),
    ({"_class_name": "AutoencoderTini"}, "did you mean 'AutoencoderTiny'"),
    ({"_class_name": "StillroomAutoencoder"}, "give that codec's run or product"),
    ({"_class_name": "drop"}, "model without _class_name"),
    ({"latent_chanels": 4}, "did you mean 'latent_channels'"),
    ({"in_channels": 4}, "3 channels.*4 in"),
    ({"down_block_types": ["DownEncoderBlok2D"] * 4}, "diffusers cannot build it"),
    ({"norm_num_groups": 3}, "diffusers cannot build it"),
    ({"layers_per_block": 2}, "missing"),
    ({"block_out_channels": [8, 8, 8, 16]}, "of another shape"),
])
def test_refuses_configurations_that_do_not_fit(folder, changes, match):
    edit(folder, **changes)
    refused(folder, match)


def test_refuses_tiny_models_that_do_not_fit(tmp_path):
    tiny().save_pretrained(tmp_path)
    edit(tmp_path, num_decoder_blocks=[1, 1], decoder_block_out_channels=[8, 8])
    refused(tmp_path, "shrinks by 8, its decoder enlarges by 2")
    edit(tmp_path, num_decoder_blocks=[1] * 4, decoder_block_out_channels=[8] * 4,
         encoder_block_out_channels=[8, 8, 8, 16])
    refused(tmp_path, "must be equal")


@pytest.mark.parametrize(("name", "match"), [
    ("vae.onnx", "ONNX"), ("vae.pkl", "a pickle is never opened"), ("sd.ckpt", "from_single_file"),
    ("vae.bin", "a pickle is never opened"), ("vae.gguf", "is a file"),
])
def test_refuses_files(tmp_path, name, match):
    (tmp_path / name).write_bytes(b"never read")
    refused(tmp_path / name, match)


def test_refuses_folders_without_a_codec(folder, tmp_path):
    (folder / "config.json").write_text("{")
    refused(folder, "is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "holds no codec")
    refused(tmp_path / "nowhere", "no folder")
    with pytest.raises(Refusal, match="AutoencoderKL"):
        DiffusersEncoder("AutoencoderKl", {})


# The gate

class Means(nn.Module):
    """A codec that keeps the mean of 4x4 pixels, in latents of deviation `scale` times theirs."""

    def __init__(self, scale=2.0, gain=1.0):
        super().__init__()
        self.scale, self.gain = scale, gain

    def forward(self, x):
        return functional.avg_pool2d(x, 4) * self.scale


class Enlarged(Means):
    def forward(self, x):
        return self.gain * functional.interpolate(x / self.scale, scale_factor=4)


def means(scale=2.0, gain=1.0):
    return Codec(Means(scale, gain), Enlarged(scale, gain), LatentSpace(3, 4, (0.0,) * 3, (1.0,) * 3, 1.5))


def test_the_gate_of_codecs():
    x = photograph_like()
    require_usable(means(), x, "good")
    require_usable(means(), x[:1], "good for one picture")
    for codec, match in ((means(gain=0.0), "worse than the mean"), (means(gain=float("nan")), "worse than the mean"),
                         (means(20.0), "scaling contradicts the latents.*9"), (means(0.1), "scaling contradicts")):
        with pytest.raises(Refusal, match=f"bad: .*{match}"):
            require_usable(codec, x, "bad")
    with pytest.raises(Refusal, match="2 \\* x - 1"):
        require_signed_as_given(Tensors(x.abs()), x.abs())
    require_signed_as_given(Photos(8), x.abs())         # from files, and brought to [-1, 1] already: bright ones
    with pytest.raises(Refusal, match="flat"):
        require_usable(means(), torch.full((2, 3, 8, 8), -0.5), "flat")


def test_the_gate_turns_back_an_untrained_model_and_a_colour_of_its_own(folder):
    with pytest.raises(Refusal, match="worse than the mean"):
        require_usable(from_diffusers(folder), photograph_like(), "untrained")
    # pictures that are each nearly one colour: a codec of mean colours must not pass for one of pictures
    x = images(4, 3, 1, 1) + 0.05 * images(4, 3, 16, 16, seed=2)

    class Colour(nn.Module):
        def forward(self, z):
            return z.mean((2, 3), keepdim=True).expand(-1, 3, 16, 16) / 2 + 1e-3

    codec = Codec(Means(), Colour(), LatentSpace(3, 4, (0.0,) * 3, (1.0,) * 3, 1.5))
    with pytest.raises(Refusal, match="mean colour"):
        require_usable(codec, x.clamp(-1, 1), "colours")

"""Exports: what is written answers as the codec does, in diffusers' pipelines and without stillroom."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillroom.codecs.codec import Codec
from stillroom.codecs.export import to_diffusers, to_module, to_onnx, to_taesd
from stillroom.codecs.export.card import table
from stillroom.codecs.export.layout import halves
from stillroom.codecs.export.source import standalone
from stillroom.codecs.klt import fit_klt
from stillroom.codecs.taesd import from_taesd
from stillroom.data import LatentSpace
from stillroom.nets.build import buildable
from stillroom.nets.coding import Decoder, Encoder
from stillroom.settings import Refusal

CARD = {"title": "A test codec", "teacher": "noise", "licence": "apache-2.0", "credits": ["nobody"], "size": 64}


def steps(count, start, stop):
    return tuple(start + (stop - start) * i / max(1, count - 1) for i in range(count))


def lively(codec):
    """Weights large enough that answers vary with the picture, and no zero biases."""
    torch.manual_seed(3)
    for p in codec.parameters():
        p.data = torch.randn_like(p) * (1.2 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1)
    return codec.eval().requires_grad_(False)


def tiny(channels=16, moments=False, **changes):
    """Both halves in TAESD's layout, with constants to fold."""
    count = 2 * channels if moments else channels
    encoder = Encoder(channels, 8, (1, 1, 1, 1), moments=moments, shift=steps(count, -1, 1), scale=steps(count, 0.5, 2),
                      **changes)
    decoder = Decoder(channels, 8, (1, 1, 1, 1))
    space = LatentSpace(channels, 8, (0.0,) * channels, (1.0,) * channels, encoder.offset, (0.0, 1.0))
    return lively(Codec(encoder, decoder, space))


def student(channels=16, scaling=0.3611, shift=0.1159, moments=False):
    """A student before the decoder of an AutoencoderKL."""
    from stillroom.codecs.folders import DiffusersDecoder

    encoder = Encoder(channels, 8, (1, 1, 1, 1), padding="asymmetric", moments=moments)
    decoder = DiffusersDecoder("AutoencoderKL", {
        "latent_channels": channels, "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": False, "use_post_quant_conv": False,
    })
    space = LatentSpace(channels, encoder.factor, (shift,) * channels, (1 / scaling,) * channels, encoder.offset)
    return lively(Codec(encoder, decoder, space))


def statistics(channels=4):
    """Own nets on both sides that no layout of diffusers has, and a mean and deviation for every channel."""
    encoder = Encoder(channels, 8, (0, 0, 1, 1), stem="unshuffle", padding="asymmetric", moments=True)
    decoder = Decoder(channels, 8, (1, 1, 0, 0), stem="unshuffle", soft_clamp=False)
    space = LatentSpace(channels, 8, steps(channels, -1, 1), steps(channels, 0.5, 3), encoder.offset)
    return lively(Codec(encoder, decoder, space))


def klt():
    torch.manual_seed(0)
    return fit_klt(torch.rand(8, 3, 64, 64) * 2 - 1, 8, 4)


def picture(height=48, width=64, batch=1):
    torch.manual_seed(5)
    return torch.rand(batch, 3, height, width) * 2 - 1


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1e-12, float(b.max() - b.min()))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """AutoModel with its copies of module files in a folder of the test."""
    from diffusers.models.auto_model import AutoModel
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return lambda folder, **more: AutoModel.from_pretrained(str(folder), trust_remote_code=True, **more)


def diffusion_side(vae, x):
    found = vae.encode(x)
    z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def pixels(vae, z):
    return vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample


MAKERS = {"tiny": tiny, "student": student, "moments": lambda: student(moments=True), "statistics": statistics,
          "klt": klt}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_diffusers_folder_answers_as_the_codec_does(kind, tmp_path, auto):
    codec, x = MAKERS[kind](), picture()
    folder = to_diffusers(codec, tmp_path / "out", CARD)
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == ("AutoencoderTiny" if kind == "tiny" else "StillroomAutoencoder")
    if kind == "tiny":
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        vae = AutoencoderTiny.from_pretrained(folder)
    else:
        vae = auto(folder)
    with torch.no_grad():
        z = codec.encode(x)
        assert close(diffusion_side(vae, x), z) and close(pixels(vae, z), codec.decode(z))
        if kind != "tiny":
            odd = picture(47, 61)
            assert close(diffusion_side(vae, odd), codec.encode(odd))
            assert close(vae(odd).sample.clamp(-1, 1), codec.reconstruct(odd))


def test_a_student_keeps_the_teachers_own_side_and_its_variance(tmp_path, auto):
    x = picture()
    codec = student(moments=True)
    vae = auto(to_module(codec, tmp_path / "moments"))
    assert (vae.config.scaling_factor, vae.config.shift_factor) == pytest.approx((0.3611, 0.1159))
    own, posterior = codec.answer(x), vae.encode(x).latent_dist
    assert close(posterior.mean, own[:, :16]) and close(posterior.logvar, own[:, 16:])
    bare = auto(to_module(student(), tmp_path / "bare")).encode(x).latent_dist
    assert float(bare.std.max()) < 1e-6 and close(bare.sample(), bare.mode())
    both = statistics()
    found = auto(to_module(both, tmp_path / "statistics")).encode(x).latent_dist
    assert close(found.logvar, both.posterior(x).logvar)


def test_half_precision_and_slices(tmp_path, auto):
    codec, x = student(), picture(batch=3)
    vae = auto(to_module(codec, tmp_path / "out"), torch_dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    z = diffusion_side(vae, x.bfloat16()).float()
    assert z.shape == (3, 16, 6, 8) and float((z - codec.encode(x)).abs().mean()) < 0.05 * float(codec.encode(x).std())
    whole = auto(tmp_path / "out")
    before = diffusion_side(whole, x)
    whole.enable_slicing()
    assert close(diffusion_side(whole, x), before) and close(pixels(whole, before), codec.decode(before))


def test_tiles_of_an_export_change_nothing(tmp_path, auto):
    codec, x = statistics(), picture(330, 410)
    vae = auto(to_module(codec, tmp_path / "out"))
    vae.enable_tiling()
    vae.tile_sample_min_size = 128
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    z = codec.encode(x)
    assert close(diffusion_side(vae, x), z) and len(seen) == 3 * 4
    assert close(pixels(vae, z), codec.decode(z))
    vae.disable_tiling()
    seen.clear()
    assert close(diffusion_side(vae, x), z) and len(seen) == 1


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_folder_with_wrong_weights_is_refused(damage, tmp_path, auto):
    folder = to_module(student(), tmp_path / "out")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "encoder.layers.1.conv.0.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["encoder.more"] = torch.zeros(1)
    else:
        weights[name] = weights[name][:4].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="encoder.more" if damage == "unexpected" else name):
        auto(folder)


NONE: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "image_encoder", "feature_extractor",
                                      "safety_checker"))
NO_TEXT: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                         "image_encoder", "feature_extractor"))


def flux(vae, channels=16):
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * channels, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()
    return quiet(FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **NO_TEXT))


def stable(vae, channels=4):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    ).eval()
    scheduler: Any = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, **NONE}
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def quiet(pipe) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(pipe):
    torch.manual_seed(1)
    if "Flux" in type(pipe).__name__:
        return {"prompt_embeds": torch.randn(1, 4, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.randn(1, 4, 8)}


def drawn(pipe, output="pt", **more) -> Any:
    return pipe(**prompt(pipe), height=64, width=96, num_inference_steps=2, generator=torch.Generator().manual_seed(2),
                output_type=output, **more).images


@pytest.mark.parametrize("make", [tiny, student])
def test_in_a_flux_pipeline(make, tmp_path, auto):
    pytest.importorskip("transformers")
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

    codec = make()
    vae = load(to_diffusers(codec, tmp_path / "vae"), auto)
    pipe = flux(vae)
    images = drawn(pipe)
    z = pipe._unpack_latents(drawn(pipe, "latent"), 64, 96, 8)
    assert close(images, codec.decode(z).clamp(-1, 1) / 2 + 0.5)         # text to image: decoded as the codec does

    again = quiet(FluxImg2ImgPipeline(**pipe.components))
    x = picture(64, 96)
    assert close(again._encode_vae_image(x, torch.Generator().manual_seed(0)), codec.encode(x))
    out = drawn(again, image=x / 2 + 0.5, strength=0.5)
    assert out.shape == (1, 3, 64, 96) and out.isfinite().all()

    if make is student:     # diffusers up to 0.42 cannot tile an AutoencoderTiny of other than 4 channels
        pipe.vae.enable_tiling()
        assert drawn(pipe).isfinite().all() and drawn(again, image=x / 2 + 0.5, strength=0.5).isfinite().all()
        pipe.vae.disable_tiling()

    pipe.save_pretrained(tmp_path / "pipe")
    back = quiet(FluxPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True, **NO_TEXT))
    assert close(drawn(back), images)


def load(folder, auto):
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    config = json.loads((folder / "config.json").read_text())
    return AutoencoderTiny.from_pretrained(folder) if config["_class_name"] == "AutoencoderTiny" else auto(folder)


@pytest.mark.parametrize("make", [lambda: tiny(4), lambda: student(4, 0.18215, 0.0), klt])
def test_in_a_stable_diffusion_pipeline(make, tmp_path, auto):
    pytest.importorskip("transformers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

    codec = make()
    pipe = stable(load(to_diffusers(codec, tmp_path / "vae"), auto))
    images, z = drawn(pipe), drawn(pipe, "latent")
    assert close(images, (codec.decode(z) / 2 + 0.5).clamp(0, 1))

    again = quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    x, seed = picture(64, 96), torch.Generator().manual_seed(0)
    noised = again.prepare_latents(x, torch.tensor([0]), 1, 1, torch.float32, torch.device("cpu"), seed)
    seed.manual_seed(0)
    if hasattr(pipe.vae.encode(x), "latent_dist"):
        torch.randn(noised.shape, generator=seed)           # the posterior's own noise, of no weight
    noise = torch.randn(noised.shape, generator=seed)
    assert close(noised, pipe.scheduler.add_noise(codec.encode(x), noise, torch.tensor([0])))
    pipe.vae.enable_tiling()
    assert drawn(pipe).isfinite().all() and drawn(again, image=x / 2 + 0.5, strength=0.9).isfinite().all()
    pipe.vae.disable_tiling()

    pipe.save_pretrained(tmp_path / "pipe")
    back = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True, **NONE))
    assert close(drawn(back), images)


def snippet(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


ALONE = """
import sys
sys.modules["stillroom"] = None
import json, os, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
for place in json.loads(sys.argv[1]):
    os.chdir(place)
    x = load_file("../x.safetensors")["x"]
    space = {}
    exec(Path("snippet.py").read_text(), space)
    vae = space["vae"]
    with torch.no_grad():
        found = vae.encode(x)
        z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        save_file({"z": z.contiguous(), "y": vae.decode(z).sample.contiguous()}, "answers.safetensors")
from diffusers import FluxPipeline
os.chdir("..")
pipe = FluxPipeline.from_pretrained("pipe", trust_remote_code=True, **dict.fromkeys((
    "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")))
pipe.set_progress_bar_config(disable=True)
torch.manual_seed(1)
words = {"prompt_embeds": torch.randn(1, 4, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
drawn = pipe(**words, height=64, width=96, num_inference_steps=2, generator=torch.Generator().manual_seed(2),
             output_type="pt").images
save_file({"drawn": drawn.contiguous()}, "drawn.safetensors")
assert not [name for name in sys.modules if name.startswith("stillroom.")]
"""


def test_folders_and_their_snippets_work_where_stillroom_is_not_installed(tmp_path, auto):
    pytest.importorskip("transformers")
    makers = {"tiny": tiny, "student": student, "statistics": statistics, "klt": klt}
    codecs, x = {name: make() for name, make in makers.items()}, picture()
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name, codec in codecs.items():
        folder = to_diffusers(codec, tmp_path / name, CARD)
        (folder / "snippet.py").write_text(snippet(folder))
    pipe = flux(auto(tmp_path / "student"))
    pipe.save_pretrained(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps([str(tmp_path / name) for name in codecs])], cwd=tmp_path, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}, capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "auto_map" not in done.stderr
    assert "(1, 16, 32, 32) (1, 3, 256, 256)" in done.stdout
    for name, codec in codecs.items():
        found = load_file(tmp_path / name / "answers.safetensors")
        config = json.loads((tmp_path / name / "config.json").read_text())
        z = (found["z"] - config["shift_factor"]) * config["scaling_factor"]
        assert close(z, codec.encode(x)) and close(found["y"], codec.decode(codec.encode(x)))
    assert close(load_file(tmp_path / "drawn.safetensors")["drawn"], drawn(pipe))


@pytest.mark.parametrize("moments", [False, True])
def test_taesd_files_hold_the_reference_layout(moments, tmp_path):
    codec, x = tiny(16, moments), picture()
    folder = to_taesd(codec, tmp_path / "out", CARD)
    encoder, decoder = (load_file(folder / f"taesd_{half}.safetensors") for half in ("encoder", "decoder"))
    assert {"0.weight", "1.conv.0.weight", "2.weight"} <= encoder.keys() and "2.bias" not in encoder
    assert {"1.weight", "3.conv.4.bias", "5.weight"} <= decoder.keys() and "5.bias" not in decoder
    again = from_taesd(folder / "taesd_encoder.safetensors")
    z = codec.encode(x)
    assert close(again.encode(x), z) and close(again.decode(z), codec.decode(z))

    def conv(y, name, stride=1):
        return nn.functional.conv2d(y, encoder[f"{name}.weight"], encoder.get(f"{name}.bias"), stride, 1)

    def block(y, name):
        h = conv(conv(conv(y, f"{name}.conv.0").relu(), f"{name}.conv.2").relu(), f"{name}.conv.4")
        return (h + y).relu()

    y = block(conv((x + 1) / 2, "0"), "1")                  # by hand, as the reference computes it
    for level in (2, 4, 6):
        y = block(conv(y, level, 2), level + 1)
    assert close(conv(y, "8"), z)


@pytest.mark.parametrize("channels, scaling, shift, name", [
    (16, 0.3611, 0.1159, "taef1"), (16, 1.5305, 0.0609, "taesd3"), (4, 0.13025, 0.0, "taesdxl"),
    (4, 0.18215, 0.0, "taesd"), (8, 0.3611, 0.0, "taesd"),
])
def test_the_teachers_normaliser_is_folded_and_names_the_files(channels, scaling, shift, name, tmp_path):
    space = LatentSpace(channels, 8, (shift,) * channels, (1 / scaling,) * channels, image_range=(0.0, 1.0))
    encoder = Encoder(channels, 8, (1, 1, 1, 1), shift=steps(channels, -3, 3), scale=steps(channels, 1, 4))
    decoder = Decoder(channels, 8, (1, 1, 1, 1), shift=space.shift, scale=space.scale)
    codec, x = lively(Codec(encoder, decoder, space)), picture()
    again = from_taesd(to_taesd(codec, tmp_path / "out") / f"{name}_encoder.safetensors")
    z = codec.encode(x)
    assert close(again.encode(x), z) and close(again.decode(z), codec.decode(z))
    vae = load(to_diffusers(codec, tmp_path / "vae"), None)
    assert type(vae).__name__ == "AutoencoderTiny" and close(diffusion_side(vae, x), z)


def test_a_distilled_pair_before_a_teacher_in_full_range_has_the_layout(tmp_path):
    """As `distill encoder --stem conv --padding symmetric` and `distill decoder` leave them."""
    shift, scale = steps(16, -0.5, 0.5), steps(16, 1, 3)
    encoder = Encoder(16, 8, (1, 1, 1, 1), shift=shift, scale=scale, unit_range=True)
    decoder = Decoder(16, 8, (1, 1, 1, 1), shift=shift, scale=scale, unit_range=True)
    codec = lively(Codec(encoder, decoder, LatentSpace(16, 8, shift, scale)))
    again = from_taesd(to_taesd(codec, tmp_path / "pair", CARD) / "taesd_encoder.safetensors")
    x = torch.rand(1, 3, 40, 48) * 2 - 1
    assert torch.allclose(again.encode(x), codec.encode(x), atol=1e-5)
    assert torch.allclose(again.reconstruct(x), codec.reconstruct(x), atol=1e-5)


def test_the_decoders_range_is_folded():
    codec = tiny(4)
    codec.space = LatentSpace(4, 8, (0.0,) * 4, (1.0,) * 4, image_range=(-1.0, 3.0))
    z = torch.randn(1, 4, 6, 8)
    assert close(2 * halves(codec)[1](z) - 1, codec.decode(z))


def test_what_is_not_of_the_layout_is_refused_by_what_it_is(tmp_path):
    asymmetric = tiny(padding="asymmetric")
    signed = tiny()
    signed.space = LatentSpace(16, 8, (0.0,) * 16, (1.0,) * 16)
    scaled = tiny()
    scaled.space = LatentSpace(16, 8, (0.0,) * 16, (2.0,) * 16, image_range=(0.0, 1.0))
    for codec, words in ((student(), "distil the decoder too: stillroom distill decoder"), (asymmetric, "asymmetric"),
                         (signed, r"\[-1.0, 1.0\]"), (scaled, "clamp"), (statistics(), "unshuffle")):
        with pytest.raises(Refusal, match=words) as told:
            to_taesd(codec, tmp_path / "out")
        assert "\n" not in str(told.value) and not (tmp_path / "out").exists()


def test_comfy_is_promised_only_what_it_can_load(tmp_path):
    full = Codec(Encoder(4), Decoder(4), LatentSpace(4, 8, (0.0,) * 4, (1.0,) * 4, image_range=(0.0, 1.0)))
    told, warned = ((to_taesd(codec, tmp_path / name) / "README.md").read_text()
                    for name, codec in (("full", full), ("narrow", tiny())))
    assert "ComfyUI) load them" in told and "taef1" in told
    assert "width 64 and blocks (1, 3, 3, 3), and refuses" in warned


def test_taesd_snippet_runs_verbatim(tmp_path, monkeypatch, capsys):
    folder = to_taesd(tiny(), tmp_path / "out")
    monkeypatch.chdir(folder)
    exec(snippet(folder), {})
    assert capsys.readouterr().out.strip() == "latent channels: 16 width: 8"


def test_a_card_says_where_the_codec_comes_from(tmp_path):
    rows = [{"scale": 1.0, "PSNR": 30.12345, "kind": "a|b"}, {"scale": 1.5, "LPIPS": 0.01}]
    text = (to_diffusers(tiny(), tmp_path / "out", CARD, rows) / "README.md").read_text()
    for words in ("license: apache-2.0", "# A test codec", "teacher: noise", "credits: nobody", "size: 64",
                  "| scale | PSNR | kind | LPIPS |", "| 1 | 30.12 | a\\|b |  |", "| 1.5 |  |  | 0.01 |"):
        assert words in text
    assert table(rows).count("\n") == 3


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    for write in (to_diffusers, to_taesd, to_onnx):
        with pytest.raises(Refusal, match="new folder"):
            write(tiny(), tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and [p.name for p in (tmp_path / "mine").iterdir()] == [
        "note.txt"]


def test_an_export_that_answers_otherwise_is_not_left_behind(tmp_path, monkeypatch):
    from stillroom.codecs.export import folder

    wrong = tiny()
    monkeypatch.setattr(folder, "tiny_weights", lambda codec: {
        k: v * 1.01 for k, v in folder_weights(codec).items()})
    from stillroom.codecs.export.layout import tiny_weights as folder_weights

    with pytest.raises(RuntimeError, match="differ"):
        to_diffusers(wrong, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


CONSTANT = 3


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * CONSTANT


@buildable
class Own(nn.Module):
    """A class of a user's own file."""

    def forward(self, x):
        return helper(x)


def test_a_file_carries_what_its_classes_name_and_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    text = standalone([f"{Path(__file__).stem}:Own"])
    space = {}
    exec(text, space)
    assert float(space["Own"]()(torch.ones(()))) == 3 and "KL" not in space and "buildable" not in text
    assert "stillroom" not in text and "pytest" not in text


def test_a_class_that_cannot_be_carried_is_refused():
    with pytest.raises(Refusal, match="no 'Nothing'"):
        standalone(["stillroom.nets.coding:Nothing"])
    with pytest.raises(Refusal, match="rename one"):
        standalone(["stillroom.nets.dit:Attention", "stillroom.nets.unet:Attention"])


def test_a_card_tells_of_a_teacher_only_where_there_was_one(tmp_path):
    told = {"size": 32, "labels": False, "statistics": {"over": "channel", "pictures": 2048}, "reconstruction": 9.79}
    alone = (to_diffusers(tiny(), tmp_path / "alone", told) / "README.md").read_text()
    assert "# An image codec\n" in alone and "distill" not in alone and "teacher" not in alone
    assert "- labels: no\n- statistics: over channel, pictures 2048\n- reconstruction: 9.79\n" in alone
    taught = (to_diffusers(tiny(), tmp_path / "taught", {**told, "teacher": "noise"}) / "README.md").read_text()
    assert "# A distilled image codec\n" in taught and "vae, distillation]" in taught
    assert "- licence: not stated; those of the teacher and of the data apply\n" in taught

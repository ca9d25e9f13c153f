"""Representation encoders against transformers' own models, and AutoencoderRAE folders against diffusers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import refused
from stillroom.codecs import Codec, fingerprint
from stillroom.codecs.export import to_diffusers
from stillroom.codecs.files import Encoded, require_space
from stillroom.codecs.rae import from_diffusers_rae, statistics_of, to_diffusers_rae, token_codec
from stillroom.codecs.tokens import token_encoder
from stillroom.nets.vit import ViT, ViTDecoder
from stillroom.recipes.rae import opened
from stillroom.train import Product
from stillroom.train.product import load_product, save_product
from stillroom.train.teacher import open_codec

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
MLP = {"intermediate_size": 48}
MAE = {**SMALL, **MLP, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
       "decoder_intermediate_size": 32}
KINDS = {   # the class saved, its configuration, tokens that are not of patches
    "dinov2": ("Dinov2Model", SMALL, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {**SMALL, "num_register_tokens": 3}, 4),
    "dinov3_vit": ("DINOv3ViTModel", {**SMALL, **MLP, "num_register_tokens": 2}, 3),
    "siglip_vision_model": ("SiglipVisionModel", {**SMALL, **MLP}, 0),
    "vit_mae": ("ViTMAEForPreTraining", MAE, 1),
}
USUAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = {"siglip_vision_model": ((0.5,) * 3, (0.5,) * 3)}


def images(*shape, seed=0):
    """In [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def alive(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model.eval()


def made(kind):
    name, config, extra = KINDS[kind]
    cls = getattr(transformers, name)
    return alive(cls(cls.config_class(**config))), extra


@torch.no_grad()
def asked(model, kind, x, extra):
    """What transformers answers, its last norm's affine part made the identity: [B, C, h, w]."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in PIXELS.get(kind, USUAL))
    model = getattr(model, "vit", model)
    norm = next(m for n, m in model.named_modules() if n in ("layernorm", "norm", "post_layernorm"))
    norm.weight.fill_(1)
    norm.bias.zero_()
    x, more = (x - mean) / std, {}
    count = x.shape[-1] * x.shape[-2] // 16
    if kind == "vit_mae":
        model.config.mask_ratio = model.embeddings.config.mask_ratio = 0.0
        more = {"noise": torch.arange(count).float().expand(len(x), -1), "interpolate_pos_encoding": True}
    if kind.startswith("siglip_"):
        more = {"interpolate_pos_encoding": True}
    tokens = model(x, **more).last_hidden_state[:, extra:]
    return tokens.transpose(1, 2).reshape(len(x), -1, x.shape[-2] // 4, x.shape[-1] // 4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_those_of_the_model_without_the_affine_part(tmp_path, kind):
    model, extra = made(kind)
    model.save_pretrained(tmp_path)
    encoder, x = token_encoder(tmp_path, 4), images(2, 3, 16, 24)
    z = encoder(x)
    assert torch.allclose(z, asked(model, kind, x, extra), atol=1e-5)
    assert z.mean(1).abs().max() < 1e-5 and (z.var(1, unbiased=False) - 1).abs().max() < 0.01
    assert torch.allclose(encoder.train()(x), z)            # frozen: dropout and the like stay off
    assert not any(p.requires_grad for p in encoder.parameters())


@torch.no_grad()
def test_patches_keep_their_places_in_half_precision(tmp_path):
    """Of a masked autoencoder, which sorts them by numbers: above 256 bfloat16 has no two neighbouring whole ones."""
    made("vit_mae")[0].save_pretrained(tmp_path)
    encoder, x = token_encoder(tmp_path, 4), images(1, 3, 96, 96)
    exact = encoder(x)
    half = encoder.bfloat16()(x.bfloat16()).float()
    assert torch.nn.functional.cosine_similarity(half, exact, dim=1).min() > 0.9


@torch.no_grad()
def test_siglip_2_of_any_resolution_takes_patches_in_rows(tmp_path):
    """Its answer changes where a picture does: patch (i, j) of the map is the one that moves most."""
    config = transformers.Siglip2VisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
                                              num_patches=16, **MLP)
    alive(transformers.Siglip2VisionModel(config)).save_pretrained(tmp_path)
    encoder, x = token_encoder(tmp_path, 4), images(1, 3, 8, 20)
    changed = x.clone()
    changed[..., 4:8, 12:16] = 1 - changed[..., 4:8, 12:16]
    moved = (encoder(changed) - encoder(x)).square().sum(1)[0]
    assert moved.shape == (2, 5) and int(moved.argmax()) == 1 * 5 + 3
    weight, bias = encoder.model.embeddings.patch_embedding.weight, encoder.model.embeddings.patch_embedding.bias
    patch = ((x - 0.5) / 0.5)[0, :, 4:8, 12:16].permute(1, 2, 0).flatten()      # p, p, 3, as its processor has them
    seen = {}
    encoder.model.embeddings.patch_embedding.register_forward_hook(lambda m, i, o: seen.update(x=o))
    encoder(x)
    assert torch.allclose(seen["x"][0, 8], weight @ patch + bias, atol=1e-5)


@torch.no_grad()
def test_the_vision_tower_of_a_whole_siglip(tmp_path):
    vision = {**SMALL, **MLP}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    model = alive(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))
    model.save_pretrained(tmp_path)
    x = images(2, 3, 16, 16)
    theirs = asked(model.vision_model, "siglip_vision_model", x, 0)
    assert torch.allclose(token_encoder(tmp_path, 4)(x), theirs, atol=1e-5)


@torch.no_grad()
def test_pictures_are_brought_to_the_encoders_own_patches_and_pixels(tmp_path):
    model, extra = made("dinov2_with_registers")
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3],
                                                                   "image_std": [0.5, 0.25, 1.0]}))
    x = images(2, 3, 40, 20)
    z = token_encoder(tmp_path, 5)(x)                       # 8 x 4 tokens, whose patches of 4 pixels make 32 x 16
    small = torch.nn.functional.interpolate(x, (32, 16), mode="bicubic", align_corners=False)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1), torch.tensor([0.5, 0.25, 1.0]).view(-1, 1, 1)
    usual = tuple(torch.tensor(v).view(-1, 1, 1) for v in USUAL)
    assert torch.allclose(z, asked(model, "dinov2_with_registers", (small - mean) / std * usual[1] + usual[0], extra),
                          atol=1e-4)


def test_folders_that_are_no_encoder_are_refused_in_one_line(tmp_path):
    model, _ = made("dinov2")
    model.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    told, kept = config.read_text(), load_file(weights)
    config.write_text(told.replace('"dinov2"', '"dinov4"'))
    assert "a dinov4 is no known representation encoder; did you mean 'dinov" in refused(
        lambda: token_encoder(tmp_path, 4))
    config.write_text(json.dumps({"model_type": "bert"}))
    assert "a bert is no known representation encoder" in refused(lambda: token_encoder(tmp_path, 4))
    config.write_text(told)
    save_file({k: w for k, w in kept.items() if "norm1" not in k}, weights)
    assert "4 missing (encoder.layer.0.norm1.bias" in refused(lambda: token_encoder(tmp_path, 4))
    save_file(kept | {"stranger": torch.zeros(1)}, weights)
    assert "1 unexpected (stranger)" in refused(lambda: token_encoder(tmp_path, 4))
    save_file(kept | {"embeddings.cls_token": torch.zeros(1, 1, 8)}, weights)
    assert "1 of another shape (embeddings.cls_token)" in refused(lambda: token_encoder(tmp_path, 4))
    weights.write_bytes(b"nothing")
    assert "damaged" in refused(lambda: token_encoder(tmp_path, 4))
    weights.unlink()
    assert "model.safetensors is missing" in refused(lambda: token_encoder(tmp_path, 4))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "never opened" in refused(lambda: token_encoder(tmp_path, 4))
    config.unlink()
    assert "config.json is missing" in refused(lambda: token_encoder(tmp_path, 4))
    assert "no folder" in refused(lambda: token_encoder(tmp_path / "nowhere", 4))


@torch.no_grad()
def test_a_product_holds_the_encoder(tmp_path):
    model, _ = made("dinov2_with_registers")
    model.save_pretrained(tmp_path / "model")
    encoder = token_encoder(tmp_path / "model", 8)
    mean, std = torch.randn(32, 1, 1), torch.rand(32, 1, 1) + 0.5
    codec = token_codec(encoder, alive(ViTDecoder(32, 8, 4, 16, 1, 2)), mean, std, 8, (0.0, 1.0))
    save_product(Product("codec", {"codec": codec}, {}), tmp_path / "product")
    again, x = load_product(tmp_path / "product").parts["codec"], 2 * images(2, 3, 32, 32) - 1
    assert isinstance(again, Codec) and again.space == codec.space and fingerprint(again) == fingerprint(codec)
    assert torch.allclose(again.encode(x), codec.encode(x), atol=1e-5)
    assert torch.allclose(again.reconstruct(x), codec.reconstruct(x), atol=1e-5)


# ---- statistics ----


def own_codec(mean, std, seed=0):
    torch.manual_seed(seed)
    return token_codec(ViT(4, 16, 1, 2).eval(), alive(ViTDecoder(16, 4, 4, 16, 1, 2)), mean, std, 4, (-1.0, 1.0))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(16, 1, 1), (16, 4, 4)])
def test_latents_are_normalised_by_their_statistics_and_decoded_from_raw_tokens(shape):
    g = torch.Generator().manual_seed(3)
    mean, std = torch.randn(shape, generator=g), torch.rand(shape, generator=g) + 0.2
    codec, x = own_codec(mean, std), 2 * images(2, 3, 16, 16) - 1
    raw = own_codec(torch.zeros(16, 1, 1), torch.ones(16, 1, 1))
    tokens = raw.encode(x)
    assert torch.allclose(codec.encode(x), (tokens - mean) / std, atol=1e-5)
    assert torch.allclose(codec.decode(codec.encode(x)), raw.decode(tokens), atol=1e-5)
    assert all(torch.allclose(a.float(), b, rtol=1e-5, atol=1e-5)
               for a, b in zip(statistics_of(codec), (mean, std), strict=True))


def test_latents_of_another_normaliser_are_of_another_space():
    """Also where the statistics are per element, and lie in the halves: the space holds their means."""
    x = 2 * images(1, 3, 16, 16) - 1
    g = torch.Generator().manual_seed(3)
    for shape in ((16, 1, 1), (16, 4, 4)):
        mean, std = torch.randn(shape, generator=g), torch.rand(shape, generator=g) + 0.2
        one, other, again = own_codec(mean, std), own_codec(mean + 0.1, 2 * std), own_codec(mean, std)
        assert one.space == again.space
        with torch.no_grad():
            encoded = Encoded(one.encode(x)[0], one.space, (16, 16), 1.0)
        require_space(encoded, again, "mine")
        assert "another shift, scale" in refused(lambda e=encoded, o=other: require_space(e, o, "mine"))


def test_statistics_of_elements_are_of_one_size_of_picture():
    codec = own_codec(torch.zeros(16, 4, 4), torch.ones(16, 4, 4))
    line = refused(lambda: codec.encode(torch.zeros(1, 3, 20, 16)))
    assert "4 x 4 places with 16 channels, not of [16, 5, 4]" in line
    assert "not of [16, 4, 5]" in refused(lambda: codec.decode(torch.zeros(1, 16, 4, 5)))


# ---- diffusers ----

RAE = {"encoder_hidden_size": 64, "encoder_patch_size": 7, "encoder_num_hidden_layers": 1, "decoder_hidden_size": 32,
       "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48,
       "patch_size": 8, "encoder_input_size": 28}


def statistics(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"latents_mean": torch.randn(shape, generator=g) * 0.3, "latents_std": torch.rand(shape, generator=g) + 0.01}


CASES = {
    "elements": lambda: {"encoder_type": "dinov2", **statistics((64, 4, 4))},
    "channels": lambda: {"encoder_type": "dinov2", **statistics((64, 1, 1)), "scaling_factor": 0.7},
    "none": lambda: {"encoder_type": "dinov2", "encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3},
    "no mean": lambda: {"encoder_type": "dinov2", "latents_std": statistics((64, 4, 4))["latents_std"]},
    "mae": lambda: {"encoder_type": "mae", **statistics((64, 4, 4))},
    "siglip2": lambda: {"encoder_type": "siglip2", **statistics((64, 4, 4))},
}


def theirs(name):
    try:
        return alive(diffusers.AutoencoderRAE(**RAE, **CASES[name]()))
    except AttributeError as error:
        pytest.skip(f"diffusers {diffusers.__version__} cannot build it with transformers {transformers.__version__}: "
                    f"{error}")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_diffusers_folders_answer_as_diffusers_does_and_go_back(tmp_path, name, monkeypatch):
    model = theirs(name)
    model.save_pretrained(tmp_path / "one")
    codec, x = open_codec(str(tmp_path / "one")), images(2, 3, 32, 32)
    assert (codec.space.factor, codec.space.offset, codec.space.image_range) == (8, 3.5, (0.0, 1.0))
    z = model.encode(x).latent
    with torch.device("meta"):          # as a recipe opens it on a GPU
        state = open_codec(str(tmp_path / "one")).state_dict()
    assert all(torch.equal(state[k], v) for k, v in codec.state_dict().items())
    assert torch.allclose(codec.encode(2 * x - 1), z, atol=1e-5 * float(z.std()))
    assert torch.allclose((codec.decode(z) + 1) / 2, model.decode(z).sample, atol=1e-5)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / "one"))
    half, space = opened("owner/rae", 8)
    assert space == codec.space and torch.equal(half(x), codec.encoder(x))
    again = diffusers.AutoencoderRAE.from_pretrained(to_diffusers_rae(codec, tmp_path / "two")).eval()
    assert torch.allclose(again.encode(x).latent, z, atol=1e-5 * float(z.std()))
    assert torch.allclose(again.decode(z).sample, model.decode(z).sample, atol=1e-5)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "two/README.md").read_text(), re.DOTALL)
    exec(code.replace('"."', repr(str(tmp_path / "two"))), {})


OLD = (("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key"),
       ("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense"))


@torch.no_grad()
def test_released_folders_have_the_names_of_older_versions(tmp_path):
    """diffusers leaves such an encoder at random behind a warning, where its own transformers is another."""
    model = theirs("elements")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = {}
    for name, w in load_file(file).items():
        for new, old in OLD:
            name = name.replace(new, old) if name.startswith("encoder.") else name
        weights[name] = w
    save_file(weights, file)
    x = images(2, 3, 32, 32)
    z = model.encode(x).latent
    assert torch.allclose(from_diffusers_rae(tmp_path).encode(2 * x - 1), z, atol=1e-5 * float(z.std()))


@torch.no_grad()
def test_a_released_siglip_folder(tmp_path):
    """Put together by hand in the released layout, because not every pair of versions can write one."""
    vision = alive(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=64, patch_size=4, image_size=256, num_attention_heads=1, num_hidden_layers=1)))
    rest = alive(diffusers.AutoencoderRAE(**RAE, encoder_type="dinov2")).state_dict()
    weights = {k: w for k, w in rest.items() if not k.startswith("encoder.")}
    weights |= {f"encoder.vision_model.{k}": w for k, w in vision.state_dict().items() if "post_layernorm" not in k}
    save_file({k: w.contiguous() for k, w in weights.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {**RAE, "_class_name": "AutoencoderRAE", "encoder_type": "siglip2", "encoder_patch_size": 4,
              "encoder_input_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    codec, x = from_diffusers_rae(tmp_path), images(2, 3, 32, 32)
    small = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", align_corners=False)
    usual = tuple(torch.tensor(v).view(-1, 1, 1) for v in USUAL)
    z = asked(vision, "siglip_vision_model", (small - usual[0]) / usual[1] * 0.5 + 0.5, 0) / (1 + 1e-5)
    assert torch.allclose(codec.encode(2 * x - 1), z, atol=1e-5)


def edited(folder: Path, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return refused(lambda: from_diffusers_rae(folder))


def test_damaged_diffusers_folders_are_refused_in_one_line(tmp_path):
    theirs("elements").save_pretrained(tmp_path)
    file, told = tmp_path / "diffusion_pytorch_model.safetensors", (tmp_path / "config.json").read_text()
    for changes, words in (({"encoder_type": "clip"}, "'clip' is none of"), ({"reshape_to_2d": False}, "must be maps"),
                           ({"encoder_input_size": 30}, "no multiple of its patches"), ({"image_size": 40}, "size 40"),
                           ({"encoder_hidden_size": 60}, "multiple of 64"), ({"scaling_factor": 0.0}, "above 0"),
                           ({"num_channels": 1}, "3 channels, not 1"), ({"tau": 1.0}, "sets tau"),
                           ({"encoder_norm_mean": [0.1, 0.2, 0.3]}, "encoder_mean"),
                           ({"decoder_hidden_size": 48}, "another shape"), ({"encoder_input_size": 35}, "has shape")):
        assert words in edited(tmp_path, **changes), changes
        (tmp_path / "config.json").write_text(told)
    weights = load_file(file)
    for gone, words in (("_latents_std", "lack _latents_std"), ("decoder.decoder_pred.bias", "decoder_pred.bias"),
                        ("encoder.embeddings.cls_token", "1 missing (embeddings.cls_token)")):
        save_file({k: w for k, w in weights.items() if k != gone}, file)
        assert words in refused(lambda: from_diffusers_rae(tmp_path))
    save_file(weights | {"_latents_std": weights["_latents_std"] * float("nan")}, file)
    assert "not finite" in refused(lambda: from_diffusers_rae(tmp_path))


def test_what_diffusers_cannot_hold_is_said(tmp_path):
    own = own_codec(torch.zeros(16, 1, 1), torch.ones(16, 1, 1))
    assert "this codec's is a ViT" in refused(lambda: to_diffusers_rae(own, tmp_path / "no"))
    model, _ = made("dinov2_with_registers")
    model.save_pretrained(tmp_path / "model")
    codec = token_codec(token_encoder(tmp_path / "model", 4), ViTDecoder(32, 4, 4, 16, 1, 2), torch.zeros(32, 1, 1),
                        torch.ones(32, 1, 1), 4, (0.0, 1.0))
    assert "heads of 64 channels" in refused(lambda: to_diffusers_rae(codec, tmp_path / "no"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("side", [1, 4])
@torch.no_grad()
def test_an_encoder_of_our_own_is_exported_with_its_module(tmp_path, side):
    """With statistics per channel, or per element."""
    codec = own_codec(torch.full((16, side, side), 0.2), torch.full((16, side, side), 0.7))
    to_diffusers(codec, tmp_path / "out")
    read, info = diffusers.AutoModel.from_pretrained(str(tmp_path / "out"), trust_remote_code=True), codec.space
    x = 2 * images(1, 3, 16, 16) - 1
    z = (read.encode(x).latent_dist.mode() - read.config.shift_factor) * read.config.scaling_factor
    assert torch.allclose(z, codec.encode(x), atol=1e-5) and info.scale == pytest.approx((0.7,) * 16)

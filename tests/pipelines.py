"""Tiny text-to-image pipelines of the true classes with random weights, as folders; nothing is fetched."""

import json
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE = 64       # pixels, of 8 latents a side
FAMILIES = ("sd", "sdxl", "sd3", "flux")
TEXTS = ("a cat", "two dogs on a lawn", "the sea")


def alive(module, seed=0):
    """Weights that make the answer depend on everything: small ones hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.5 / max(p[0].numel() if p.ndim > 1 else 16, 1) ** 0.5))
    return module.eval()


def clip_tokenizer():
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def clip(width, projected=False, seed=1):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=64, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=16, projection_dim=width, bos_token_id=0,
                            eos_token_id=1, pad_token_id=1)
    return alive((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def t5_tokenizer():
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    return T5TokenizerFast(vocab=words, model_max_length=512)


def t5(width, seed=2):
    from transformers import T5Config, T5EncoderModel

    return alive(T5EncoderModel(T5Config(vocab_size=256, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
                                         feed_forward_proj="gated-gelu")), seed)


def vae(channels, shift=None):
    from diffusers import AutoencoderKL

    return alive(AutoencoderKL(
        latent_channels=channels, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.5,
        shift_factor=shift))


def unet(width, **more):
    from diffusers import UNet2DConditionModel

    return alive(UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=width,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more))


def chain(**more):
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         steps_offset=1, **more)


def flow(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def pipeline(family: str, **changes) -> Any:
    import diffusers as d

    a, t = clip_tokenizer(), t5_tokenizer()
    if family == "sd":
        parts = {"vae": vae(4), "text_encoder": clip(8), "tokenizer": a, "unet": unet(8), "scheduler": chain(),
                 "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return d.StableDiffusionPipeline(**(parts | changes))
    if family == "sdxl":
        net = unet(16, addition_embed_type="text_time", addition_time_embed_dim=4,
                   projection_class_embeddings_input_dim=8 + 6 * 4)
        parts = {"vae": vae(4), "text_encoder": clip(8), "text_encoder_2": clip(8, True, 3), "tokenizer": a,
                 "tokenizer_2": clip_tokenizer(), "unet": net, "scheduler": chain(prediction_type="v_prediction")}
        return d.StableDiffusionXLPipeline(**(parts | changes))
    if family == "sd3":
        net = alive(d.SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=20, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8))
        parts = {"vae": vae(4, 0.1), "text_encoder": clip(8, True), "text_encoder_2": clip(8, True, 3),
                 "text_encoder_3": t5(20), "tokenizer": a, "tokenizer_2": clip_tokenizer(), "tokenizer_3": t,
                 "transformer": net, "scheduler": flow(shift=3.0)}
        return d.StableDiffusion3Pipeline(**(parts | changes))
    net = alive(d.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4)))
    parts = {"vae": vae(4, 0.1), "text_encoder": clip(8), "text_encoder_2": t5(20), "tokenizer": a, "tokenizer_2": t,
             "transformer": net, "scheduler": flow(use_dynamic_shifting=True)}
    return d.FluxPipeline(**(parts | changes))


def folder_of(family: str, place: Path, **changes) -> Path:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline(family, **changes).save_pretrained(place)
    return place


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def prompts_file(place: Path, texts=TEXTS) -> Path:
    place.write_text("\n\n".join(texts) + "\n \n", encoding="utf-8")
    return place

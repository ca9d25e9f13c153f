"""A representation autoencoder: an encoder that was not trained to be decoded, and a decoder that manages all the same.

Problem: latents of reconstruction codecs say little of what a picture shows. Take the tokens of an encoder trained for
representation as latents, keep it frozen, and train only the way back.

Equation: with u = E(x) the tokens, whose last norm has no affine part, sigma ~ |N(0, tau^2)| or U(0, tau) per picture,

    min_D  E  a |D(u + sigma n) - x|_1 + b d(D(u + sigma n), x) + c w L_adv,    w = |g_rec| / |g_adv| <= 1e4

with d a distance of feature maps, L_adv the hinge of a critic of patches, and g the gradients at D's last layer.
Latents are (u - mean) / sqrt(variance + 1e-5). Noise comes before that and is not there at inference, as released.

`encoder = own` is trained first, on the same pictures: patches are hidden and painted (He et al. 2022, arXiv
2111.06377), and with `labels_weight` the mean of the tokens names the picture's class.

Paper: Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690.

Expect: reconstructions that look right and are decibels below those of a codec trained for them; tokens as wide as a
patch has numbers, or wider, so that flows over them want a time law shifted by their dimension.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from stillroom.codecs import Codec, from_diffusers
from stillroom.codecs.rae import EPSILON, Elements, is_rae, same_elements, token_codec
from stillroom.codecs.tokens import HUB, TokenEncoder, token_encoder
from stillroom.data import LatentSpace, at_most, sample
from stillroom.nets.bottleneck import Projected
from stillroom.nets.critic import PatchCritic
from stillroom.nets.folders import local_folder, read_json
from stillroom.nets.vit import MaskedViT, ViT, ViTDecoder
from stillroom.recipes._drawing import (
    Judged,
    OfPictures,
    add_hinges,
    errors,
    moments,
    reconstruction_of,
    refuse_critic,
    stages_of,
)
from stillroom.recipes._masking import OfTokens, masked_preview, masked_terms, new_masked, new_vit, refuse_own
from stillroom.recipes.codec import Squares, perceptual_of, require_whole_latents
from stillroom.settings import Count, NotNegative, Optimizer, Place, Refusal, expanded
from stillroom.train import Average, Product, Role, Stage
from stillroom.train.teacher import is_ours, part_of
from stillroom.train.world import pick_device


@dataclass(frozen=True, kw_only=True)
class Nets:
    width: Count = 192
    depth: Count = 4
    heads: Count = 3
    critic: Count = 32
    """Width of the critic's first layer."""


@dataclass(frozen=True, kw_only=True)
class Settings(Judged, OfTokens, Squares):
    encoder: Annotated[str, Place(names=("own", *HUB))] = "own"
    """`own`, `dinov2`, `siglip2`, `mae`, a folder or hub id of one of transformers' vision models or of an
    AutoencoderRAE, or a run of this recipe, whose latent space is kept. A folder of one of those names is ./NAME."""
    patch: Count = 8
    """Pixels a side of the pictures that a token spans. A pretrained encoder sees them resized to its own patches."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    steps: Count = 4000
    """Of the decoder."""
    batch: Count = 64
    nets: Nets = field(default_factory=Nets)
    statistics: Literal["channel", "element"] = "channel"
    """Mean and deviation of each channel, or of each channel at each place, as released: then pictures of one size."""
    tau: NotNegative = 0.8
    """Strength of the noise on the tokens."""
    noise: Literal["uniform", "half-normal"] = "uniform"
    """Law of sigma: U(0, tau), as in the released code, or |N(0, tau^2)|, as in the paper."""
    l1: NotNegative = 0.5
    """In [-1, 1]; released decoders count it in [0, 1], once."""
    decoder: Optimizer = field(
        default_factory=lambda: Optimizer(lr=1e-3, betas=(0.9, 0.95), clip=1.0, warmup=100, decay="cosine"))


def opened(name: str, patch: int) -> tuple[nn.Module, LatentSpace | None]:
    """The encoder's half; and its latent space, where others decode its latents already. `patch` is for encoders that
    are brought to any."""
    place = expanded(name)
    home = place if place.is_dir() else name        # or the hub's name
    if name in HUB:
        return token_encoder(name, patch), None
    if is_ours(place):
        codec = part_of(place, "codec")
    elif is_rae(read_json(local_folder(home, ("config.json",)) / "config.json")):
        codec = from_diffusers(home)
    else:
        return token_encoder(name, patch), None
    if isinstance(codec.encoder, Projected):
        return codec.encoder.trunk, None                # of a tokenizer: what its bottleneck is given
    if not isinstance(bare(codec.encoder), ViT | TokenEncoder):
        raise Refusal(f"encoder {name}: a codec whose encoder is a {type(codec.encoder).__name__}, not one of tokens; "
                      "give a run of stillroom train rae, or of a tokenizer with tokens")
    return codec.encoder, codec.space


def bare(half: nn.Module) -> Any:
    """The net itself, whose answers no statistics have touched."""
    return half.net if isinstance(half, Elements) else half


def require_patch(name: str, net: Any, patch: int) -> None:
    if net.patch != patch:
        raise Refusal(f"encoder {name}: its tokens span {net.patch} pixels; set --patch {net.patch}")


def refuse_what_cannot_be(s: Settings, data) -> None:
    require_whole_latents(data, s.patch)
    own = s.encoder == "own"
    refuse_own(s.encoder, s.size, s.patch, s.labels_weight, data)
    if not (s.l1 or s.perceptual):
        raise Refusal("l1 and perceptual are both 0, so a decoder has nothing to learn; set one above 0")
    refuse_critic(s.adversarial, s.critic_from, s.adversarial_from, s.size)
    if s.shard and (own or s.adversarial):
        raise Refusal("shard: an encoder of our own, and adversarial terms, look at whole weights; leave it out")


def raw_space(encoder: Any, patch: int) -> LatentSpace:
    """Tokens as they come, neither shifted nor scaled."""
    signed = isinstance(encoder, ViT)
    return LatentSpace(encoder.channels, patch, (0.0,) * encoder.channels, (1.0,) * encoder.channels, (patch - 1) / 2,
                       (-1.0, 1.0) if signed else (0.0, 1.0))


class RAE(OfPictures):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        refuse_what_cannot_be(settings, data)
        s = self.settings = settings
        self.data, self.own, device = data, settings.encoder == "own", pick_device(settings.device)
        self.space: LatentSpace | None = None
        if self.own:
            encoder: Any = new_vit(s.own, s.patch)
        else:
            encoder, self.space = opened(s.encoder, s.patch)
        self.half = encoder.to(device)
        net = bare(encoder)
        require_patch(s.encoder, net, s.patch)
        if self.space is not None and s.statistics == "element":
            raise Refusal(f"encoder {s.encoder}: its latents have their statistics already; leave out --statistics")
        self.encoder = net.requires_grad_(False).eval()
        pixels = net.pixels if isinstance(net, TokenEncoder) else ((0.0,) * 3, (1.0,) * 3)
        side = s.size // s.patch
        decoder = ViTDecoder(net.channels, s.patch, side, s.nets.width, s.nets.depth, s.nets.heads, None, *pixels)
        self.raw = Codec(self.encoder, decoder, raw_space(net, s.patch))        # tokens in the place of latents
        self.mean = Average(decoder, s.average)
        self.critic = PatchCritic(s.nets.critic) if s.adversarial else None
        self.perceptual = perceptual_of(s, s.perceptual)
        shape = (net.channels, *((side, side) if s.statistics == "element" else (1, 1)))
        self.shift, self.scale = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        if self.own:
            self.masked = new_masked(s.own, s.patch, side, len(data.classes) if s.labels_weight else None)
            self.masked_mean = Average(self.masked, s.average)

    def roles(self):
        s = self.settings
        roles = {"encoder": Role(self.masked, s.pretraining, average=self.masked_mean)} if self.own else {}
        roles["decoder"] = Role(self.raw.decoder, s.decoder, average=self.mean)
        return roles | ({"critic": Role(self.critic, s.critic)} if self.critic is not None else {})

    def stages(self):
        s = self.settings
        stages = [Stage("encoder", s.encoder_steps, roles=("encoder",))] if self.own else []
        stages.append(Stage("statistics", 0, enter=self.measure))
        return stages + stages_of("decoder", s.steps, s.adversarial, s.critic_from, s.adversarial_from)

    @property
    def seen(self) -> int:
        """Pictures whose tokens are measured."""
        return at_most(self.data, self.settings.statistics_pictures)

    def measure(self) -> None:
        """The encoder as it has become, and mean and deviation of its tokens."""
        if self.own:
            trained = cast(MaskedViT, self.masked_mean.module).encoder
            self.encoder.load_state_dict(trained.state_dict())
        if self.space is None:
            s, over = self.settings, (0,) if self.settings.statistics == "element" else (0, 2, 3)
            mean, variance = moments(self.tokens, self.data, s.seed, self.seen, self.shift.device, over)
            self.shift.copy_(mean)
            self.scale.copy_((variance + EPSILON).sqrt())

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        return self.raw.encode(x).float()

    def losses(self, batch, turn):
        x, y = batch["data"]
        x = x.expand(-1, 3, -1, -1)
        if turn.stage != "encoder":
            return self.decoder_terms(x, turn)
        s = self.settings
        return {"encoder": masked_terms(self.masked, x, y, turn, s.own, s.labels_weight, "encoder")}

    def decoder_terms(self, x, turn):
        s, u = self.settings, self.tokens(x)
        draw = turn.rand((len(x), 1, 1, 1)) if s.noise == "uniform" else turn.randn((len(x), 1, 1, 1)).abs()
        drawn = self.raw.decode(u + s.tau * draw * turn.randn(u)).float()
        terms = errors(drawn, x, s.l1, 0.0, s.perceptual, self.perceptual)
        out = {"decoder": dict(terms)}
        if turn.stage in ("critic", "adversarial"):
            assert self.critic is not None
            add_hinges(out, "decoder", self.critic, x, drawn, terms, s.adversarial,
                       cast(ViTDecoder, self.raw.decoder).predict, turn, turn.stage == "adversarial")
        return out

    def memory(self):
        """A pretrained encoder is not kept in checkpoints: it is opened again."""
        return {"shift": self.shift, "scale": self.scale} | ({"frozen": self.encoder} if self.own else {})

    def finished(self) -> Codec:
        s, decoder = self.settings, cast(ViTDecoder, self.mean.module)
        if self.space is None:
            return token_codec(self.encoder, decoder, self.shift, self.scale, s.patch, self.raw.space.image_range)
        return Codec(self.half, same_elements(decoder, self.half), self.space)

    def preview(self):
        x = sample(self.data, 16, self.settings.seed).x.to(self.shift.device).expand(-1, 3, -1, -1)
        out = {"pictures": x}
        if self.own:
            out |= masked_preview(cast(MaskedViT, self.masked_mean.module), x, self.settings.own)
        return out | {"reconstructions": self.finished().reconstruct(x)}

    def product(self):
        s, codec = self.settings, self.finished()
        card = {"encoder": s.encoder, "labels": bool(s.labels_weight), "data": s.data, "size": s.size,
                "tau": s.tau, "noise": s.noise, "adversarial": s.adversarial,
                "statistics": "those of its encoder" if self.space else {
                    "over": s.statistics, "pictures": self.seen},
                "reconstruction": reconstruction_of(codec, self.data, s.seed)}
        return Product("codec", {"codec": codec}, card)

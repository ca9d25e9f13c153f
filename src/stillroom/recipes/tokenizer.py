"""A tokenizer: an encoder trained for representation, narrowed to few channels, and a decoder learned with them.

Problem: tokens that say what a picture shows are wide, and flows over wide latents are dear; narrow latents that were
learned for reconstruction alone say little. Keep the encoder as it is, and learn which few directions of its tokens the
decoder needs: the first stage of DMVAE, whose second shapes what comes out here to any distribution.

Equation: with u = E(x) the tokens of a frozen encoder and z = B(u) a bottleneck of one token each,

    min_{B, D}  E  a |D(z) - x|_1 + b |D(z) - x|^2 + c d(D(z), x) + e w L_adv,    w = |g_rec| / |g_adv| <= 1e4

with d a distance of feature maps, L_adv the hinge of a critic of patches, and g the gradients at D's last layer.

`encoder = own` is trained first, on the same pictures, by hiding patches; `encoder = conv` has no tokens: convolutions
learn from scratch. Baselines: `kl` draws z ~ q(z | x) and holds q to N(0, 1), the ordinary VAE; `align` makes latents
like an encoder's features, as VA-VAE does: with W a linear map and margins m,

    h v L_align,    L_align = mean relu(1 - m1 - cos(W z_i, f_i)) + mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2)

and v = |g_rec| / |g_align| at the encoder's last layer. Latents are (z - mean) / std, measured on the moving average.

Paper: Distribution Matching Variational AutoEncoder, arXiv 2512.07778; VA-VAE, arXiv 2501.01423.

Expect: latents that say what the encoder's tokens say, and no more. On small pictures an encoder of our own
reconstructs as convolutions do; classes lie apart in its latents where it was told them, with masking alone no better.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from stillroom.codecs import Codec
from stillroom.codecs.tokens import HUB, TokenEncoder
from stillroom.data import LatentSpace, sample
from stillroom.match.alignment import marginal_cosine, marginal_distance, on_grid
from stillroom.match.latents import unit_kl
from stillroom.nets.bottleneck import Bottleneck, Projected
from stillroom.nets.coding import Decoder, Encoder, sized
from stillroom.nets.critic import PatchCritic
from stillroom.nets.vit import MaskedViT
from stillroom.recipes._drawing import (
    Judged,
    OfPictures,
    add_hinges,
    balance,
    errors,
    last_weight,
    lively,
    normalised,
    reconstruction_of,
    refuse_critic,
    stages_of,
    total,
)
from stillroom.recipes._masking import OfTokens, masked_preview, masked_terms, new_masked, new_vit, refuse_own
from stillroom.recipes.codec import Squares, perceptual_of, require_whole_latents
from stillroom.recipes.rae import bare, opened, require_patch
from stillroom.settings import Count, NotNegative, Optimizer, Place, Refusal, Share
from stillroom.train import Average, Product, Role, Stage
from stillroom.train.world import pick_device


@dataclass(frozen=True, kw_only=True)
class Align:
    """VA-VAE's terms, where `align` names an encoder."""

    weight: NotNegative = 0.5
    """Of both together, beside v; 0.5 to 0.1 as released."""
    cosine: NotNegative = 1.0
    distance: NotNegative = 1.0
    cosine_margin: Share = 0.5
    distance_margin: Share = 0.25


@dataclass(frozen=True, kw_only=True)
class Settings(Judged, OfTokens, Squares):
    encoder: Annotated[str, Place(names=("own", "conv", *HUB))] = "own"
    """`own`, `conv`, `dinov2`, `siglip2`, `mae`, a folder or hub id of one of transformers' vision models or of an
    AutoencoderRAE, or a run of train rae or of this recipe. A folder of one of those names is ./NAME."""
    latent: Count = 32
    """Channels of a latent."""
    patch: Literal[2, 4, 8, 16, 32] = 8
    """Pixels a side that a latent spans. A pretrained encoder sees pictures resized to its own patches."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    steps: Count = 4000
    """Of bottleneck and decoder."""
    batch: Count = 64
    params: Count = 1_200_000
    """Parameters of a conv encoder, about."""
    decoder_params: Count = 1_200_000
    critic_width: Count = 32
    """Of the critic's first layer."""
    l1: NotNegative = 1.0
    l2: NotNegative = 0.0
    kl: NotNegative = 0.0
    """Weight of KL(q(z | x) || N(0, 1)), summed over a picture's latents and divided by its numbers; at 0 there is no
    q, and z is a function of x."""
    align: Annotated[str, Place(names=tuple(HUB))] = ""
    """An encoder whose features the latents shall resemble, named as `encoder` is; none unless given."""
    alignment: Align = field(default_factory=Align)
    model: Optimizer = field(
        default_factory=lambda: Optimizer(lr=2e-3, betas=(0.9, 0.95), clip=1.0, warmup=100, decay="cosine"))


def refuse_what_cannot_be(s: Settings, data) -> None:
    require_whole_latents(data, s.patch)
    refuse_own(s.encoder, s.size, s.patch, s.labels_weight, data)
    if not (s.l1 or s.l2 or s.perceptual):
        raise Refusal("l1, l2 and perceptual are all 0, so a decoder has nothing to learn; set one above 0")
    refuse_critic(s.adversarial, s.critic_from, s.adversarial_from, s.size)
    if s.align in ("own", "conv"):
        raise Refusal(f"align {s.align}: features come from an encoder that is trained already; train one with "
                      "stillroom train rae, and give its run")
    weighs = s.alignment.cosine or (s.alignment.distance and s.size > s.patch)      # one place has no other to be near
    if s.align and not (s.alignment.weight and weighs):
        raise Refusal(f"align {s.align}: its terms weigh nothing; set alignment.weight and alignment.cosine above 0")
    if s.shard and (s.encoder == "own" or s.adversarial or s.align):
        raise Refusal("shard: an encoder of our own, adversarial terms and align look at whole weights; leave it out")


def trunk_of(name: str, patch: int) -> Any:
    """The net that answers tokens: of a name, a folder, or a run of rae or of this recipe."""
    half, _ = opened(name, patch)
    return bare(half)


def require_narrower(s: Settings, channels: int, cure: str) -> None:
    if s.latent > channels:
        raise Refusal(f"latent {s.latent}: wider than the {channels} channels that the encoder {s.encoder} has; {cure}")


def levels(patch: int) -> tuple[int, ...]:
    """Residual blocks of every level of convolutions, as codec's."""
    return (1, *[3] * (patch.bit_length() - 1))


def new_encoder(s: Settings) -> Encoder | Projected:
    """Half of a codec on pictures in [-1, 1]: its trunk is frozen, and what else it has is new."""
    moments_too = s.kl > 0
    if s.encoder == "conv":
        encoder = sized(s.params, lambda w: Encoder(s.latent, w, levels(s.patch), moments=moments_too))
        require_narrower(s, cast(int, encoder.width), "ask for fewer, or for more --params")
        return lively(encoder)
    trunk = new_vit(s.own, s.patch) if s.encoder == "own" else trunk_of(s.encoder, s.patch)
    require_patch(s.encoder, trunk, s.patch)
    require_narrower(s, trunk.channels, "ask for fewer")
    trunk = trunk.to(pick_device(s.device)).requires_grad_(False).eval()
    return Projected(trunk, Bottleneck(trunk.channels, s.latent, moments_too), isinstance(trunk, TokenEncoder))


class Tokenizer(OfPictures):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        refuse_what_cannot_be(settings, data)
        s = self.settings = settings
        self.data, self.own, self.device = data, s.encoder == "own", pick_device(s.device)
        encoder = new_encoder(s)
        self.trunk = encoder.trunk if isinstance(encoder, Projected) else None
        self.unit_range = isinstance(encoder, Projected) and encoder.unit_range
        decoder = lively(sized(s.decoder_params, lambda w: Decoder(s.latent, w, levels(s.patch)[::-1], False)))
        self.codec = Codec(encoder, decoder, self.space((0.0,) * s.latent, (1.0,) * s.latent))
        self.learned = nn.ModuleDict({"encoder": encoder.bottleneck if isinstance(encoder, Projected) else encoder,
                                      "decoder": decoder})
        self.example: Any = trunk_of(s.align, s.patch) if s.align else None
        if s.align:
            if s.size % self.example.patch:
                raise Refusal(f"align {s.align}: its tokens span {self.example.patch} pixels, which do not divide the "
                              f"{s.size} of a picture; give another --size, or another encoder")
            self.example.to(self.device).requires_grad_(False).eval()
            self.learned["likeness"] = nn.Conv2d(s.latent, self.example.channels, 1, bias=False)        # W
        self.mean = Average(self.learned, s.average)
        self.critic = PatchCritic(s.critic_width) if s.adversarial else None
        self.perceptual = perceptual_of(s, s.perceptual)
        if self.own:
            classes = len(data.classes) if s.labels_weight else None
            self.masked = new_masked(s.own, s.patch, s.size // s.patch, classes)
            self.masked_mean = Average(self.masked, s.average)

    def space(self, shift: tuple[float, ...], scale: tuple[float, ...]) -> LatentSpace:
        # A token is centred on the middle of its pixels, a latent of strided convolutions on the first of them.
        return LatentSpace(len(shift), self.settings.patch, shift, scale,
                           (self.settings.patch - 1) / 2 if self.trunk is not None else 0.0)

    def roles(self):
        s = self.settings
        roles = {"trunk": Role(self.masked, s.pretraining, average=self.masked_mean)} if self.own else {}
        roles["codec"] = Role(self.learned, s.model, average=self.mean)
        return roles | ({"critic": Role(self.critic, s.critic)} if self.critic is not None else {})

    def stages(self):
        s = self.settings
        stages = [Stage("trunk", s.encoder_steps, roles=("trunk",)), Stage("freeze", 0, enter=self.freeze)]
        return (stages if self.own else []) + stages_of("codec", s.steps, s.adversarial, s.critic_from,
                                                        s.adversarial_from)

    def freeze(self) -> None:
        """The trunk as masking has made it, which learns no more."""
        assert self.trunk is not None
        self.trunk.load_state_dict(cast(MaskedViT, self.masked_mean.module).encoder.state_dict())

    def losses(self, batch, turn):
        x, y = batch["data"]
        x, s = x.expand(-1, 3, -1, -1), self.settings
        if turn.stage == "trunk":
            return {"trunk": masked_terms(self.masked, x, y, turn, s.own, s.labels_weight, "trunk")}
        return self.codec_terms(x, turn)

    def codec_terms(self, x: Tensor, turn):
        s = self.settings
        mean, logvar = self.codec.posterior(x)
        z = mean.float()
        if logvar is not None:
            z = z + (logvar.float() / 2).exp() * turn.randn(z)
        drawn = self.codec.decode(z).float()
        terms = errors(drawn, x, s.l1, s.l2, s.perceptual, self.perceptual)
        out = {"codec": terms | (self.aligned(z, x, terms, turn) if s.align else {})}
        if logvar is not None:
            out["codec"]["kl"] = s.kl * unit_kl(mean, logvar) / x[0].numel()
        if turn.stage in ("critic", "adversarial"):
            assert self.critic is not None
            add_hinges(out, "codec", self.critic, x, drawn, terms, s.adversarial, self.learned["decoder"], turn,
                       turn.stage == "adversarial")
        return out

    def aligned(self, z: Tensor, x: Tensor, terms: dict[str, Tensor], turn) -> dict[str, Tensor]:
        s, features = self.settings.alignment, on_grid(self.features(x), z.shape[-2], z.shape[-1])
        apart = {"cosine": marginal_cosine(self.learned["likeness"](z), features, s.cosine_margin),
                 "distance": marginal_distance(z, features, s.distance_margin)}
        for name, value in apart.items():
            turn.tell(f"codec/align-{name}", value)
        both = s.cosine * apart["cosine"] + s.distance * apart["distance"]
        weight = balance(total(terms), both.mean(), last_weight(self.learned["encoder"]), turn)
        turn.tell("codec/align-balance", weight)
        return {"align": s.weight * weight * both}

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.example((x + 1) / 2 if isinstance(self.example, TokenEncoder) else x).float()

    def memory(self):
        """A pretrained trunk is not kept in checkpoints: it is opened again."""
        return {"trunk": self.trunk} if self.own else {}

    def half(self) -> nn.Module:
        """The encoder of the moving average."""
        learned = cast(nn.ModuleDict, self.mean.module)["encoder"]
        return learned if self.trunk is None else Projected(self.trunk, cast(Bottleneck, learned), self.unit_range)

    def averaged(self) -> Codec:
        return Codec(self.half(), cast(nn.ModuleDict, self.mean.module)["decoder"], self.codec.space)

    def preview(self):
        x = sample(self.data, 16, self.settings.seed).x.to(self.device).expand(-1, 3, -1, -1)
        out = {"pictures": x}
        if self.own:
            out |= masked_preview(cast(MaskedViT, self.masked_mean.module), x, self.settings.own)
        return out | {"reconstructions": self.averaged().reconstruct(x)}

    def product(self):
        s = self.settings
        codec, pictures = normalised(self.averaged(), self.data, s.seed, s.statistics_pictures)
        card = {"encoder": s.encoder, "latent": s.latent, "labels": bool(s.labels_weight), "data": s.data,
                "size": s.size, "kl": s.kl, "align": s.align, "adversarial": s.adversarial,
                "statistics": {"pictures": pictures}, "reconstruction": reconstruction_of(codec, self.data, s.seed)}
        return Product("codec", {"codec": codec}, card)

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.codecs import Codec, require_signed
from stillroom.codecs.rae import EPSILON, Elements, from_diffusers_rae, is_rae, same_elements, token_codec
from stillroom.codecs.tokens import HUB, TokenEncoder, token_encoder
from stillroom.data import Batch, LatentSpace, Loader, Source, sample
from stillroom.match import adversarial as match
from stillroom.measure.images import psnr
from stillroom.nets.critic import PatchCritic
from stillroom.nets.folders import read_json
from stillroom.nets.vit import MaskedViT, ViT, ViTDecoder
from stillroom.recipes.codec import Squares, perceptual_of, require_whole_latents
from stillroom.settings import Count, NotNegative, Optimizer, Refusal, Share
from stillroom.train import Average, Product, Recipe, Role, Stage
from stillroom.train.teacher import is_ours, part_of
from stillroom.train.world import pick_device

HELD = 256
"""Pictures that are kept from training and measured on at the end, or a tenth of a small set."""
PART = 64
"""Pictures that are encoded at once outside of training."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """The encoder that is trained here, and how."""

    width: Count = 128
    """Channels of a token, which are those of the latents."""
    depth: Count = 6
    heads: Count = 4
    hidden: Share = 0.5
    """Share of the patches that are hidden and painted."""
    painter_width: Count = 96
    painter_depth: Count = 2


@dataclass(frozen=True, kw_only=True)
class Nets:
    width: Count = 192
    depth: Count = 4
    heads: Count = 3
    critic: Count = 32
    """Width of the critic's first layer."""


@dataclass(frozen=True, kw_only=True)
class Settings(Squares):
    encoder: str = "own"
    """`own`, `dinov2`, `siglip2`, `mae`, a folder or hub id of one of transformers' vision models or of an
    AutoencoderRAE, or a run of this recipe, whose latent space is kept. A folder of one of those names is ./NAME."""
    patch: Count = 8
    """Pixels a side of the pictures that a token spans. A pretrained encoder sees them resized to its own patches."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    steps: Count = 4000
    """Of the decoder."""
    encoder_steps: Count = 4000
    """Of an encoder of our own, before those."""
    batch: Count = 64
    own: Own = field(default_factory=Own)
    nets: Nets = field(default_factory=Nets)
    labels_weight: NotNegative = 0.0
    """Cross-entropy of the class in training an encoder of our own; above 0, data without labels are refused."""
    statistics: Literal["channel", "element"] = "channel"
    """Mean and deviation of each channel, or of each channel at each place, as released: then pictures of one size."""
    statistics_pictures: Count = 2048
    tau: NotNegative = 0.8
    """Strength of the noise on the tokens."""
    noise: Literal["uniform", "half-normal"] = "uniform"
    """Law of sigma: U(0, tau), as in the released code, or |N(0, tau^2)|, as in the paper."""
    l1: NotNegative = 0.5
    """In [-1, 1]; released decoders count it in [0, 1], once."""
    perceptual: NotNegative = 0.1
    """Distance of feature maps, with `lpips` or random features, which are louder: 1 as released, with LPIPS."""
    adversarial: NotNegative = 0.0
    """Weight of the critic's hinge beside w; 0.75 as released. It wants more steps than a small run has."""
    critic_from: Share = 6 / 16
    """Share of the decoder's steps after which the critic learns."""
    adversarial_from: Share = 8 / 16
    """Share of the decoder's steps after which the decoder learns from it."""
    pretraining: Optimizer = field(
        default_factory=lambda: Optimizer(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, clip=1.0, warmup=100,
                                          decay="cosine"))
    decoder: Optimizer = field(
        default_factory=lambda: Optimizer(lr=1e-3, betas=(0.9, 0.95), clip=1.0, warmup=100, decay="cosine"))
    critic: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-4, betas=(0.5, 0.9), name="adam"))


class Kept:
    """A source without every k-th picture, which `held` has: none is trained on that is measured."""

    def __init__(self, source: Source):
        self.source, self.name, self.shape, self.classes = source, source.name, source.shape, source.classes
        self.credits = getattr(source, "credits", ())
        self.in_memory = getattr(source, "in_memory", False)
        count = len(source)
        out = torch.zeros(count, dtype=torch.bool)
        if held := min(HELD, count // 10):
            out[torch.arange(held) * count // held + count // (2 * held)] = True
        self.rows, self.out = (~out).nonzero().flatten(), out.nonzero().flatten()

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: Sequence[int], key: int) -> Batch:
        return self.source.fetch(self.rows[torch.as_tensor(indices)].tolist(), key)

    def held(self) -> Tensor:
        return self.source.fetch(self.out.tolist(), 0).x


def opened(settings: Settings) -> tuple[nn.Module, LatentSpace | None]:
    """The encoder's half; and its latent space, where others decode its latents already."""
    name, place = settings.encoder, Path(settings.encoder).expanduser()
    if name in HUB:
        return token_encoder(name, settings.patch), None
    if is_ours(place):
        codec = part_of(place, "codec")
    elif (place / "config.json").is_file() and is_rae(read_json(place / "config.json")):
        codec = from_diffusers_rae(place)
    else:
        return token_encoder(name, settings.patch), None
    if not isinstance(bare(codec.encoder), ViT | TokenEncoder):
        raise Refusal(f"encoder {name}: a codec whose encoder is a {type(codec.encoder).__name__}, not one of tokens; "
                      "give a run of stillroom train rae")
    if codec.space.factor != settings.patch:
        raise Refusal(f"encoder {name}: its tokens span {codec.space.factor} pixels; set --patch {codec.space.factor}")
    if settings.statistics == "element":
        raise Refusal(f"encoder {name}: its latents have their statistics already; leave out --statistics")
    return codec.encoder, codec.space


def bare(half: nn.Module) -> Any:
    """The net itself, whose answers no statistics have touched."""
    return half.net if isinstance(half, Elements) else half


def refuse_what_cannot_be(s: Settings, data) -> None:
    require_whole_latents(data, s.patch)
    own = s.encoder == "own"
    if own and s.size == s.patch:
        raise Refusal(f"patch {s.patch}: a picture would be one patch, and none is left to paint; choose a smaller one")
    if s.labels_weight and not own:
        raise Refusal(f"labels_weight: labels train an encoder of our own only, and {s.encoder} stays as it is")
    if s.labels_weight and not data.classes:
        raise Refusal(f"labels_weight: {data.name} has no labels; leave it out")
    if not (s.l1 or s.perceptual):
        raise Refusal("l1 and perceptual are both 0, so a decoder has nothing to learn; set one above 0")
    if s.critic_from > s.adversarial_from:
        raise Refusal(f"critic_from {s.critic_from:g} comes after adversarial_from {s.adversarial_from:g}: the decoder "
                      "would learn from a critic that knows nothing")
    if s.shard and (own or s.adversarial):
        raise Refusal("shard: an encoder of our own, and adversarial terms, look at whole weights; leave it out")


def raw_space(encoder: Any, patch: int) -> LatentSpace:
    """Tokens as they come, neither shifted nor scaled."""
    signed = isinstance(encoder, ViT)
    return LatentSpace(encoder.channels, patch, (0.0,) * encoder.channels, (1.0,) * encoder.channels, (patch - 1) / 2,
                       (-1.0, 1.0) if signed else (0.0, 1.0))


class RAE(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        refuse_what_cannot_be(settings, data)
        s = self.settings = settings
        self.data, self.own, device = data, settings.encoder == "own", pick_device(settings.device)
        self.space: LatentSpace | None = None
        if self.own:
            encoder: Any = ViT(s.patch, s.own.width, s.own.depth, s.own.heads)
        else:
            encoder, self.space = opened(s)
        self.half, net = encoder, bare(encoder)
        self.encoder = net.to(device).requires_grad_(False).eval()
        pixels = net.pixels if isinstance(net, TokenEncoder) else ((0.0,) * 3, (1.0,) * 3)
        side = s.size // s.patch
        decoder = ViTDecoder(net.channels, s.patch, side, s.nets.width, s.nets.depth, s.nets.heads, None, *pixels)
        self.raw = Codec(self.encoder, decoder, raw_space(net, s.patch))        # tokens in the place of latents
        self.mean = Average(decoder, s.average)
        self.critic = PatchCritic(s.nets.critic) if s.adversarial else None
        self.perceptual, self.distance = perceptual_of(s) if s.perceptual else ("", None)
        shape = (net.channels, *((side, side) if s.statistics == "element" else (1, 1)))
        self.shift, self.scale = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        if self.own:
            painter = ViTDecoder(net.channels, s.patch, side, s.own.painter_width, s.own.painter_depth,
                                 max(1, s.own.painter_width // 32))
            classes = len(data.classes) if s.labels_weight else None
            self.masked = MaskedViT(ViT(s.patch, s.own.width, s.own.depth, s.own.heads), painter, classes)
            self.masked_mean = Average(self.masked, s.average)

    @classmethod
    def prepare(cls, settings, sources, note):
        data = sources["data"]
        return {"data": Kept(data)} if isinstance(data, Source) else sources

    def check(self, batch):
        require_signed(batch["data"].x, self.data.name)

    def roles(self):
        s = self.settings
        roles = {"encoder": Role(self.masked, s.pretraining, average=self.masked_mean)} if self.own else {}
        roles["decoder"] = Role(self.raw.decoder, s.decoder, average=self.mean)
        return roles | ({"critic": Role(self.critic, s.critic)} if self.critic is not None else {})

    def stages(self):
        s = self.settings
        stages = [Stage("encoder", s.encoder_steps, roles=("encoder",))] if self.own else []
        stages.append(Stage("statistics", 0, enter=self.measure))
        if not s.adversarial:
            return [*stages, Stage("decoder", s.steps, roles=("decoder",))]
        first, then = (round(share * s.steps) for share in (s.critic_from, s.adversarial_from))
        parts = (("decoder", first, ("decoder",)), ("critic", then - first, ("decoder", "critic")),
                 ("adversarial", s.steps - then, ("decoder", "critic")))
        return stages + [Stage(name, steps, roles=roles) for name, steps, roles in parts if steps]

    def measure(self) -> None:
        """The encoder as it has become, and mean and deviation of its tokens."""
        if self.own:
            trained = cast(MaskedViT, self.masked_mean.module).encoder
            self.encoder.load_state_dict(trained.state_dict())
        if self.space is None:
            over = (0,) if self.settings.statistics == "element" else (0, 2, 3)
            count, total, square = 0, torch.zeros_like(self.shift), torch.zeros_like(self.shift)
            with Loader(self.data, seed=self.settings.seed, batch=PART, workers=0) as loader:
                for i in range(-(-self.settings.statistics_pictures // PART)):
                    u = self.tokens(loader.at(i)[0].x.to(total.device)).double()
                    count += u.numel() // total.numel()
                    total += u.sum(over).view_as(total)
                    square += u.square().sum(over).view_as(total)
            self.shift.copy_(total / count)
            self.scale.copy_(((square / count - self.shift.square()).clamp(min=0) + EPSILON).sqrt())

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        return self.raw.encode(x).float()

    def losses(self, batch, turn):
        x, y = batch["data"]
        x = x.expand(-1, 3, -1, -1)
        return {"encoder": self.masked_terms(x, y, turn)} if turn.stage == "encoder" else self.decoder_terms(x, turn)

    def masked_terms(self, x, y, turn):
        s = self.settings
        count = (s.size // s.patch) ** 2
        shown = self.shown(count)
        painted, hidden, mean = self.masked(x, turn.rand((len(x), count)), shown)
        terms = {"painted": ((painted - x).square() * hidden).flatten(1).mean(1) * count / (count - shown)}
        if self.masked.head is not None:
            logits = self.masked.head(mean).float()
            turn.tell("encoder/accuracy", (logits.argmax(1) == y).float().mean())
            terms["labels"] = s.labels_weight * functional.cross_entropy(logits, y, reduction="none")
        return terms

    def shown(self, count: int) -> int:
        """Patches that the encoder sees: one at least, and one is left to paint."""
        return min(max(1, round((1 - self.settings.own.hidden) * count)), count - 1)

    def decoder_terms(self, x, turn):
        s, u = self.settings, self.tokens(x)
        draw = turn.rand((len(x), 1, 1, 1)) if s.noise == "uniform" else turn.randn((len(x), 1, 1, 1)).abs()
        drawn = self.raw.decode(u + s.tau * draw * turn.randn(u)).float()
        terms = {"l1": s.l1 * (drawn - x).abs().flatten(1).mean(1)} if s.l1 else {}
        if self.distance is not None:
            terms[self.perceptual] = s.perceptual * self.distance(drawn, x)
        out = {"decoder": terms}
        if turn.stage in ("critic", "adversarial"):
            assert self.critic is not None
            real, made = (match.augmented(p, turn.rand((len(x), match.DRAWS))) for p in (x, drawn))
            out["critic"] = {"hinge": match.critic_hinge(self.critic(real), self.critic(made.detach()))}
            if turn.stage == "adversarial":
                hinge = match.maker_hinge(self.critic(made))
                weight = self.balance(torch.stack([t.mean() for t in terms.values()]).sum(), hinge.mean(), turn)
                turn.tell("decoder/balance", weight)
                terms["hinge"] = s.adversarial * weight * hinge
        return out

    def balance(self, reconstruction: Tensor, adversarial: Tensor, turn) -> Tensor:
        """w, of the gradients over all processes; micro-batches take theirs apart."""
        last = cast(ViTDecoder, self.raw.decoder).predict.weight
        both = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, adversarial))
        return match.adaptive_weight(*(turn.mean(g) for g in both))

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
            masked, count = cast(MaskedViT, self.masked_mean.module), (self.settings.size // self.settings.patch) ** 2
            order = torch.rand(len(x), count, generator=torch.Generator().manual_seed(0)).to(x.device)
            painted, hidden, _ = masked(x, order, self.shown(count))
            out |= {"shown": x * (1 - hidden), "painted": torch.where(hidden > 0, painted, x).clamp(-1, 1)}
        return out | {"reconstructions": self.finished().reconstruct(x)}

    def product(self):
        s, codec = self.settings, self.finished()
        held = isinstance(self.data, Kept) and len(self.data.out) > 0
        x = cast(Kept, self.data).held() if held else sample(self.data, 64, s.seed).x
        with torch.no_grad():
            values = torch.cat([psnr(codec.reconstruct(part), part.expand(-1, 3, -1, -1))
                                for part in x.to(self.shift.device).split(PART)])
        card = {"encoder": s.encoder, "labels": bool(s.labels_weight), "data": s.data, "size": s.size,
                "tau": s.tau, "noise": s.noise, "adversarial": s.adversarial,
                "statistics": "those of its encoder" if self.space else {
                    "over": s.statistics, "pictures": -(-s.statistics_pictures // PART) * PART},
                "reconstruction": {"psnr": round(float(values.mean()), 2), "pictures": len(values),
                                   "of": "held-out training pictures" if held else "training pictures"}}
        return Product("codec", {"codec": codec}, card)

"""DMVAE: an encoder whose latents follow a distribution of one's choosing. The encoder is the generator.

Problem: what latents are good to model? A VAE holds them to a Gaussian, other codecs to nothing. Bring the latents of
a trained tokenizer to any reference, while it goes on to reconstruct: a law in closed form, data at a noise level,
samples of anything, or what a flow has learned of an encoder's features.

Equation: with z = E(x), z_t = alpha z + sigma eps, T the reference's prediction at z_t, F that of a network which
learns the law of z as it moves, and u what both should have said,

    min_{E, D}  a |D(z) - x|_1 + b d(D(z), x) + e w L_adv,  and  dL/dz = weight (F - T) / mean |u - T| beside it

which is the gap of `dmd` with an encoder in the generator's place. F learns on every step, encoder and decoder on every
`every`-th, and only then is anything decoded. Then the decoder is tuned with the encoder frozen. `match` says what else
may pull at z: one of the two scores alone, a drifting field, a critic of latents, or a VAE's KL.

The reference stands in the units of the given codec's latents, whose normaliser is kept while they move; the product's
own is measured at the end.

Paper: Distribution Matching Variational AutoEncoder, arXiv 2512.07778.

Expect: latents nearer to the reference, and some reconstruction lost for it; the card has both. A reference that looks
nothing like the data, of few modes above all, costs most.
"""

import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from torch import Tensor

from stillroom.codecs import Codec, fingerprint, require_usable
from stillroom.data import at_most, sample
from stillroom.flows import Flow, require
from stillroom.flows.references import open_reference
from stillroom.match import MATCHES
from stillroom.measure.distances import sliced_wasserstein
from stillroom.measure.samples import energy_distance
from stillroom.nets.critic import PatchCritic
from stillroom.paths import Law, LawName, dimension_shift, law_of
from stillroom.recipes import flow as flows
from stillroom.recipes._drawing import (
    Judged,
    OfPictures,
    add_hinges,
    errors,
    last_weight,
    normalised,
    reconstruction_of,
    refuse_critic,
    stages_of,
)
from stillroom.recipes._shaping import ByCritic, ByDrift, ByScores, divergence, fake_of
from stillroom.recipes.codec import Cut, perceptual_of, require_whole_latents
from stillroom.settings import (
    Count,
    Natural,
    NotNegative,
    Optimizer,
    Place,
    Refusal,
    Share,
    Where,
    refuse_given,
    seed_of,
)
from stillroom.train import Average, Product, Role, Stage, load_product
from stillroom.train.teacher import is_ours, open_codec, open_teacher, size_of
from stillroom.train.world import pick_device

JUDGED = 512
"""Latents on which a reference's network must pass the gate."""
OTHERS = ("drifting", "adversarial", "kl")
"""What pulls beside scores."""
COMPARED = 2000
"""Latents and samples of the reference between which distances are taken."""


@dataclass(frozen=True, kw_only=True)
class ScoreNet(flows.Network):
    """Of the fake score, where the reference has no network that it could be copied from."""

    net: Literal["unet", "dit", "ddt"] = "dit"
    width: Count = 128
    depth: Count = 4
    patch: Count = 1


@dataclass(frozen=True, kw_only=True)
class Settings(Judged, Cut):
    size: Count | None = None
    """Pixels a side of the squares; those that the codec's run learned from, unless given."""
    codec: Where
    """The tokenizer to begin with: a run of train codec, a folder of diffusers, or `bundled`."""
    reference: Annotated[str, Place(names=("gaussian",), after="samples:|noised:[^:]+:")]
    """gaussian, gmm:K[:STD], noised:LEVEL[:RUN], samples:FILE, or the run of a flow of this codec's latents."""
    foreign: bool = False
    """The reference's run was trained on other latents than this codec's, and is meant all the same."""
    match: str = "gap"
    """gap: the difference of two scores. teacher, student: one of them; half: half of the student's; mix:PUSH:PULL: so
    much of the student's and of the teacher's. drifting, adversarial: a field, a critic. kl is the ordinary VAE, for a
    codec that answers variances, and knows no reference but gaussian."""
    conditional: bool = True
    """Match the law of every class, where data and reference know classes; else that of all together, as drifting
    does."""
    crop: Literal["centre", "random", "shrink"] = "centre"
    steps: Count = 4000
    """Of matching, counted as the fake score's."""
    batch: Count = 64
    fake_steps: Natural = 500
    """Of the fake score, or the critic of latents, before anything moves."""
    decoder_steps: Natural = 1000
    """Of the decoder with the encoder frozen, at the end."""
    every: Count = 5
    """Updates of the fake score, or the critic of latents, for one of encoder and decoder. Where neither learns, every
    step is one of encoder and decoder."""
    weight: NotNegative = 10.0
    """Of the pull at z, beside a reconstruction's terms of 1."""
    guidance: float = 1.0
    """Of the reference's score; 5 as released."""
    fake_guidance: float = 1.0
    """Of the fake score; 5 as released, which compares two laws that are sharpened alike; DMD2 asks for 1."""
    times: tuple[Share, Share] = (0.02, 0.98)
    """Noise times at which the scores are compared, before the shift by dimension; 0 1 as released."""
    time_law: LawName = "uniform"
    """Of those times, before the shift."""
    fake: Literal["full", "lora"] = "full"
    """lora: adapters on the reference's own network, so that only one lies in memory."""
    rank: Count = 16
    score_net: ScoreNet = field(default_factory=ScoreNet)
    l1: NotNegative = 1.0
    l2: NotNegative = 0.0
    critic_width: Count = 32
    critic_from: Share = 0.0
    """Share of the matching after which the critic learns."""
    adversarial_from: Share = 1 / 8
    """Share of the matching after which encoder and decoder learn from it."""
    model: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-4, betas=(0.9, 0.95), clip=1.0, warmup=100))
    decoder: Optimizer = field(
        default_factory=lambda: Optimizer(lr=3e-4, betas=(0.9, 0.95), clip=1.0, warmup=100, decay="cosine"))
    score: Optimizer = field(default_factory=lambda: Optimizer(lr=3e-4, betas=(0.9, 0.95), clip=1.0, warmup=100))


def shares_of(name: str) -> tuple[float, float] | None:
    """(push, pull) of a match by scores; None of another."""
    if found := re.fullmatch(r"mix:(\d+\.?\d*|\.\d+):(\d+\.?\d*|\.\d+)", name):
        return float(found[1]), float(found[2])
    return MATCHES.get(name)


def refuse_idle(s: Settings, data) -> None:
    """A match that is not there, and settings that have no effect beside the one that is."""
    shares = shares_of(s.match)
    if (shares is None and s.match not in OTHERS) or shares == (0, 0):
        raise Refusal(f"match {s.match!r}: one of {', '.join((*MATCHES, *OTHERS))}, or mix:PUSH:PULL with two numbers, "
                      "of which one is above 0")
    push = 0 if shares is None else shares[0]
    for has, lacks, names in ((shares, "asks no scores", ("times", "time_law", "guidance")),
                              (push, "has no fake score", ("fake", "rank", "score_net", "fake_guidance"))):
        if not has:
            refuse_given(s, names, f"match {s.match} {lacks}; leave it out, or give --match gap")
    if s.match != "adversarial" and not push:
        refuse_given(s, ("every", "fake_steps"), f"match {s.match} has nothing that learns beside encoder and decoder; "
                                                 "leave it out, or give --match gap")
    if s.fake == "full":
        refuse_given(s, ("rank",), "of adapters, and the fake score is whole; add --fake lora, or leave it out")
    if s.match == "drifting" and s.conditional and data.classes:
        raise Refusal("match drifting: it brings all classes together to the reference; say --no-conditional")


def is_guided(s: Settings) -> bool:
    return s.guidance != 1 or s.fake_guidance != 1


def refuse_what_cannot_be(s: Settings, codec: Codec, data) -> None:
    require_whole_latents(data, codec.space.factor)
    refuse_idle(s, data)
    refuse_critic(s.adversarial, s.critic_from, s.adversarial_from, data.shape[-1])
    if s.adversarial:
        last_weight(codec.decoder)
    if not (s.l1 or s.l2 or s.perceptual):
        raise Refusal("l1, l2 and perceptual are all 0, so nothing holds the latents to the pictures; set one above 0")
    if not s.times[0] < s.times[1]:
        raise Refusal(f"times {s.times[0]:g} {s.times[1]:g}: give an earlier and a later one")
    if is_guided(s) and not (s.conditional and data.classes):
        raise Refusal("guidance: it wants scores of classes; leave it at 1, or give data with labels and --conditional")
    if s.match == "kl" and s.reference != "gaussian":
        raise Refusal(f"match kl: its reference is gaussian, not {s.reference}; for another one: --match gap")
    if s.shard:
        raise Refusal("shard: what pulls at latents looks at whole networks; leave it out")


class DMVAE(OfPictures):
    Settings = Settings
    inputs = ("data",)

    @classmethod
    def settled(cls, settings):
        return replace(settings, size=settings.size or size_of(settings.codec))

    def __init__(self, settings: Settings, data):
        s = self.settings = settings
        self.data, self.device = data, pick_device(s.device)
        self.codec = open_codec(s.codec).to(self.device)
        refuse_what_cannot_be(s, self.codec, data)
        self.hash = fingerprint(self.codec)
        x, y = sample(data, at_most(data, COMPARED), s.seed)
        self.before = self.encoded(x)
        if s.match == "kl" and self.codec.posterior(x[:1].to(self.device)).logvar is None:
            raise Refusal(f"match kl: codec {s.codec} answers no variances; train one with kl above 0")
        self.classes = len(data.classes) if s.conditional and data.classes else None
        self.seen = y if self.classes else None                     # labels of `before`
        self.said: list[str] = []                                   # of how the reference was made
        self.reference = self.opened()
        self.shaped = self.shaper()
        self.mean = Average(self.codec, s.average)
        self.critic = PatchCritic(s.critic_width) if s.adversarial else None
        self.perceptual = perceptual_of(s, s.perceptual)

    # ---- what there is at the start ----

    @torch.no_grad()
    def encoded(self, x: Tensor, codec: Codec | None = None) -> Tensor:
        """In the given codec's units, which are the reference's."""
        encoder = self.codec if codec is None else Codec(codec.encoder, codec.decoder, self.codec.space)
        return torch.cat([encoder.encode(part.to(self.device)).float().cpu() for part in x.split(64)])

    def opened(self) -> Flow:
        s = self.settings
        with torch.device("cpu"):       # recipes are built under the run's device, and laws are drawn on this one
            flow = open_reference(s.reference, tuple(self.before.shape[1:]), self.classes,
                                  latents=lambda: (self.before, self.seen), run=self.flow_of, seed=s.seed,
                                  note=self.said.append)
        if is_guided(s) and flow.classes is None:
            raise Refusal(f"guidance: reference {s.reference} is one law for all classes; leave it at 1, or give one "
                          f"that knows classes, such as gmm:{2 * (self.classes or 1)}")
        return flow.to(self.device)

    def flow_of(self, place: str) -> Flow:
        """A trained flow, of this codec's latents."""
        flow, name = open_teacher(place).to(self.device), f"reference {place}"
        theirs = load_product(place).card.get("encoding") if is_ours(Path(place)) else None
        mine = theirs is not None and theirs["codec"] == self.hash
        if not mine and not self.settings.foreign:
            raise Refusal(f"{name}: learned from other latents than those of codec {self.settings.codec}; train one "
                          "with stillroom train flow --codec, or say --foreign, if that is meant")
        if flow.shape == tuple(self.before.shape[1:]):              # else it is refused for its shape
            known = mine and flow.classes in (None, self.classes)
            x = self.before[:JUDGED] if known else flow.sample(JUDGED)
            y = None if flow.classes is None else self.seen if known else flow.labels(0, JUDGED)
            require(flow.denoiser, x.to(self.device), None if y is None else y[:JUDGED].to(self.device), name)
        return flow

    def labels_of(self, flow: Flow) -> Tensor | None:
        """The data's, for samples of a reference that knows classes."""
        if flow.classes is None or self.seen is None:
            return None
        return self.seen[torch.arange(COMPARED) % len(self.seen)]

    def law(self) -> Law:
        shift = max(self.reference.shift, dimension_shift(self.before[0].numel()))
        return law_of(self.settings.time_law, self.reference.denoiser.path, shift, *self.settings.times)

    def shaper(self) -> ByScores | ByDrift | ByCritic | None:
        s = self.settings
        if shares := shares_of(s.match):
            push, pull = shares
            fake = fake_of(self.reference, self.classes is not None,
                           lambda shape, classes: flows.make_net(s.score_net, shape, classes),
                           s.rank if s.fake == "lora" else None) if push else None
            return ByScores(self.reference, fake, self.law(), push, pull, (s.guidance, s.fake_guidance), s.score)
        if s.match == "kl":
            return None
        with torch.device("cpu"):
            samples = self.reference.sample(4 * COMPARED, seed_of(s.seed, "samples")).to(self.device)
        if s.match == "drifting":
            return ByDrift(samples)
        return ByCritic(samples, 256, s.score, self.classes, self.reference.classes if self.classes else None)

    # ---- learning ----

    def check(self, batch):
        super().check(batch)
        require_usable(self.codec, batch["data"].x, f"codec {self.settings.codec}")

    def roles(self):
        s, beside = self.settings, {} if self.shaped is None else self.shaped.roles()
        every = s.every if beside else 1
        roles = {"codec": Role(self.codec, s.model, every=every, average=self.mean), **beside,
                 "decoder": Role(self.codec, s.decoder, trains="^decoder", average=self.mean)}
        if self.critic is not None:     # it moves whenever there are pictures for it
            roles |= {"critic": Role(self.critic, s.critic, every=every), "tuning critic": Role(self.critic, s.critic)}
        return roles

    def stages(self):
        s = self.settings
        beside = tuple(self.shaped.roles()) if self.shaped is not None else ()
        stages = [Stage("fake", s.fake_steps, roles=beside)] if beside and s.fake_steps else []
        stages += stages_of("match", s.steps, s.adversarial, s.critic_from, s.adversarial_from, ("codec", *beside))
        last = ("decoder", "tuning critic") if s.adversarial else ("decoder",)
        return stages + ([Stage("decoder", s.decoder_steps, last, self.freeze)] if s.decoder_steps else [])

    def freeze(self) -> None:
        """The decoder is tuned to the encoder that is given away, which is the average."""
        self.codec.load_state_dict(self.mean.module.state_dict())

    def losses(self, batch, turn):
        x, y = batch["data"]
        x, moving = x.expand(-1, 3, -1, -1), "codec" in turn
        for line in self.said:
            turn.note(line)
        with torch.set_grad_enabled(moving):
            mean, logvar = self.codec.posterior(x)
        z, y = mean.float(), y if self.classes else None
        if turn.stage == "decoder":
            return self.drawn_terms(x, z.detach(), turn, "decoder")
        losses = {} if self.shaped is None else self.shaped.tracks(z.detach(), y, turn)
        if moving:
            pull = divergence(mean, cast(Tensor, logvar)) if self.shaped is None else self.shaped.pulls(z, y, turn)
            if self.shaped is None:
                z = z + (cast(Tensor, logvar).float() / 2).exp() * turn.randn(z)
            losses |= self.drawn_terms(x, z, turn, "codec")
            losses["codec"][self.settings.match.partition(":")[0]] = self.settings.weight * pull
        return losses

    def drawn_terms(self, x: Tensor, z: Tensor, turn, role: str) -> dict[str, dict[str, Tensor]]:
        """Of the reconstruction, and of the critic where it is due."""
        s, drawn = self.settings, self.codec.decode(z).float()
        terms = errors(drawn, x, s.l1, s.l2, s.perceptual, self.perceptual)
        out = {role: dict(terms)}
        if self.critic is not None and turn.stage in ("critic", "adversarial", "decoder"):
            add_hinges(out, role, self.critic, x, drawn, terms, s.adversarial, self.codec.decoder, turn,
                       turn.stage != "critic", "tuning critic" if turn.stage == "decoder" else "critic")
        return out

    # ---- what comes of it ----

    def finished(self) -> Codec:
        return cast(Codec, self.mean.module)

    def preview(self):
        x = sample(self.data, 16, self.settings.seed).x.to(self.device).expand(-1, 3, -1, -1)
        return {"pictures": x, "reconstructions": self.finished().reconstruct(x)}

    @cached_property
    def target(self) -> Tensor:
        """Samples of the reference, drawn where they are wanted: a large reference takes minutes for them."""
        bare = self.shaped.bare if isinstance(self.shaped, ByScores) else nullcontext
        with bare():
            return self.reference.sample(COMPARED, seed_of(self.settings.seed, "compared"),
                                         y=self.labels_of(self.reference))

    def distances(self, z: Tensor) -> dict[str, float]:
        """Of latents to the reference."""
        n = min(len(z), len(self.target))
        return apart(z[:n], self.target[:n])

    def told(self, codec: Codec) -> dict[str, dict[str, float]]:
        """How far the given codec's latents were from the reference, and how far those of another one are."""
        x, _ = sample(self.data, len(self.before), self.settings.seed)
        half = len(self.target) // 2
        return {"before": self.distances(self.before), "after": self.distances(self.encoded(x, codec)),
                "reference to itself": apart(self.target[:half], self.target[half:])}

    def product(self):
        s, codec = self.settings, self.finished()
        after, pictures = normalised(codec, self.data, s.seed)
        card = {
            "codec": s.codec, "codec_hash": self.hash, "units": asdict(self.codec.space), "reference": s.reference,
            "seed": s.seed, "classes": self.classes, "match": s.match, "data": s.data, "size": self.data.shape[-1],
            "statistics": {"pictures": pictures},
            "distance": self.told(codec),
            "reconstruction": {"before": reconstruction_of(open_codec(s.codec).to(self.device), self.data, s.seed),
                               "after": reconstruction_of(after, self.data, s.seed)},
        }
        return Product("codec", {"codec": after}, card)


def apart(x: Tensor, y: Tensor) -> dict[str, float]:
    x, y = x.flatten(1), y.flatten(1)
    return {"sliced_w2": sliced_wasserstein(x, y), "energy": float(energy_distance(x, y))}

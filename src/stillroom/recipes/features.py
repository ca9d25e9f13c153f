"""A feature net on one's own data: maps for drifting to compare, and a space to measure generators in.

Problem: distances between pixels, or between latents of a reconstructing codec, say little of what a picture shows.
Learn maps of it, at several scales, from the data at hand alone.

Equation (He et al. 2022, on a ResNet as in Deng et al. 2026, A.5): with a share of the squares of `patch` pixels put to
zero, M = 1 there,

    min E |M (D(E((1 - M) x)) - x)|^2 / |M|    +    w cross-entropy(head(E(x)), y)

the second term where the data have labels; w rises from 0 to `labels_weight` over a share of the steps. E is the
product, with the moving average of its weights; the painter D is left behind.

Paper: Masked Autoencoders, arXiv 2111.06377; Generative Modeling via Drifting, arXiv 2602.04770.

Expect: labels make by far the better features within a short run, and cost some of the painting, which is blurred.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillroom.data import Parted, Source, Stream, at_most, encoding_card, sample
from stillroom.data.order import permutation
from stillroom.nets.resnet import MaskedResNet, ResNet, masked_error, squares
from stillroom.settings import Count, Decay, Images, NotNegative, Optimizer, Refusal, Run, Share
from stillroom.train import Average, Product, Recipe, Role, Stage, load_product
from stillroom.train.teacher import frozen, part_of

NEIGHBOURS, MOST_HELD, GLIMPSE = 5, 5000, 256


@dataclass(frozen=True, kw_only=True)
class Settings(Images, Run):
    steps: int = 3000
    batch: int = 64
    width: Count = 32
    """Channels of the first stage; every stage doubles them."""
    blocks: tuple[Count, ...] = (1, 1, 1, 1)
    """Of every stage; the paper has 3 4 6 3."""
    patch: Count = 2
    """Pixels a side of the squares that are hidden."""
    hidden: Share = 0.5
    """Share of the squares that are hidden."""
    labels_weight: NotNegative = 0.1
    """Of the classification of whole pictures, for data with labels; 0 leaves them out."""
    ramp: Share = 0.3
    """Share of the steps over which that weight rises from 0."""
    held: Share = 0.1
    """Share of the data on which nothing is learned, for the figures on the card."""
    average: Decay = 0.999
    model: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, clip=1.0, warmup=100, decay="cosine"))


def parted(source: Source | Stream, share: float, seed: int) -> Source | Stream:
    """The source without a share of its items; a stream, which has no number of items, as it is."""
    if isinstance(source, Stream):
        return source
    held = min(round(share * len(source)), MOST_HELD)
    if not 1 < held < len(source):
        return source
    order = permutation(len(source), seed, -1)
    return Parted(source, order[held:], order[:held])


class MaskedFeatures(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        refuse_what_cannot_be(settings, data)
        self.settings, self.data = settings, data
        self.labels = data.classes is not None and settings.labels_weight > 0
        classes = len(data.classes or ()) if self.labels else None
        net = ResNet(data.shape[0], min(data.shape[1:]), settings.width, settings.blocks, classes)
        self.model = MaskedResNet(net)
        self.mean = Average(self.model, settings.average)

    @classmethod
    def prepare(cls, settings, sources, note):
        return {"data": parted(sources["data"], settings.held, settings.seed)}

    def roles(self):
        return {"model": Role(self.model, self.settings.model, average=self.mean)}

    def stages(self):
        return [Stage("train", self.settings.steps)]

    def losses(self, batch, turn):
        x, y = batch["data"]
        mask = self.mask(turn.rand(self.squares(len(x))))
        terms = {"masked": masked_error(self.model(x, mask), x, mask)}
        if self.labels:
            logits = self.model.net.logits(self.model.net.pooled(x)).float()
            terms["labels"] = self.weight(turn.step) * F.cross_entropy(logits, y, reduction="none")
            if turn.watched and self.held is not self.data:
                turn.tell("held out/accuracy", self.glimpse())
        return {"model": terms}

    def weight(self, step: int) -> float:
        s = self.settings
        return s.labels_weight * min(1.0, (step + 1) / max(1.0, s.ramp * s.steps))

    def squares(self, count: int) -> tuple[int, ...]:
        """The shape of uniforms, one for each square."""
        return (count, 1, *(n // self.settings.patch for n in self.data.shape[1:]))

    def mask(self, u: Tensor) -> Tensor:
        return squares(u, self.settings.hidden, self.settings.patch)

    @torch.no_grad()
    def glimpse(self) -> Tensor:
        """The accuracy of the average so far, on a few hundred pictures; that on all of them is on the card."""
        x, y = cast(Source, self.held).fetch(range(at_most(self.held, GLIMPSE)), 0)
        device = next(self.model.parameters()).device
        return (self.net.logits(self.net.pooled(x.to(device))).argmax(1).cpu() == y).float().mean()

    # ---- what comes of it ----

    @property
    def net(self) -> ResNet:
        return cast(MaskedResNet, self.mean.module).net

    def preview(self):
        x, mask, painted = self.painted(sample(self.held, at_most(self.held, 16), self.settings.seed).x)
        return {"pictures": x, "masked": x * (1 - mask), "reconstructions": torch.where(mask > 0, painted, x)}

    @property
    def held(self) -> Source | Stream:
        return getattr(self.data, "held", self.data)

    def painted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same squares are hidden whenever this is asked."""
        u = torch.rand(self.squares(len(x)), generator=torch.Generator().manual_seed(self.settings.seed), device="cpu")
        x = x.to(next(self.model.parameters()).device)
        mask = self.mask(u.to(x.device))
        return x, mask, self.mean(x, mask)

    def product(self):
        card = {"data": self.settings.data, "shape": list(self.data.shape), "features": self.net.widths[-1],
                "classes": None if self.data.classes is None else len(self.data.classes), **encoding_card(self.data)}
        if self.held is not self.data:
            card["held out"] = self.judged(cast(Source, self.held))
        return Product("features", {"features": self.net}, card)

    @torch.no_grad()
    def judged(self, held: Source) -> Mapping[str, Any]:
        """On what nothing was learned from: the error where pictures were hidden, over that of the mean picture; and
        how often pooled features name the class, by their nearest neighbours and by the trained head."""
        errors, features, labels = [], [], []
        total, square = torch.zeros(self.data.shape, dtype=torch.float64), 0.0
        for rows in torch.arange(len(held)).split(256):
            x, y = held.fetch(rows.tolist(), 0)
            total, square = total + x.double().sum(0), square + float(x.double().square().sum())
            x, mask, painted = self.painted(x)
            errors.append(masked_error(painted, x, mask))
            features.append(self.net.pooled(x).float())
            labels += [] if y is None else [y.to(x.device)]
        variance = square / len(held) / total.numel() - float((total / len(held)).square().mean())
        error = float(torch.cat(errors).mean())
        found = {"count": len(held), "masked error over variance": error / max(variance, 1e-9)}
        if labels:
            pooled, y = torch.cat(features), torch.cat(labels)
            found["accuracy of neighbours"] = float((by_neighbours(pooled, y) == y).float().mean())
            if self.labels:
                found["accuracy"] = float((self.net.logits(pooled).argmax(1) == y).float().mean())
        return found


def by_neighbours(x: Tensor, y: Tensor) -> Tensor:
    """[N]: the class most often seen among the nearest others of x [N, F]; of several the lowest."""
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    nearest = distance.topk(min(NEIGHBOURS, len(x) - 1), largest=False).indices
    return y[nearest].mode(1).values


def refuse_what_cannot_be(settings: Settings, data: Source | Stream) -> None:
    if len(data.shape) != 3:
        raise Refusal(f"{data.name}: holds items of shape {list(data.shape)}, and features are of pictures or latents")
    if any(n % settings.patch for n in data.shape[1:]):
        raise Refusal(f"{data.name}: {data.shape[1]} x {data.shape[2]} is no whole number of squares of "
                      f"{settings.patch}; choose another patch")
    if not 0 < settings.hidden < 1:
        raise Refusal(f"hidden = {settings.hidden:g}: hide some of a picture, and show some")


def feature_net(place: str, shape: tuple[int, ...], encoding: Mapping[str, Any] | None) -> nn.Module:
    """For what is of this shape and, where that is known, of this encoding."""
    card = load_product(place).card
    if tuple(card["shape"]) != tuple(shape):
        raise Refusal(f"features {place}: they are of {card['shape']}, the data are {list(shape)}")
    if encoding is not None and card.get("encoding") != encoding.get("encoding"):
        raise Refusal(f"features {place}: made on other latents than this run's, or on pictures; give those of a run "
                      "on the same data")
    return frozen(part_of(place, "features"))

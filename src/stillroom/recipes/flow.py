"""Flow matching: the many-step teacher that everything else distils.

Problem: learn the velocity that carries noise to data, from samples of the data.

Equation (Lipman et al. 2022; on any path): with x_t = alpha x0 + sigma eps,

    min E_{t, x0, eps} | prediction(x_t, t, y) - target |^2,    on the linear path target = eps - x0

Labels are dropped with probability `drop`, so that the same network answers without a condition (classifier-free
guidance, Ho & Salimans 2022). The product is the moving average of the weights.

Paper: Flow Matching, arXiv 2210.02747; Classifier-Free Guidance, arXiv 2207.12598.

Expect: a teacher that passes the gate after some thousand steps on small images.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch

from stillroom.codecs.store import write_store
from stillroom.data import Latents, encoding_card, sample
from stillroom.flows import Denoiser, Flow, check, denoising_loss, drawn_at_once
from stillroom.flows.gate import BINS
from stillroom.nets import DDT, MLP, DiT, UNet
from stillroom.nets.offload import device_of
from stillroom.paths import VE, Cosine, LawName, Linear, Tabulated, dimension_shift, law_of
from stillroom.settings import Count, Decay, Images, Optimizer, Positive, Refusal, Run, Share, Where
from stillroom.train import Average, Product, Recipe, Role, Stage
from stillroom.train.teacher import open_codec, size_of
from stillroom.train.world import pick_device


@dataclass(frozen=True, kw_only=True)
class Network:
    net: Literal["unet", "dit", "ddt"] = "unet"
    """For images and latents; points always get an MLP. ddt is a DiT with a wide shallow head, for latents of many
    channels."""
    width: Count = 64
    depth: Count = 2
    """Blocks per level of a U-Net, or blocks of a DiT."""
    patch: Count = 2
    """Pixels a side of a DiT's token; 1 for latents of many channels."""
    head_width: Count | None = None
    """Of a ddt's head, which should be no narrower than a token has numbers; twice `width` unless given."""
    head_depth: Count = 2


@dataclass(frozen=True, kw_only=True)
class Net(Network, Images, Run):
    """Of whatever learns from data and answers in their shape: a flow, or a generator that begins anew."""


@dataclass(frozen=True, kw_only=True)
class Settings(Net):
    steps: int = 5000
    batch: int = 64
    codec: Where = ""
    """Pictures are encoded by it first, once, into the run's folder: a flow of latents. Else of pictures, or of a store
    of latents, as they are. Pictures are then as large as those that the codec's run learned from, unless --size is
    given."""
    path: Literal["linear", "cosine", "ddpm", "ve"] = "linear"
    prediction: Literal["v", "x0", "eps"] = "v"
    times: LawName = "uniform"
    shift: Positive | None = None
    """Time shift of training and sampling; 1 is none. Unless given, sqrt(d / 4096) for d numbers, and at least 1."""
    drop: Share = 0.1
    """Share of labels dropped, for guidance."""
    average: Decay = 0.999
    sampler: Literal["euler", "heun", "ddim", "dpmpp_2m"] | None = None
    """Unless given, heun; along the path ddpm, whose last step by heun or euler would leave noise in every sample,
    dpmpp_2m."""
    sampler_steps: Count = 18
    model: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, clip=1.0, warmup=100))


PATHS = {"linear": Linear, "cosine": Cosine, "ddpm": Tabulated.ddpm, "ve": VE}


def sampler_of(settings: Settings) -> str:
    return settings.sampler or ("dpmpp_2m" if settings.path == "ddpm" else "heun")


def shift_of(settings: Settings, shape: tuple[int, ...]) -> float:
    """A space of more numbers needs more noise to lose as much of a picture (Esser et al. 2024; RAE)."""
    return max(1.0, dimension_shift(math.prod(shape))) if settings.shift is None else settings.shift


def make_net(settings: Network, shape: tuple[int, ...], classes: int | None, guided: bool = False) -> torch.nn.Module:
    told = {"classes": classes, "guided": guided}
    if len(shape) == 1:
        return MLP(shape[0], settings.width, settings.depth, **told)
    if len(shape) != 3:
        raise Refusal(f"net {settings.net}: takes points [C] or maps [C, H, W], and the data are {list(shape)}")
    if settings.net != "unet" and shape[1] != shape[2]:
        raise Refusal(f"net {settings.net}: takes squares, and the data are {list(shape)}; give --net unet")
    if settings.net == "dit":
        return DiT(shape[0], shape[1], settings.patch, settings.width, settings.depth, heads_of(settings.width), **told)
    if settings.net == "ddt":
        head = settings.head_width or 2 * settings.width
        return DDT(shape[0], shape[1], settings.patch, settings.width, settings.depth, heads_of(settings.width), head,
                   settings.head_depth, heads_of(head), **told)
    net = UNet(shape[0], settings.width, blocks=settings.depth, **told)
    if shape[1] % net.divisor or shape[2] % net.divisor:
        raise Refusal(f"size {shape[1]}: this U-Net halves its pictures and needs sides divisible by {net.divisor}")
    return net


def heads_of(width: int) -> int:
    """About one to 32 channels."""
    return math.gcd(width, max(1, width // 32))


class FlowMatching(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings: Settings, data):
        self.settings, self.data, self.shape = settings, data, data.shape
        if settings.codec and not isinstance(data, Latents):
            raise Refusal(f"codec {settings.codec}: what it makes of {data.name} is made when the run starts; to plan "
                          "the run, make it before (stillroom cache), and give the store as --data, without --codec")
        if (settings.path, settings.prediction) == ("ve", "v"):
            raise Refusal("prediction v: on the path ve a velocity is the noise times 80, which no network answers; "
                          "give --prediction eps, or x0")
        self.classes = None if data.classes is None else len(data.classes)
        self.null = self.classes or 0  # the label that stands for "no condition"
        path = PATHS[settings.path]()
        self.shift = shift_of(settings, data.shape)
        self.law = law_of(settings.times, path, self.shift)
        net = make_net(settings, data.shape, self.classes)
        self.model = Denoiser(net, path, settings.prediction, scale_input=settings.path == "ve")
        self.mean = Average(self.model, settings.average)

    @classmethod
    def settled(cls, settings):
        size = settings.size or (size_of(settings.codec) if settings.codec else None)
        return replace(settings, size=size, sampler=sampler_of(settings))

    @classmethod
    def prepare(cls, settings, sources, note):
        if not settings.codec:
            return sources
        codec = open_codec(settings.codec).to(pick_device(settings.device))
        return {"data": Latents(write_store(settings.out / "latents", codec, sources["data"], settings, note=note))}

    def roles(self):
        return {"model": Role(self.model, self.settings.model, average=self.mean)}

    def stages(self):
        return [Stage("train", self.settings.steps)]

    def losses(self, batch, turn):
        x, y = batch["data"]
        t, eps = turn.draw(self.law), turn.randn(x)
        if y is not None:
            y = y.masked_fill(turn.rand((len(y),)) < self.settings.drop, self.null)
        return {"model": {"flow": denoising_loss(self.model, x, t, eps, y)}}

    def flow(self) -> Flow:
        s = self.settings
        return Flow(cast(Denoiser, self.mean.module), self.shape, sampler_of(s), s.sampler_steps, self.shift)

    def preview(self):
        return {"samples": self.flow().sample(64, batch=drawn_at_once(self.settings))}

    def product(self):
        card = {"shape": list(self.shape), "classes": self.classes, "data": self.settings.data,
                "shift": self.shift, **encoding_card(self.data)}
        x, y = sample(self.data, self.settings.batch, self.settings.seed)
        device = device_of(self.model)
        verdict = check(cast(Denoiser, self.mean.module), x.to(device), None if y is None else y.to(device))
        card["gate"] = {"passed": verdict.passed, "times": list(BINS), "risk over data mean": list(verdict.ratios)}
        return Product("flow", {"flow": self.flow()}, card)

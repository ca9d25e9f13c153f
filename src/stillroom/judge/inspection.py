"""What `stillroom inspect` does: the samples of a space, their geometry, and how a flow bends in it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.codecs import fingerprint, require_multiple
from stillroom.data import Batch, Encoding, LatentSpace, Source, Stream, at_most, open_source, sample
from stillroom.data.mixed import mixture
from stillroom.data.open import is_known
from stillroom.flows import Flow
from stillroom.flows.flow import noise_of
from stillroom.flows.samplers import latest
from stillroom.judge.asked import Inspection
from stillroom.judge.draws import require_learned
from stillroom.judge.measures import plain
from stillroom.judge.places import codec_at, know_recipe, require_there
from stillroom.judge.sides import replaced
from stillroom.measure.geometry import Over, Stage, cloud_of
from stillroom.measure.portrait import Abstains, portrait, said
from stillroom.measure.trajectory import Trajectories, trajectories
from stillroom.paths import Linear, convert, shift, uniform_grid
from stillroom.settings import Images, Refusal, to_mapping
from stillroom.settings.files import read_json
from stillroom.train.product import load_product
from stillroom.train.teacher import is_mixture, is_ours, kind_of, open_teacher, require_space, size_of
from stillroom.train.world import pick_device

LIMIT = 3000            # vectors of one kind, at most: distances are kept of every pair
FEWEST = 32


class Subject(NamedTuple):
    """Samples of a space, and what they are samples of. A flow is held against it as against a `Source`."""
    name: str
    what: str
    x: Tensor
    y: Tensor | None
    classes: tuple[str, ...] | None
    encoding: Encoding | None
    flow: Flow | None = None
    no_flow: str = "no flow was given: --flow RUN"
    notes: Sequence[str] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])


def inspect(place: str, settings: Inspection) -> dict[str, Any]:
    """Everything measured, as FILE.json holds it."""
    refuse_what_cannot_be(settings)
    places = [place, *settings.against]
    for each in places:
        require_there(each, "a store of latents, a data set, a codec, a flow or a generator", is_space_name(each))
    size, device = size_for_codecs(places), pick_device(settings.device)
    subjects = [with_flow(subject_at(p, settings, size, device), flow, device)
                for p, flow in zip_longest(places, settings.flow, fillvalue="")]
    return {"places": [measured(subject, settings) for subject in subjects], "settings": to_mapping(settings)}


def refuse_what_cannot_be(settings: Inspection) -> None:
    if len(settings.flow) > 1 + len(settings.against):
        raise Refusal(f"--flow: {len(settings.flow)} flows for {1 + len(settings.against)} places; give one for each")
    if not settings.temperatures:
        raise Refusal("--temperatures: give one or more")
    if settings.particles < 2 or not 1 <= settings.wanted * settings.particles < settings.particles:
        raise Refusal(f"--wanted {settings.wanted:g} of {settings.particles} particles: a temperature must let one or "
                      "more of them count, and not all")
    if settings.n < FEWEST:
        raise Refusal(f"--n {settings.n}: of so few samples nothing can be said; give {FEWEST} or more")
    if settings.out is not None and settings.out.suffix.lower() not in (".html", ".htm"):
        raise Refusal(f"--out {settings.out}: the page goes to FILE.html")


def size_for_codecs(places: Sequence[str]) -> int | None:
    """Codecs side by side look at pictures of one size: unless given, that of the first whose run has one."""
    sizes = (size_of(place) for place in places if space_kind(place) == "codec")
    return next(filter(None, sizes), None)


# ---- what is looked at ----

def subject_at(place: str, settings: Inspection, size: int | None, device: torch.device) -> Subject:
    kind = space_kind(place)
    if kind == "codec":
        return encoded(place, settings, size, device)
    if kind in ("flow", "generator"):
        return drawn(place, kind, settings, device)
    if kind != "data":
        raise Refusal(f"{place}: a product of kind {kind!r} is no space; give a codec, a flow, a generator or data")
    source, (x, y) = sampled(place, settings)
    encoding = getattr(source, "encoding", None)
    what = "pixels" if encoding is None else "latents"
    return Subject(source.name, what if x.ndim > 2 else "points", x, y, source.classes, encoding,
                   notes=replaced(source))


def is_space_name(text: str) -> bool:
    """What is looked at without a path of that name: the bundled codec, a closed form, data with a split or mixed."""
    return text == "bundled" or is_mixture(text) or all(is_known(name) for _, name in mixture(text, is_known))


def space_kind(place: str) -> str:
    """`data`, or what a run, a product or a model's folder holds."""
    path = Path(place)
    if place == "bundled":
        return "codec"
    if is_mixture(place):
        return "flow"
    if kind := kind_of(path):
        know_recipe(path)
        return kind
    if path.suffix.lower() in (".safetensors", ".pth"):
        return "codec"
    config = path / "config.json"
    if any((path / part / "config.json").is_file() for part in ("unet", "transformer")):
        return "flow"
    if (path / "vae" / "config.json").is_file():
        return "codec"
    if config.is_file():
        return "codec" if str(read_json(config).get("_class_name")).startswith("Autoencoder") else "flow"
    return "data"


def sampled(spec: str, settings: Inspection) -> tuple[Source | Stream, Batch]:
    """Each sample once."""
    source = open_source(Images(data=spec, size=settings.size, bad_share=settings.bad_share))
    n = at_most(source, settings.n)
    if n < FEWEST:
        raise Refusal(f"{source.name}: {n} samples are too few to say anything of a space; give {FEWEST} or more")
    return source, sample(source, n, settings.seed)


def encoded(place: str, settings: Inspection, common: int | None, device: torch.device) -> Subject:
    """`common`: the size of all codecs looked at, but for one of a single size."""
    codec = codec_at(place)
    size = settings.size or (size_of(place) if hasattr(codec.encoder, "places") else None) or common
    if not settings.data or size is None:
        lacks = [flag for flag, there in (("--data DATA", settings.data), ("--size PIXELS", size)) if not there]
        raise Refusal(f"{place}: a codec needs pictures to encode: {' '.join(lacks)}")
    require_multiple(f"--size {size} is", codec.space.factor, size, of=place)
    source, (x, y) = sampled(settings.data, replace(settings, size=size))
    encoding = Encoding(codec.space, fingerprint(codec), f"centre {size}")
    codec = codec.to(device)
    with torch.inference_mode():
        z = torch.cat([codec.encode(part.to(device)).cpu() for part in x.split(settings.batch)])
    return Subject(place, f"latents of {source.name}, {size} px", z.clone(), y, source.classes, encoding,
                   notes=replaced(source))


def drawn(place: str, kind: str, settings: Inspection, device: torch.device) -> Subject:
    s = settings
    product = load_product(place) if is_ours(Path(place)) else None
    if product is not None:
        require_learned(place, product, s.guidance)
    model: Any = product.parts[kind] if product is not None and kind == "generator" else open_teacher(place)
    model, card = model.to(device), {} if product is None else product.card
    x = model.sample(s.n, s.seed, guidance=s.guidance, batch=s.batch, steps=s.steps)
    encoding = card.get("encoding")
    if encoding is not None:
        encoding = Encoding(LatentSpace(**encoding["space"]), encoding["codec"], encoding["crop"])
    names = None if model.classes is None else tuple(map(str, range(model.classes)))
    return Subject(place, f"samples of a {kind}", x, model.labels(0, s.n), names, encoding,
                   model if kind == "flow" else None, "a generator has no trajectories")


def with_flow(subject: Subject, spec: str, device: torch.device) -> Subject:
    """The subject with its flow, when that makes samples of the same space."""
    if not spec:
        return subject
    know_recipe(Path(spec))
    flow, known = open_teacher(spec), len(subject.classes or ())
    require_space(flow, spec, subject, f"flow {spec}")
    if known and flow.classes not in (None, known):         # either may know none: trajectories are the flow's own
        raise Refusal(f"flow {spec}: it knows {flow.classes} classes, and {subject.name} has {known}")
    return subject._replace(flow=flow.to(device))


# ---- what is measured ----

def measured(subject: Subject, settings: Inspection) -> dict[str, Any]:
    x, space = subject.x.float(), None if subject.encoding is None else subject.encoding.space
    stages: dict[Stage, Tensor] = {"after": x}          # without a normaliser too: it would change nothing
    if space is not None and len(set(space.scale)) > 1:
        stages["before"] = space.denormalise(x)
    channels = x.shape[1] if x.ndim == 4 else x.shape[-1]
    overs: tuple[Over, ...] = ("element", "token", "pooled") if x.ndim > 2 and channels > 1 else ("element",)
    portraits = [
        portrait(cloud_of(samples, subject.y, over, stage, LIMIT, settings.seed), settings.temperatures,
                 settings.particles, settings.seed, look_for_clusters=(over, stage) == ("element", "after"))
        for over in overs for stage, samples in stages.items()
    ]
    if isinstance(nothing := portraits[0].spectra["global"], Abstains):
        raise Refusal(f"{subject.name}: {nothing.why}: it has no geometry")
    paths = Abstains(subject.no_flow) if subject.flow is None else said(followed, subject.flow, settings)
    return {"name": subject.name, "what": subject.what, "n": len(x), "shape": list(subject.shape),
            "classes": None if subject.y is None else len(subject.classes or ()),
            "normaliser": normaliser(space), "normalised": space is not None,
            "portraits": plain(portraits), "trajectories": plain(paths), "notes": list(subject.notes)}


def normaliser(space: LatentSpace | None) -> str:
    if space is None:
        return "none"
    if len(set(space.scale)) == 1:
        return "one scale for all channels, so that every number is the same before and after it"
    return f"a scale for each of {space.channels} channels"


def followed(flow: Flow, settings: Inspection) -> Trajectories:
    """The flow's trajectories on the linear path, whatever its own: there straight means one step."""
    path, n = flow.denoiser.path, settings.flow_samples
    device = next(iter([*flow.parameters(), *flow.buffers()])).device
    end = path.at(latest(flow.denoiser))
    start = float(end.sigma / (end.alpha + end.sigma))
    y = flow.labels(0, n)
    noise = noise_of(flow.shape, 0, n, settings.seed).to(device)
    times = uniform_grid(settings.flow_steps, float(shift(end.alpha.new_tensor(start), 1 / flow.shift)), s=flow.shift)
    return trajectories(linear_velocity(flow, None if y is None else y.to(device)), start * noise, times)


def linear_velocity(flow: Flow, y: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """eps - x0 at x / (alpha + sigma): scaled so, every path is the linear one at time sigma / (alpha + sigma)."""
    denoiser = flow.denoiser
    if isinstance(denoiser.path, Linear):
        return lambda x, t: denoiser.v(x, t, y)

    def velocity(x, t):
        own = denoiser.path.time((t / (1 - t)).double()).clamp(max=1).to(t)
        c = denoiser.path.over(own, x)
        x_t = x * (c.alpha + c.sigma)
        native = denoiser(x_t, own, y)
        return convert(native, x_t, c, denoiser.prediction, "eps") - convert(native, x_t, c, denoiser.prediction, "x0")

    return velocity

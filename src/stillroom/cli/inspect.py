"""`stillroom inspect PLACE`: the geometry of a space, how flows bend in it, and whether drifting will work there."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stillroom.cli.flags import parse
from stillroom.settings import Count, Positive, Refusal, Share, Where, to_mapping

if TYPE_CHECKING:
    from torch import Tensor

    from stillroom.data import Batch, Encoding, Source, Stream
    from stillroom.flows import Flow
    from stillroom.measure.geometry import Over, Stage

ABOUT = ("Measures a space: how many dimensions it spreads in, how its classes and distances lie, what a drifting "
         "kernel would see of it, and how a flow's trajectories bend. PLACE is a store of latents, a data set, a codec "
         "(with --data), or a flow or generator, whose samples are measured.")
LIMIT = 3000            # vectors of one kind, at most: distances are kept of every pair
FEWEST = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    against: tuple[Where, ...] = ()
    """Other places, to stand beside it."""
    flow: tuple[Where, ...] = ()
    """A flow made on the place's latents or pictures, whose trajectories are followed; with --against one for each
    place, in their order."""
    data: Where = ""
    """Pictures that a codec encodes."""
    size: Count | None = None
    """Pixels a side of pictures."""
    n: Count = 2000
    """Samples, at most."""
    temperatures: tuple[Positive, ...] = (0.02, 0.05, 0.2)
    """Of the kernel, in units of the mean distance."""
    particles: Count = 64
    """Samples that a kernel weighs: the positives of a group."""
    wanted: Share = 0.5
    """Share of the particles that the temperature to be recommended lets count."""
    guidance: float = 1.0
    """Of the flow or generator whose samples are measured."""
    steps: Count | None = None
    """Of its sampler."""
    flow_steps: Count = 32
    """Along the trajectories that are followed; each costs two evaluations."""
    flow_samples: Count = 128
    batch: Count = 64
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    """FILE.html: the page; everything measured goes to FILE.json beside it."""


class Subject(NamedTuple):
    """Samples of a space, and what they are samples of. A flow is held against it as against a `Source`."""

    name: str
    what: str
    x: "Tensor"
    y: "Tensor | None"
    classes: tuple[str, ...] | None
    encoding: "Encoding | None"
    flow: "Flow | None" = None
    no_flow: str = "no flow was given: --flow RUN"
    notes: "Sequence[str]" = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])


def run(word: str, arguments: list[str]) -> int:
    place = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if not place and not {"-h", "--help"} & set(arguments):
        raise Refusal("usage: stillroom inspect PLACE [--flow RUN] [--against PLACE2]; see stillroom inspect --help")
    settings = parse(Settings, arguments, "stillroom inspect PLACE", ABOUT)
    refuse_what_cannot_be(settings)
    from stillroom.cli.draws import require_there
    from stillroom.report.geometry import in_terminal, write_inspection
    from stillroom.settings.files import write_atomically
    from stillroom.train.world import pick_device

    places = [place, *settings.against]
    for each in places:
        require_there(each, "a store of latents, a data set, a codec, a flow or a generator", is_space_name(each))
    device = pick_device(settings.device)
    subjects = [with_flow(subject_at(p, settings, device), flow, device)
                for p, flow in zip_longest(places, settings.flow, fillvalue="")]
    found = {"places": [measured(subject, settings) for subject in subjects], "settings": to_mapping(settings)}
    in_terminal(found)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings.out.with_suffix(".json"), json.dumps(found, allow_nan=False))
        print(f"page: {write_inspection(settings.out, found)}")
    return 0


def refuse_what_cannot_be(settings: Settings) -> None:
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


# ---- what is looked at ----

def subject_at(place: str, settings: Settings, device) -> Subject:
    kind = space_kind(place)
    if kind == "codec":
        return encoded(place, settings, device)
    if kind in ("flow", "generator"):
        return drawn(place, kind, settings, device)
    if kind != "data":
        raise Refusal(f"{place}: a product of kind {kind!r} is no space; give a codec, a flow, a generator or data")
    from stillroom.cli.sides import replaced

    source, (x, y) = sampled(place, settings)
    encoding = getattr(source, "encoding", None)
    what = "pixels" if encoding is None else "latents"
    return Subject(source.name, what if x.ndim > 2 else "points", x, y, source.classes, encoding,
                   notes=replaced(source))


def is_space_name(text: str) -> bool:
    """What is looked at without a path of that name: the bundled codec, a closed form, data with a split or mixed."""
    from stillroom.data.mixed import mixture
    from stillroom.data.open import is_known
    from stillroom.train.teacher import is_mixture

    return text == "bundled" or is_mixture(text) or all(is_known(name) for _, name in mixture(text, is_known))


def space_kind(place: str) -> str:
    """`data`, or what a run, a product or a model's folder holds."""
    from stillroom.cli.draws import know_recipe
    from stillroom.settings.files import read_json
    from stillroom.train.teacher import is_mixture, kind_of

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


def sampled(spec: str, settings: Settings) -> "tuple[Source | Stream, Batch]":
    """Each sample once."""
    from stillroom.data import at_most, open_source, sample
    from stillroom.settings import Images

    source = open_source(Images(data=spec, size=settings.size))
    n = at_most(source, settings.n)
    if n < FEWEST:
        raise Refusal(f"{source.name}: {n} samples are too few to say anything of a space; give {FEWEST} or more")
    return source, sample(source, n, settings.seed)


def encoded(place: str, settings: Settings, device) -> Subject:
    import torch

    from stillroom.cli.draws import codec_at
    from stillroom.cli.sides import replaced
    from stillroom.codecs import fingerprint, require_multiple
    from stillroom.data import Encoding

    codec = codec_at(place)
    if not settings.data or settings.size is None:
        raise Refusal(f"{place}: a codec needs pictures to encode: --data DATA --size PIXELS")
    require_multiple(f"--size {settings.size} is", codec.space.factor, settings.size, of=place)
    source, (x, y) = sampled(settings.data, settings)
    encoding = Encoding(codec.space, fingerprint(codec), f"centre {settings.size}")
    codec = codec.to(device)
    with torch.inference_mode():
        z = torch.cat([codec.encode(part.to(device)).cpu() for part in x.split(settings.batch)])
    return Subject(place, f"latents of {source.name}", z.clone(), y, source.classes, encoding,
                   notes=replaced(source))


def drawn(place: str, kind: str, settings: Settings, device) -> Subject:
    from stillroom.data import Encoding, LatentSpace
    from stillroom.train.product import load_product
    from stillroom.train.teacher import is_ours, open_teacher

    s = settings
    card = load_product(place).card if is_ours(Path(place)) else {}
    model: Any = open_teacher(place) if kind == "flow" else load_product(place).parts["generator"]
    model = model.to(device)
    x = model.sample(s.n, s.seed, guidance=s.guidance, batch=s.batch, steps=s.steps)
    encoding = card.get("encoding")
    if encoding is not None:
        encoding = Encoding(LatentSpace(**encoding["space"]), encoding["codec"], encoding["crop"])
    names = None if model.classes is None else tuple(map(str, range(model.classes)))
    return Subject(place, f"samples of a {kind}", x, model.labels(0, s.n), names, encoding,
                   model if kind == "flow" else None, "a generator has no trajectories")


def with_flow(subject: Subject, spec: str, device) -> Subject:
    """The subject with its flow, when that makes samples of the same space."""
    if not spec:
        return subject
    from stillroom.cli.draws import know_recipe
    from stillroom.train.teacher import open_teacher, require_space

    know_recipe(Path(spec))
    flow, known = open_teacher(spec), len(subject.classes or ())
    require_space(flow, spec, subject, f"flow {spec}")
    if known and flow.classes not in (None, known):         # either may know none: trajectories are the flow's own
        raise Refusal(f"flow {spec}: it knows {flow.classes} classes, and {subject.name} has {known}")
    return subject._replace(flow=flow.to(device))


# ---- what is measured ----

def measured(subject: Subject, settings: Settings) -> dict[str, Any]:
    from stillroom.measure.geometry import cloud_of
    from stillroom.measure.portrait import Abstains, portrait, said
    from stillroom.report.compare_measures import plain

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


def normaliser(space) -> str:
    if space is None:
        return "none"
    if len(set(space.scale)) == 1:
        return "one scale for all channels, so that every number is the same before and after it"
    return f"a scale for each of {space.channels} channels"


def followed(flow: "Flow", settings: Settings):
    """The flow's trajectories on the linear path, whatever its own: there straight means one step."""
    from stillroom.flows.flow import noise_of
    from stillroom.flows.samplers import latest
    from stillroom.measure.trajectory import trajectories
    from stillroom.paths import shift, uniform_grid

    path, n = flow.denoiser.path, settings.flow_samples
    device = next(iter([*flow.parameters(), *flow.buffers()])).device
    end = path.at(latest(flow.denoiser))
    start = float(end.sigma / (end.alpha + end.sigma))
    y = flow.labels(0, n)
    noise = noise_of(flow.shape, 0, n, settings.seed).to(device)
    times = uniform_grid(settings.flow_steps, float(shift(end.alpha.new_tensor(start), 1 / flow.shift)), s=flow.shift)
    return trajectories(linear_velocity(flow, None if y is None else y.to(device)), start * noise, times)


def linear_velocity(flow: "Flow", y: "Tensor | None") -> "Callable[[Tensor, Tensor], Tensor]":
    """eps - x0 at x / (alpha + sigma): scaled so, every path is the linear one at time sigma / (alpha + sigma)."""
    from stillroom.paths import Linear, convert

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

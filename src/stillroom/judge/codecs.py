"""What `stillroom compare` does: the data, the codecs, and for each of them what is measured, unless it lies there
already. results.json of a codec holds every part beside all that it depends on; what depends on something else is
measured anew."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom import train
from stillroom.codecs import Codec, fingerprint, require_multiple
from stillroom.data import Batch, Encoding, Latents, LatentSpace, write_latents
from stillroom.flows import Flow
from stillroom.flows.prompts import digest_of
from stillroom.flows.references import open_reference, parse_reference
from stillroom.judge import measures, priors
from stillroom.judge.asked import OfCodecs
from stillroom.judge.draws import built
from stillroom.judge.evaluation import Space
from stillroom.judge.measures import MOVED, VECTORS, plain, rgb
from stillroom.judge.pictures import AT_ONCE, SHOWN, Part, learned_from, pictures_of, real_features, space_of, told
from stillroom.judge.places import codec_at
from stillroom.judge.priors import Budget, patch_for
from stillroom.judge.sides import replaced
from stillroom.measure.metrics import is_few
from stillroom.measure.perceptual import Lpips, lpips_in
from stillroom.measure.portrait import said
from stillroom.measure.spectral import spectral_slope
from stillroom.report.compare_words import front
from stillroom.report.words import listed
from stillroom.settings import Refusal, nearest, to_mapping
from stillroom.settings.files import read_json, sha256, write_atomically
from stillroom.train.pictures import grid
from stillroom.train.teacher import is_ours, open_teacher, size_of
from stillroom.train.world import pick_device

LEAST, SHARDS = 64, 256     # latents a file at least, and files at most, about: what is killed loses one file's
JUDGED = 512            # held-out latents on which a prior's loss is taken


@dataclass(frozen=True)
class Entry:
    name: str
    spec: str
    codec: Codec
    hash: str
    reference: "Target | None" = None


@dataclass(frozen=True)
class Target:
    """A law that latents are held against. A product of dmvae has it as its run made it; of any other codec it is drawn
    from --seed and stands in the codec's own units."""

    text: str
    seed: int
    space: LatentSpace          # whose units it stands in
    base: Codec | None          # whose latents `noised` noises
    classes: int | None         # that it was asked for
    law: Sequence[Any]          # what its samples depend on


@dataclass(frozen=True)
class Table:
    """What all codecs are compared on."""

    learned: Part
    held: Part
    crop: str
    space: Space
    real: Tensor                # [N, D]: features of what the priors learn from
    lpips: Mapping[str, Lpips]
    weights: Mapping[str, str]  # of LPIPS: digests
    budget: Budget
    device: torch.device
    settings: OfCodecs
    watch: train.Watch


def compare(specs: Sequence[str], settings: OfCodecs, watch: train.Watch) -> dict[str, Any]:
    """Everything measured, as compare.json holds it."""
    if settings.steps < priors.LEAST:
        raise Refusal(f"--steps {settings.steps}: a prior is looked at after a quarter of them; give {priors.LEAST} or "
                      "more")
    sizes = (size_of(spec) for _, spec in map(called, specs))
    settings = dataclasses.replace(settings, size=settings.size or next(filter(None, sizes), None))
    device, budget = pick_device(settings.device), budget_of(settings)
    learned, held, crop = pictures_of(settings)
    entries = opened(specs, settings, learned)
    space = space_of(settings, learned, device)
    lpips = lpips_in(Path(settings.lpips)) if settings.lpips else {}
    weights = {net: digest_of(distance.state_dict()) for net, distance in lpips.items()}
    settings.out.mkdir(parents=True, exist_ok=True)
    real, fresh = real_features(settings.out, learned, held, space, watch.note)
    floor = priors.against(fresh, real, settings.seed)
    table = Table(learned, held, crop, space, real, lpips, weights, budget, device, settings, watch)
    grid(rgb(held.first(SHOWN)), columns=SHOWN // 2).save(settings.out / "originals.png")
    found = [measured(entry, table) for entry in entries]
    about = {
        "learned": told(learned), "held_out": told(held), "classes": None if held.classes is None else
        len(held.classes), "size": learned.shape[-1], "crop": crop, "space": space.name, "features": real.shape[1],
        "few": is_few(len(fresh), real.shape[1]), "floor": floor, "n": len(held),
        "slope": plain(said(spectral_slope, held.first(MOVED))), "device": device.type,
        "threads": torch.get_num_threads(), "notes": [*seen_before(entries, held), *replaced(learned, held)],
    }
    return {"about": about, "settings": to_mapping(settings), "codecs": found, "front": front(found, floor)}


def budget_of(s: OfCodecs) -> Budget:
    return Budget(s.steps, s.batch, s.width, s.depth, s.tokens, s.rate, s.seed)


# ---- codecs ----

def opened(specs: Sequence[str], settings: OfCodecs, learned: Part) -> list[Entry]:
    """Every codec under a name of its own, refused here if it cannot be compared: before anything is trained."""
    named = [called(spec) for spec in specs]
    names = [name for name, _ in named]
    for name, spec in named:
        if names.count(name) > 1:
            raise Refusal(f"two codecs are called {name!r} ({spec} is one): say NAME={spec}")
    references, bases = references_of(settings, names), bases_of(settings, names)
    entries, size = list[Entry](), learned.shape[-1]
    for name, spec in named:
        codec = codec_at(spec).to(pick_device(settings.device)).eval()
        require_multiple(f"--size {size} is", codec.space.factor, size, of=spec)
        card = brought_card(spec)
        text: str = references[name] if name in references else card.get("reference", "")
        target = None
        if text not in ("", "none"):
            target = as_made(name, text, card, bases.get(name, "")) if card else Target(
                text, settings.seed, codec.space, codec, None, law_of(text))
        entries.append(Entry(name, spec, codec, fingerprint(codec), target))
    return entries


def called(spec: str) -> tuple[str, str]:
    """(name, codec) of CODEC or NAME=CODEC."""
    name, equals, place = spec.partition("=")
    if equals and not Path(spec).exists():
        if not name or not place or re.fullmatch(r"[\w.-]*\w", name) is None:
            raise Refusal(f"{spec}: write NAME=CODEC, the name of letters, digits, dots and dashes")
        return name, place
    path = Path(spec)
    path = path.parent if path.name == "product" else path
    stem = path.stem if path.suffix.lower() in (".safetensors", ".pth") else path.resolve().name
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "codec", spec


def references_of(settings: OfCodecs, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in settings.reference:
        name, equals, spec = text.partition("=")
        own = bool(equals) and not Path(text).exists()
        if own and name not in names:
            raise Refusal(f"--reference {text}: no codec is called {name!r}{nearest(name, names)}")
        if (law := spec if own else text) != "none":
            parse_reference(law)
        found |= {name: spec} if own else dict.fromkeys(names, text) | found
    return found


def bases_of(settings: OfCodecs, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in settings.base:
        name, equals, spec = text.partition("=")
        if not equals or name not in names:
            raise Refusal(f"--base {text}: write NAME=CODEC, with NAME one of {', '.join(names)}")
        found[name] = spec
    return found


def brought_card(spec: str) -> Mapping[str, Any]:
    """Of a product of dmvae: of no other does the card name a reference."""
    card = train.load_product(spec).card if is_ours(Path(spec)) else {}
    return card if "reference" in card else {}


def as_made(name: str, text: str, card: Mapping[str, Any], place: str) -> Target:
    """The law that a run of dmvae brought its latents to, or another that stands where that one did."""
    if "units" not in card:
        raise Refusal(f"{name}: its card does not say in which units its reference stands; train it anew, or leave its "
                      f"reference out: --reference {name}=none")
    noises, seed = parse_reference(text).kind == "noised" and not parse_reference(text).file, card["seed"]
    base = base_of(name, text, card, place or card["codec"]) if noises else None
    return Target(text, seed, LatentSpace(**card["units"]), base, card["classes"],
                  [*law_of(text), seed, card["units"], card["classes"], card["codec_hash"] if noises else None])


def base_of(name: str, text: str, card: Mapping[str, Any], place: str) -> Codec:
    """The codec that a product began with."""
    cure = f"{name}: {text} is of the latents of the codec that it began with; say where that is: --base {name}=CODEC"
    try:
        codec = codec_at(place).eval()
    except Refusal as refusal:
        raise Refusal(f"{cure} ({refusal})") from None
    if fingerprint(codec) != card["codec_hash"]:
        raise Refusal(f"{cure} ({place} is another codec)")
    return codec


def law_of(reference: str) -> list[str]:
    """What its samples depend on: its text, and the file or run of ours that lies there now."""
    spec = parse_reference(reference)
    if spec.kind == "samples":
        if not (file := Path(spec.file)).is_file():
            raise Refusal(f"--reference {reference}: no such file of samples")
        return [reference, sha256(file)]
    ours = bool(spec.file) and is_ours(Path(spec.file))
    return [reference, *([train.product_hash(spec.file), built(spec.file)] if ours else [])]


def seen_before(entries: Sequence[Entry], held: Part) -> list[str]:
    """What is said of codecs whose runs learned from where the held-out pictures are taken: by the runs' own records,
    so of no others."""
    names = [entry.name for entry in entries if learned_from(entry.spec, held.name)]
    return [f"{listed(names)} learned from {held.name} too: the held-out pictures are new to the priors, and not to "
            f"{'it' if len(names) == 1 else 'them'}, so that reconstructions may look better than those of new "
            "pictures; give such with --heldout DATA."] if names else []


# ---- one codec ----

class Kept:
    """results.json: {part: {"of": what it depends on, "found": what was measured}}."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Any] = read_json(self.file) if self.file.is_file() else {}

    def __call__(self, part: str, of: Mapping[str, Any], measure: Callable[[], Any],
                 pictures: Sequence[str] = ()) -> Any:
        """`pictures`: files of the folder that the part leaves."""
        of = json.loads(json.dumps(dict(of)))
        held = self.parts.get(part)
        if held is None or held["of"] != of or not all((self.folder / name).is_file() for name in pictures):
            found = json.loads(json.dumps(measure(), allow_nan=False))
            self.parts[part] = held = {"of": of, "found": found}
            write_atomically(self.file, json.dumps(self.parts, indent=1))
        return held["found"]


def measured(entry: Entry, table: Table) -> dict[str, Any]:
    s, codec = table.settings, entry.codec
    folder = s.out / entry.name
    kept, space = Kept(folder), codec.space
    side = table.learned.shape[-1] // space.factor
    budget = dataclasses.asdict(table.budget) | {"patch": patch_for(table.budget, side)}
    of = {"codec": entry.hash, "learned": table.learned.digest, "held": table.held.digest, "crop": table.crop}

    def tell(text: str) -> None:
        table.watch.note(f"{entry.name}: {text}")

    judges = {"space": table.space.name, "lpips": table.weights}
    back = kept("reconstruction", {k: of[k] for k in ("codec", "held")} | judges,
                lambda: reconstructed(entry, table, folder, tell), ["reconstructions.png"])
    latents = Encodes(entry, table, folder / f"latents-{short(of)}", tell)
    shape = kept("latents", of | {"seed": s.seed},
                 lambda: portrayed(entry, table, latents, tell))
    prior = of | {"budget": budget}
    run = folder / f"prior-{short(prior)}"

    def go() -> Path:
        flow = priors.prior_settings(table.budget, latents.store(), side, run, s.device)
        if not (run / "product").is_dir():
            tell(f"a prior of {flow.steps} steps, {(side // flow.patch) ** 2} tokens")
        return priors.trained(flow, table.watch)

    loss = kept("prior", prior, lambda: judged(go(), latents))
    how = {"real": len(table.real), "space": table.space.name, "n": len(table.held), "guidance": s.guidance,
           "sampler_steps": s.sampler_steps}
    rows = kept("generation", prior | how, lambda: sampled(entry, table, go(), folder, tell), ["samples.png"])
    away = None
    if entry.reference:
        away = kept("reference", of | {"reference": entry.reference.law, "seed": s.seed},
                    lambda target=entry.reference: to_reference(target, entry, table, latents, tell))
    halves_of = {half: sum(p.numel() for p in module.parameters()) for half, module in
                 (("encoder", codec.encoder), ("decoder", codec.decoder))}
    what = {"channels": space.channels, "factor": space.factor, "side": side, "numbers": space.channels * side**2,
            "tokens": (side // budget["patch"]) ** 2, "parameters": halves_of}
    return {"name": entry.name, "spec": entry.spec, "hash": entry.hash, "what": what, "reconstruction": back,
            "latents": shape, "prior": loss | {"run": run.name}, "generation": rows, "reference": away}


def short(of: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(of), sort_keys=True).encode()).hexdigest()[:8]


def reconstructed(entry: Entry, table: Table, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    tell(f"{len(table.held)} held-out pictures there and back")
    metrics, absent = measures.metrics_for(table.held.shape[-1], table.lpips, table.device)
    found, pictures = measures.reconstruction(entry.codec, table.held.batches(), metrics, table.space.of, SHOWN)
    grid(pictures, columns=SHOWN // 2).save(folder / "reconstructions.png")
    return found | {"absent": absent}


class Encodes:
    """A codec's latents: a store of those that are learned from, and the held-out ones; made when they are asked."""

    def __init__(self, entry: Entry, table: Table, folder: Path, tell: Callable[[str], None]):
        self.entry, self.table, self.folder, self.tell = entry, table, folder, tell

    def encoded(self, part: Part, start: int = 0) -> Iterator[Batch]:
        codec = self.entry.codec
        for x, y in part.batches(start):
            with torch.inference_mode():
                yield Batch(codec.encode(x.to(codec.device)).float().cpu(), y)

    def store(self) -> Path:
        if not (self.folder / "latents.json").is_file():
            self.tell(f"{len(self.table.learned)} pictures to latents")
        space, part = self.entry.codec.space, self.table.learned

        def own(start: int) -> Iterator[Batch]:
            return (Batch(space.denormalise(z), y) for z, y in self.encoded(part, start))

        return write_latents(self.folder, own, Encoding(space, self.entry.hash, self.table.crop), part.classes,
                             f"{part.name}, {len(part)} pictures", max(LEAST, len(part) // SHARDS))

    def some(self) -> Batch:
        source = Latents(self.store())
        return source.fetch(range(min(VECTORS, len(source))), 0)       # the part is shuffled already

    @cached_property
    def held(self) -> Batch:
        z, y = zip(*self.encoded(self.table.held), strict=True)
        return Batch(torch.cat(z).clone(), None if y[0] is None else torch.cat(y))


def portrayed(entry: Entry, table: Table, latents: Encodes, tell: Callable[[str], None]) -> dict[str, Any]:
    tell("probes, spectra, velocities")
    (z, y), (held, held_y) = latents.some(), latents.held
    if not float(min(z.std(), held.std())) > 0:
        raise Refusal(f"{entry.spec}: all its latents are equal: there is nothing to model")
    found = measures.of_latents(z, y, held[:VECTORS], None if held_y is None else held_y[:VECTORS], table.settings.seed)
    return found | {"moves": measures.moves(entry.codec, table.held.first(MOVED))}


def judged(run: Path, latents: Encodes) -> dict[str, Any]:
    flow: Flow = train.load(run)
    (z, y), device = latents.held, latents.entry.codec.device
    labels = None if y is None or flow.classes is None else y[:JUDGED].to(device)
    told = {"seconds": priors.seconds_of(run), "parameters": sum(p.numel() for p in flow.parameters())}
    return priors.risks(flow.to(device), z[:JUDGED].to(device), labels) | told


def sampled(entry: Entry, table: Table, run: Path, folder: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    s, n = table.settings, len(table.held)
    y = torch.cat([labels for _, labels in table.held.batches() if labels is not None]) if table.held.classes else None
    rows, pictures = priors.generation(run, s.steps, entry.codec, table.space.of, table.real, n, s.seed, y, s.guidance,
                                s.sampler_steps, SHOWN, tell)
    for name, x in pictures.items():
        grid(x, columns=SHOWN // 2).save(folder / f"{name}.png")
    return rows


def to_reference(target: Target, entry: Entry, table: Table, latents: Encodes,
                 tell: Callable[[str], None]) -> dict[str, Any]:
    tell(f"distance to {target.text}")
    (z, y), seed, mine = latents.held, table.settings.seed, entry.codec.space
    if target.space != mine:
        z = target.space.normalise(mine.denormalise(z))

    def noised() -> tuple[Tensor, None]:
        return latents.some().x if target.base is entry.codec else first_latents(target.base, table), None

    classes = target.classes if target.classes == len(table.held.classes or ()) else None
    flow = open_reference(target.text, tuple(z.shape[1:]), classes, noised, open_teacher, target.seed, tell)
    both = None if flow.classes is None or classes is None or y is None else torch.cat([y, y])
    w = flow.sample(2 * len(z), seed, both)
    return {"reference": target.text} | measures.distance_to(z, w[: len(z)], w[len(z) :], seed)


@torch.inference_mode()
def first_latents(codec: Codec | None, table: Table) -> Tensor:
    """As many as are kept of the compared codec's, of the pictures that priors learn from."""
    assert codec is not None
    codec, x = codec.to(table.device), table.learned.first(VECTORS)
    return torch.cat([codec.encode(part.to(table.device)).float().cpu() for part in x.split(AT_ONCE)])

"""`stillroom sweep RUN --data HELDOUT`: a distilled codec over sizes and scales, beside its teacher and rivals."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cli.draws import CODECS, is_codec_name, require_there
from stillroom.cli.flags import parse, take
from stillroom.cli.progress import teller
from stillroom.settings import Count, Natural, Positive, Refusal, Where, nearest

if TYPE_CHECKING:
    from stillroom.codecs import Codec
    from stillroom.codecs.sweep import Laws, Metric

ABOUT = ("Measures a student encoder on held-out pictures at several sizes, remapped by several scales, beside its "
         "teacher, the teacher in fewer bits, and linear codes of the same latent size and of the same latent budget; "
         "chooses a scale on a part of the pictures, and judges it on the others.")
SMALLEST, LARGEST = 16, 8192
OPTIONAL = ("teacher-bf16", "teacher-int8", "klt", "klt-budget")


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Where
    """Pictures that nothing was trained on: a folder, files, a parquet, photos:test or leaves:test."""
    sizes: str = "64,128,256,512,1024"
    """Pixels a side of the squares. A size above a picture's short side leaves that picture out."""
    scales: str = "0.5,1,1.25,1.5,2,3"
    """Of remapping; 1 is always among them."""
    teacher: Where = ""
    """`bundled`, a run, a diffusers folder or hub id, or a TAESD weight file; the one on the student's card, unless
    given."""
    scratch: Where = ""
    """A codec trained without a teacher, to stand beside them."""
    recon_only: Where = ""
    """A codec whose encoder learned through the teacher's decoder from pixels alone."""
    linear: Where = ""
    """Pictures that the linear codes klt and klt-budget are fitted on; those that choose the scale, unless given."""
    without: str = ""
    """Contenders to leave out: teacher-bf16, teacher-int8, klt, klt-budget."""
    limit: Count | None = None
    """Pictures, at most."""
    most_latents: Positive | None = None
    """The chosen scale spends at most this many times the native number of latents."""
    most_ms: Positive | None = None
    """The chosen scale encodes one picture of the largest size in at most this many milliseconds."""
    save: bool = False
    """Write the chosen scale into the run's product."""
    lpips: Where = ""
    """Folder with public weight files of LPIPS; random features stand in, unless given."""
    inception: Where = ""
    """Public weight file of FID's Inception; random features stand in, unless given."""
    out: Path | None = None
    """Folder of the results; RUN/sweep, unless given."""
    tile: Natural = 1024
    """Pixels a side of the tiles in which codecs take larger pictures; 0 takes any picture whole."""
    device: str = "auto"


def run(word: str, arguments: list[str]) -> int:
    quiet = take(arguments, "--quiet")
    place = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if not place and not {"-h", "--help"} & set(arguments):
        raise Refusal("usage: stillroom sweep RUN --data HELDOUT; see stillroom sweep --help")
    settings = parse(Settings, arguments, "stillroom sweep RUN", ABOUT)
    require_there(place, CODECS, is_codec_name(place))
    tell = teller(quiet)
    sizes = numbers(settings.sizes, "--sizes", int, SMALLEST, LARGEST)
    scales = numbers(settings.scales, "--scales", float, 0.01, 100)
    out = place_for(settings, place)
    codecs, card = opened(settings, place)
    found, compared = measured(settings, codecs, card, sizes, tuple(sorted({*scales, 1.0})), tell)
    found = {"run": place, "card": card} | found
    from stillroom.report.sweep import choice_in_words, write_sweep

    out.mkdir(parents=True, exist_ok=True)
    write_tables(out, found)
    page = write_sweep(out, found, compared)
    choice = found["choice"]
    print(f"{choice_in_words(choice)}\npage: {page}")
    if settings.save:
        keep(place, found, settings)
        print(f"{place}: saved; stillroom.load({place!r}).remapped() now means remapped({choice['scale']:g})")
    return 0


def numbers(text: str, flag: str, kind: Callable[[str], Any], low: float, high: float) -> tuple[Any, ...]:
    """`64,128` as rising numbers, each once."""
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise Refusal(f"{flag} {text!r}: give numbers with commas between them, {flag} 64,128") from None
    for n in found:
        if not (math.isfinite(n) and low <= n <= high):
            raise Refusal(f"{flag}: {n} lies outside {low:g} to {high:g}")
    return tuple(found)


def place_for(settings: Settings, place: str) -> Path:
    from stillroom.train.teacher import is_ours

    ours = is_ours(Path(place))
    if settings.save and not ours:
        raise Refusal(f"{place}: --save writes into the product of a run, and this is none")
    if settings.out is None and not ours:
        raise Refusal(f"{place}: not a run of stillroom's, so results need a folder: --out FOLDER")
    return settings.out or Path(place) / "sweep"


# ---- who is compared ----

def opened(settings: Settings, place: str) -> "tuple[dict[str, Codec], dict[str, Any]]":
    """Contenders that are codecs, teacher first, and the student's card."""
    from stillroom.cli.draws import codec_at
    from stillroom.codecs.bits import in_bfloat16, with_int8_weights
    from stillroom.train.product import load_product
    from stillroom.train.teacher import is_ours
    from stillroom.train.world import pick_device

    left_out = [name for name in settings.without.split(",") if name]
    for name in left_out:
        if name not in OPTIONAL:
            raise Refusal(f"--without {name}: no contender that can be left out{nearest(name, OPTIONAL)}")
    student = codec_at(place)
    card = dict(load_product(place).card) if is_ours(Path(place)) else {}
    spec = settings.teacher or str(card.get("teacher", ""))
    if not spec:
        raise Refusal(f"{place}: its card names no teacher; say which with --teacher")
    teacher = codec_at(spec)
    if not settings.teacher:
        require_same(teacher, spec, card)
    codecs = {"teacher": teacher, "student": student}
    makers = {"teacher-bf16": in_bfloat16, "teacher-int8": with_int8_weights}
    codecs |= {name: make(teacher) for name, make in makers.items() if name not in left_out}
    codecs |= {name: codec_at(spec) for name, spec in (("scratch", settings.scratch),
                                                         ("recon-only", settings.recon_only)) if spec}
    if (student.space.channels, student.space.factor) != (teacher.space.channels, teacher.space.factor):
        raise Refusal(f"{place}: latents of {student.space.channels} channels, each of {student.space.factor} pixels; "
                      f"its teacher's have {teacher.space.channels}, each of {teacher.space.factor}: not its student")
    device = pick_device(settings.device)
    return {name: codec.to(device).eval() for name, codec in codecs.items()}, card


def require_same(teacher: "Codec", spec: str, card: Mapping[str, Any]) -> None:
    """The teacher that the student was distilled from, by its hash."""
    from stillroom.codecs import fingerprint

    if card.get("teacher_hash") not in (None, fingerprint(teacher)):
        raise Refusal(f"teacher {spec}: no longer the codec that this student was distilled from; "
                      "name another with --teacher to compare with it all the same")


# ---- what is measured ----

def measured(settings: Settings, codecs: "dict[str, Codec]", card: Mapping[str, Any], sizes: tuple[int, ...],
             scales: tuple[float, ...], tell: Callable[[str], None]) -> tuple[dict[str, Any], list]:
    import torch

    from stillroom.codecs.study import FEWEST, Plan, comparisons, linear, split, study
    from stillroom.codecs.sweep import METRICS, SMALLEST, applicable
    from stillroom.data.pictures import pictures
    from stillroom.data.scenes import KINDS

    distances, smallest, laws = views(settings, next(iter(codecs.values())).device)
    metrics = applicable({**METRICS, **distances}, max(sizes), SMALLEST | smallest)
    size = card.get("size")
    plan = Plan(sizes, scales, size if isinstance(size, int) else None, settings.most_latents, settings.most_ms,
                metrics, laws, settings.tile, SMALLEST | smallest)
    drawn = max(sizes) if settings.data.partition(":")[0] in KINDS else None
    source = pictures(settings.data, settings.limit, drawn)
    sides = {name: min(x.shape[-2:]) for name, x in source}
    unreadable = dict(source.bad)

    def album():
        return source

    if not any(side >= min(sizes) for side in sides.values()):
        raise Refusal(f"{settings.data}: {len(sides)} pictures, none with sides of {min(sizes)} pixels or more; "
                      "give larger pictures or smaller --sizes")
    choosing, judging = split(name for name, side in sides.items() if side >= min(sizes))
    contenders: dict[str, Any] = dict(codecs)
    if choosing:
        fitted = linear(*linear_data(settings, album, choosing), plan, codecs["teacher"])
        contenders |= {name: codec for name, codec in fitted.items() if name not in settings.without.split(",")}
    else:
        tell(f"fewer than {FEWEST} pictures: no scale is chosen, and no linear code is fitted")
    found = study(contenders, album, plan, choosing, judging, tell)
    scale = found["choice"]["scale"] or (1.5 if 1.5 in scales else scales[-1])
    shown = {name: metrics[name] for name in ("psnr", "mse", *distances) if name in metrics}
    compared = comparisons(contenders, album, found, scale, shown, plan.smallest)
    device = codecs["teacher"].device
    about = {"data": settings.data, "pictures": len(sides), "unreadable": unreadable,
             "credits": list(source.credits), "calibration": choosing, "evaluation": judging,
             "too_small": len(sides) - len(choosing) - len(judging), "shown_scale": scale,
             "threads": torch.get_num_threads(), "precision": "float32", "tile": settings.tile,
             "distances": list(distances),
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
             "encoder_parameters": {n: sum(p.numel() for p in (*c.encoder.parameters(), *c.encoder.buffers()))
                                    for n, c in codecs.items()}}
    return about | found, compared


def linear_data(settings: Settings, album, choosing):
    """(pictures, names of those to fit on)"""
    if not settings.linear:
        return album, choosing
    from stillroom.data.pictures import pictures

    others = pictures(settings.linear)
    return lambda: others, [name for name, _ in others]


def views(settings: Settings, device) -> "tuple[dict[str, Metric], dict[str, int], Laws]":
    """Networks that look at pictures: distances, the pixels a side that each needs, and the features of a Fréchet
    distance."""
    from stillroom.codecs.sweep import Laws
    from stillroom.measure.perceptual import BACKBONES, SMALL, RandomFeatures, feature_distance_of, lpips_in, pooled

    random = RandomFeatures(widths=SMALL).to(device)
    distances: dict[str, Metric] = {"random_lpips": by_one(feature_distance_of(random), device)}
    if settings.lpips:
        distances = {f"lpips_{net}": by_one(lpips.to(device), device)
                     for net, lpips in lpips_in(Path(settings.lpips)).items()}
    smallest = {f"lpips_{net}": backbone.smallest for net, backbone in BACKBONES.items()}
    if not settings.inception:
        return distances, smallest, Laws("rf_fid", by_one(pooled(random), device))
    from stillroom.measure.inception import FidInception

    return distances, smallest, Laws("fid", by_one(FidInception.from_file(settings.inception).to(device), device))


def by_one(function, device):
    """Of [B, ...] picture by picture, on the device: maps of a batch do not stay in the cache, which is three times
    slower."""
    import torch

    def one_by_one(*batches):
        parts = (b.to(device).contiguous(memory_format=torch.channels_last).split(1) for b in batches)
        return torch.cat([function(*part) for part in zip(*parts, strict=True)])

    return one_by_one


# ---- what is left behind ----

def write_tables(out: Path, found: Mapping[str, Any]) -> None:
    from stillroom.settings.files import write_atomically

    write_atomically(out / "sweep.json", json.dumps(found, indent=1, allow_nan=False))
    write_atomically(out / "sweep.csv", table(found["rows"]))


def table(rows: list[Mapping[str, Any]]) -> str:
    """One line per size, scale and contender; a mean is followed by the ends of its interval over pictures."""
    means = list(dict.fromkeys(name for row in rows for name in row["means"]))
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["size", "scale", "contender", "pictures", "latents", "latents_over_native", "encode_ms",
                     *(f"{name}{end}" for name in means for end in ("", "_low", "_high")), *scores])
    for row in rows:
        spread = [row["means"].get(name, {}).get(key) for name in means for key in ("mean", "low", "high")]
        writer.writerow([row["size"], row["scale"], row["contender"], len(row["values"]["mse"]), row["latents"],
                         row["latents_over_native"], row["encode_ms"], *spread,
                         *(row["scores"].get(name) for name in scores)])
    return out.getvalue()


def keep(place: str, found: Mapping[str, Any], settings: Settings) -> None:
    """The chosen scale, as what the codec means by `remapped()`, and on its card how it was chosen."""
    from stillroom.train.product import amend_product

    choice = found["choice"]
    if choice["scale"] is None:
        raise Refusal(f"{place}: nothing was saved: {choice['why']}")
    entry = {key: choice[key] for key in ("scale", "best", "edge", "pictures", "most_latents", "most_ms", "psnr")}
    entry |= {"data": settings.data, "scales": found["scales"],
              "sizes": [e["size"] for e in found["sizes"] if e.get("calibration")]}
    amend_product(place, {"codec": {"remap": choice["scale"]}}, {"remap": entry})

"""What `stillroom sweep` does: a student over sizes and scales beside its teacher, rivals and linear codes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stillroom.codecs import Codec, fingerprint
from stillroom.codecs.bits import in_bfloat16, with_int8_weights
from stillroom.codecs.study import FEWEST, Plan, comparisons, linear, split, study
from stillroom.codecs.sweep import METRICS, SMALLEST, Laws, Metric, applicable
from stillroom.data.pictures import pictures
from stillroom.data.scenes import KINDS
from stillroom.judge.asked import Sweep
from stillroom.judge.pictures import learned_from
from stillroom.judge.places import codec_at
from stillroom.measure.inception import FidInception
from stillroom.measure.perceptual import BACKBONES, SMALL, RandomFeatures, feature_distance_of, lpips_in, pooled
from stillroom.settings import Refusal, nearest
from stillroom.train.product import load_product
from stillroom.train.teacher import is_ours
from stillroom.train.world import pick_device

OPTIONAL = ("teacher-bf16", "teacher-int8", "klt", "klt-budget")


# ---- who is compared ----

def opened(settings: Sweep, place: str) -> tuple[dict[str, Codec], dict[str, Any]]:
    """Contenders that are codecs, teacher first, and the student's card."""
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


def require_same(teacher: Codec, spec: str, card: Mapping[str, Any]) -> None:
    """The teacher that the student was distilled from, by its hash."""
    if card.get("teacher_hash") not in (None, fingerprint(teacher)):
        raise Refusal(f"teacher {spec}: no longer the codec that this student was distilled from; "
                      "name another with --teacher to compare with it all the same")


def seen_before(settings: Sweep, place: str) -> list[str]:
    """Which of the codecs learned from the pictures that they are judged on, by the records of their runs."""
    places = {"student": place, "teacher": settings.teacher, "scratch": settings.scratch,
              "recon-only": settings.recon_only}
    return [name for name, where in places.items() if where and learned_from(where, settings.data)]


# ---- what is measured ----

def measured(settings: Sweep, codecs: dict[str, Codec], card: Mapping[str, Any], sizes: tuple[int, ...],
             scales: tuple[float, ...], tell: Callable[[str], None]) -> tuple[dict[str, Any], list]:
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


def linear_data(settings: Sweep, album, choosing):
    """(pictures, names of those to fit on)"""
    if not settings.linear:
        return album, choosing
    others = pictures(settings.linear)
    return lambda: others, [name for name, _ in others]


def views(settings: Sweep, device: torch.device) -> tuple[dict[str, Metric], dict[str, int], Laws]:
    """Networks that look at pictures: distances, the pixels a side that each needs, and the features of a Fréchet
    distance."""
    random = RandomFeatures(widths=SMALL).to(device)
    distances: dict[str, Metric] = {"random_lpips": by_one(feature_distance_of(random), device)}
    if settings.lpips:
        distances = {f"lpips_{net}": by_one(lpips.to(device), device)
                     for net, lpips in lpips_in(Path(settings.lpips)).items()}
    smallest = {f"lpips_{net}": backbone.smallest for net, backbone in BACKBONES.items()}
    if not settings.inception:
        return distances, smallest, Laws("rf_fid", by_one(pooled(random), device))
    return distances, smallest, Laws("fid", by_one(FidInception.from_file(settings.inception).to(device), device))


def by_one(function, device):
    """Of [B, ...] picture by picture, on the device: maps of a batch do not stay in the cache, which is three times
    slower."""

    def one_by_one(*batches):
        parts = (b.to(device).contiguous(memory_format=torch.channels_last).split(1) for b in batches)
        return torch.cat([function(*part) for part in zip(*parts, strict=True)])

    return one_by_one

"""The whole study of a student over sizes and scales: what is measured, on which pictures, and the scale it chooses.

The answer is one mapping that JSON can hold. A picture serves either to choose (the scale, the linear codec) or to
judge, never both.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.codecs.codec import Codec
from stillroom.codecs.klt import fit_klt
from stillroom.codecs.sweep import (
    METRICS,
    SMALLEST,
    EqualBudget,
    Laws,
    Metric,
    Remaps,
    Row,
    applicable,
    encode_ms,
    forms_at,
    square,
    sweep,
    truncated,
)
from stillroom.codecs.theorems import aligned, derivative, directions, least_slope
from stillroom.data.images import signed
from stillroom.measure.bootstrap import difference_interval, mean_interval, sweet_spot, sweet_spot_gap

Album = Callable[[], Iterable[tuple[str, Tensor]]]
"""All pictures under their names, [3, H, W], read anew each time: large sets do not fit in memory at their own size."""
CALIBRATION = 0.3
LARGEST_SHOWN = 384     # pixels a side of pictures that stand on the page, unless all sizes are larger
FEWEST = 4              # pictures, below which none can be spared to choose by
TANGENTS = 8            # pictures at each size whose derivatives are taken
UNTIMED = ("teacher-int8",)     # rounded weights in float arithmetic: its time would be the teacher's
TEACHERS = ("teacher", "teacher-bf16", "teacher-int8")
LINEAR = ("klt", "klt-budget")  # their latents are not the teacher's, and are not compared with them


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]
    scales: tuple[float, ...]                   # rising, 1 among them
    trained_at: int | None = None               # pixels, r0 of Theorem 2
    most_latents: float | None = None           # per picture, over those at scale 1
    most_ms: float | None = None                # of encoding one picture of the largest size
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)    # psnr among them
    laws: Laws | None = None
    tile: int = 0                               # pixels a side above which codecs go in tiles; 0: never
    smallest: Mapping[str, int] = field(default_factory=lambda: SMALLEST)     # pixels a side that a metric needs


def split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(to choose by, to judge by), by a hash of the file's name alone: a picture stays on its side whatever else there
    is, save that neither side is left empty. Too few pictures are all to judge by."""
    placed = sorted((int(hashlib.sha256(PurePath(n).name.encode()).hexdigest()[:8], 16) / 2**32, n) for n in names)
    if len(placed) < FEWEST:
        return [], sorted(n for _, n in placed)
    cut = min(max(sum(place < CALIBRATION for place, _ in placed), 1), len(placed) - 1)
    return sorted(n for _, n in placed[:cut]), sorted(n for _, n in placed[cut:])


def squares(album: Album, names: Iterable[str], size: int) -> tuple[list[str], Tensor]:
    """Those of the names that are large enough, and their squares: uint8 [N, 3, size, size]."""
    place = {name: i for i, name in enumerate(sorted(set(names)))}
    x, held = torch.empty(len(place), 3, size, size, dtype=torch.uint8), torch.zeros(len(place), dtype=torch.bool)
    for name, picture in album():
        if name in place and (one := square(picture, size)) is not None:
            x[place[name]], held[place[name]] = one, True
    return [name for name, i in place.items() if held[i]], x if held.all() else x[held]


def linear(album: Album, names: Iterable[str], plan: Plan, like: Codec) -> dict[str, Remaps]:
    """The block KLT of as many channels as `like`, fitted to these pictures at every size of the plan, and its equal of
    each budget. Both come from one fit with all channels."""
    wanted = set(names)

    def batches() -> Iterator[Tensor]:
        for name, picture in album():
            for size in plan.sizes if name in wanted else ():
                if (x := square(picture, size)) is not None:
                    yield signed(x[None])

    block, channels = like.space.factor, like.space.channels
    whole = fit_klt(batches(), block, 3 * block**2).to(like.device)
    return {"klt": truncated(whole, channels), "klt-budget": EqualBudget(whole, channels)}


def study(contenders: Mapping[str, Remaps], album: Album, plan: Plan, calibration: Sequence[str],
          evaluation: Sequence[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """`contenders` holds the codecs `teacher` and `student`, and whoever stands beside them."""
    rows, sizes, chosen_by = list[Row](), list[dict[str, Any]](), dict[int, tuple[list[str], Tensor]]()
    for size in plan.sizes:
        names, x = squares(album, evaluation, size)
        if not names:
            tell(f"size {size}: no picture to judge by is as large; skipped")
            sizes.append({"size": size, "names": [], "skipped": len(calibration) + len(evaluation)})
            continue
        found = _at_size(contenders, x, plan, tell)
        rows += found
        theirs, c = squares(album, calibration, size)
        if theirs:
            chosen_by[size] = theirs, _psnr(sweep({"student": contenders["student"]}, c, plan.scales, "student",
                                                  {"psnr": plan.metrics["psnr"]}, tile=plan.tile), "student")
        sizes.append({"size": size, "names": names, "calibration": theirs,
                      "skipped": len(calibration) + len(evaluation) - len(names) - len(theirs),
                      "theorem1": tangents(contenders, x, plan.tile), "sweet_spots": sweet_spots(found, plan.scales)})
    choice = choose(plan, chosen_by, [row for row in rows if row.contender == "student"])
    for entry in sizes:
        entry["gains"] = gains([row for row in rows if row.size == entry["size"]], choice["scale"])
    return {"sizes": sizes, "scales": list(plan.scales), "rows": [summed(row, rows) for row in rows], "choice": choice,
            "theorem2": theorem2(contenders, album, plan, evaluation, rows)}


def _at_size(contenders: Mapping[str, Remaps], x: Tensor, plan: Plan, tell: Callable[[str], None]) -> list[Row]:
    rows = list[Row]()
    metrics = applicable(plan.metrics, x.shape[-1], plan.smallest)
    for row in sweep(contenders, x, plan.scales, "teacher", metrics, plan.laws, encode_ms, plan.tile):
        if row.contender in UNTIMED:
            row.encode_ms = None
        if row.contender in LINEAR:
            row.values = {name: v for name, v in row.values.items() if name not in ("nmse", "cosine")}
        told = f", {row.encode_ms:.1f} ms" if row.encode_ms is not None else ""
        tell(f"size {row.size}, scale {row.scale:g}, {row.contender}: {_mean(row.values['psnr']):.2f} dB{told}")
        rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _psnr(rows: Iterable[Row], contender: str) -> Tensor:
    """[N, S]: of every picture at every scale."""
    return torch.tensor([row.values["psnr"] for row in rows if row.contender == contender], dtype=torch.float64).T


class Spread(NamedTuple):
    mean: float | None
    low: float | None
    high: float | None
    n: int              # pictures that have a finite value


def spread(values: Sequence[float]) -> Spread:
    """A mean with its bootstrap interval over pictures, of the finite values."""
    finite = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    return Spread(*mean_interval(finite), len(finite)) if len(finite) else Spread(None, None, None, 0)


def summed(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row as JSON holds it: values of each picture, and their means with intervals."""
    native = next(r.latents for r in rows if (r.contender, r.size, r.scale) == ("student", row.size, 1.0))
    values = {name: [v if math.isfinite(v) else None for v in vs] for name, vs in row.values.items()}
    return {"contender": row.contender, "size": row.size, "scale": row.scale, "latents": row.latents or None,
            "latents_over_native": row.latents / native if row.latents else None, "encode_ms": row.encode_ms,
            "means": {name: spread(vs)._asdict() for name, vs in row.values.items()}, "scores": row.scores,
            "channels": row.channels, "values": values}


def sweet_spots(rows: Sequence[Row], scales: Sequence[float]) -> dict[str, Any]:
    """Proposition 1, by PSNR: the best scale of each, and the student's less the teacher's on the same pictures."""
    mine, theirs = _psnr(rows, "student"), _psnr(rows, "teacher")
    if not bool(torch.cat([mine, theirs]).isfinite().all()):
        return {}
    spots = {name: sweet_spot(scales, psnr)._asdict() for name, psnr in (("student", mine), ("teacher", theirs))}
    for spot in spots.values():
        spot["shares"] = list(spot["shares"].values())      # in the order of the scales: JSON has no numbers as keys
    return {**spots, "gap": sweet_spot_gap(scales, mine, theirs)._asdict()}


def gains(rows: Sequence[Row], scale: float | None) -> dict[str, Any]:
    """In PSNR, of remapping by `scale`, picture by picture. The linear code's own comparison keeps to native size: what
    the latents buy without enlarging anything."""
    at = {(r.contender, r.scale): torch.tensor(r.values["psnr"]) for r in rows if r.values}
    pairs: dict[str, Any] = {n: ((n, scale), (n, 1.0)) for n, _ in at if n not in ("klt-budget", "ceiling")}
    pairs |= {"klt-budget": (("klt-budget", scale), ("klt", 1.0)),
              "student over the teacher at 1": (("student", scale), ("teacher", 1.0)),
              "remapped klt over its equal budget": (("klt", scale), ("klt-budget", scale))}
    return {name: _difference(at[a], at[b])._asdict() for name, (a, b) in pairs.items() if a in at and b in at}


def _difference(a: Tensor, b: Tensor) -> Spread:
    good = a.isfinite() & b.isfinite()
    n = int(good.sum())
    return Spread(*difference_interval(a[good], b[good]), n) if n else Spread(None, None, None, 0)


# ---- choosing the scale ----

def choose(plan: Plan, chosen_by: Mapping[int, tuple[list[str], Tensor]], rows: Sequence[Row]) -> dict[str, Any]:
    """The scale of the highest PSNR, each picture's averaged over the sizes that it fills, among those that keep to the
    budget at every size. `rows`: the student's, for what each scale costs."""
    scales = plan.scales
    ratio, ms = (_dearest(rows, scales, cost) for cost in (_latents_over(rows), lambda row: row.encode_ms or 0.0))
    allowed = [(plan.most_latents is None or r <= plan.most_latents * (1 + 1e-9)) and
               (plan.most_ms is None or t <= plan.most_ms) for r, t in zip(ratio, ms, strict=True)]
    told: dict[str, Any] = {
        "scale": None, "best": None, "edge": None, "why": "", "pictures": 0, "most_latents": plan.most_latents,
        "most_ms": plan.most_ms, "allowed": [s for s, ok in zip(scales, allowed, strict=True) if ok],
        "latents_over_native": ratio, "encode_ms": ms,
    }
    if not chosen_by:
        return told | {"why": f"no scale was chosen: at least {FEWEST} pictures are needed, of which some are kept to "
                              "choose by and are not judged on"}
    each: dict[str, list[Tensor]] = {}
    for names, psnr in chosen_by.values():
        for name, row in zip(names, psnr, strict=True):
            each.setdefault(name, []).append(row)
    psnr = torch.stack([torch.stack(v).mean(0) for v in each.values()])             # [N, S]
    told["pictures"] = len(psnr)
    if not bool(psnr.isfinite().all()):
        return told | {"why": "no scale was chosen: pictures come back without any error"}
    best = sweet_spot(scales, psnr)
    told |= {"psnr": psnr.mean(0).tolist(), "best": best.scale, "shares": list(best.shares.values())}
    if not any(allowed):
        return told | {"why": "no scale was chosen: none of the sweep keeps to the budget"}
    means = psnr.mean(0).masked_fill(~torch.tensor(allowed), -math.inf)
    scale = scales[int(means.argmax())]
    return told | {"scale": scale, "edge": edge(scale, scales, told["allowed"])}


def edge(scale: float, scales: Sequence[float], allowed: Sequence[float]) -> str | None:
    """Where a chosen scale lies, if not inside: then a better one may lie beyond."""
    if scale in (scales[0], scales[-1]):
        return "sweep"
    return "budget" if scale == allowed[-1] else None


def _latents_over(rows: Sequence[Row]) -> Callable[[Row], float]:
    native = {row.size: row.latents for row in rows if row.scale == 1}
    return lambda row: row.latents / native[row.size]


def _dearest(rows: Sequence[Row], scales: Sequence[float], cost: Callable[[Row], float]) -> list[float]:
    """What each scale costs at the size where it costs most."""
    return [max((cost(row) for row in rows if row.scale == s), default=0.0) for s in scales]


# ---- the theorems ----

def tangents(contenders: Mapping[str, Remaps], x: Tensor, tile: int) -> list[dict[str, Any]]:
    """Theorem 1: every other network of as many channels against the teacher, in each direction."""
    forms = forms_at({n: c for n, c in contenders.items() if n not in LINEAR}, 1.0, x, tile)
    x = signed(x[:TANGENTS]).to(forms["teacher"].device)
    along, found = directions(x, torch.Generator().manual_seed(0)), list[dict[str, Any]]()
    theirs = {direction: derivative(forms["teacher"], x, v) for direction, v in along.items()}
    for name in (n for n in forms if n not in TEACHERS):
        for direction, v in along.items():
            mine = derivative(forms[name], x, v)
            if mine.shape == theirs[direction].shape:
                cosine, ratio = (spread(part.tolist())._asdict() for part in aligned(mine, theirs[direction]))
                found.append({"contender": name, "direction": direction, "cosine": cosine, "ratio": ratio})
    return found


def theorem2(contenders: Mapping[str, Remaps], album: Album, plan: Plan, evaluation: Sequence[str],
             rows: Sequence[Row]) -> dict[str, Any]:
    """Root mean square distance of the student's latents from the teacher's, in the teacher's deviations, at every
    size without remapping; the least slope that bounds its growth away from the size of training."""
    apart = {r.size: _roots(r) for r in rows if (r.contender, r.scale) == ("student", 1.0)}
    r0 = plan.trained_at
    if r0 is not None and r0 not in apart:
        names, x = squares(album, evaluation, r0)
        pair = {name: contenders[name] for name in ("teacher", "student")}
        if names:
            found = sweep(pair, x, (1.0,), "teacher", {}, tile=plan.tile)
            apart[r0] = next(_roots(row) for row in found if row.contender == "student")
    errors = {r: spread(values) for r, values in sorted(apart.items())}
    told: dict[str, Any] = {"trained_at": r0, "slope": None,
                            "errors": [{"size": r, **s._asdict()} for r, s in errors.items()]}
    if r0 in errors:
        told["slope"] = least_slope({r: s.mean for r, s in errors.items() if s.mean is not None}, r0)
    return told


def _roots(row: Row) -> list[float]:
    return [math.sqrt(v) for v in row.values["nmse"]]


# ---- pictures side by side ----

class Comparison(NamedTuple):
    rank: str                                   # why this picture
    name: str
    size: int
    loss: float                                 # dB of PSNR that the student has less than the teacher
    pictures: Mapping[str, Tensor]              # [1, 3, S, S]
    values: Mapping[str, Mapping[str, float]]   # of each but the original


@torch.inference_mode()
def comparisons(contenders: Mapping[str, Remaps], album: Album, found: Mapping[str, Any], scale: float,
                metrics: Mapping[str, Metric], smallest: Mapping[str, int]) -> list[Comparison]:
    """Three pictures by rule: the student's least, median and greatest loss of PSNR against the teacher."""
    filled = [entry for entry in found["sizes"] if entry["names"]]
    entry = max((e for e in filled if e["size"] <= LARGEST_SHOWN), key=lambda e: e["size"], default=filled[0])
    size, names = entry["size"], entry["names"]
    metrics = applicable(metrics, size, smallest)
    theirs, mine = (next(r["values"]["psnr"] for r in found["rows"]
                         if (r["contender"], r["size"], r["scale"]) == (name, size, 1.0))
                    for name in ("teacher", "student"))
    losses = sorted((t - m, n) for t, m, n in zip(theirs, mine, names, strict=True) if None not in (t, m))
    ranks = {"least loss": 0, "median loss": (len(losses) - 1) // 2, "worst loss": len(losses) - 1}
    picked: dict[str, tuple[str, float]] = {}
    for rank, i in ranks.items() if losses else ():
        if losses[i][1] not in (name for name, _ in picked.values()):       # two pictures have no third
            picked[rank] = losses[i][1], losses[i][0]
    found_names, pictures = squares(album, [name for name, _ in picked.values()], size)
    forms = {"teacher": contenders["teacher"].remapped(1.0), "student": contenders["student"].remapped(1.0),
             f"student at {scale:g}": contenders["student"].remapped(scale)}
    result = list[Comparison]()
    for rank, (name, loss) in picked.items():
        i = found_names.index(name)
        shown: dict[str, Tensor] = {"original": signed(pictures[i : i + 1])}
        for who, form in forms.items():
            assert form is not None     # codecs have a form at every scale
            shown[who] = form.reconstruct(shown["original"].to(form.device)).clamp(-1, 1).cpu()
        values = {who: {n: float(m(again, shown["original"])[0]) for n, m in metrics.items()}
                  for who, again in shown.items() if who != "original"}
        result.append(Comparison(rank, name, size, loss, shown, values))
    return result

"""What `stillroom evaluate` does: both sides through every feature space, and a table of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from stillroom.flows import Flow, Mixture
from stillroom.judge.asked import Evaluation
from stillroom.judge.draws import Draws
from stillroom.judge.places import know_recipe
from stillroom.judge.sides import (
    Side,
    in_like_channels,
    open_real,
    open_samples,
    pictures_of,
    replaced,
    require_comparable,
)
from stillroom.measure import as_8bit
from stillroom.measure.distances import directions, has_pairs, paired_error
from stillroom.measure.frechet import Moments
from stillroom.measure.inception import FidInception
from stillroom.measure.metrics import HIGHER_IS_BETTER, METRICS, NEIGHBOURS, PAIRED, WITH_BALLS, is_few, panel, shuffled
from stillroom.measure.reference import INCEPTION, Statistics, holds_moments, read_samples, read_statistics
from stillroom.measure.samples import Held, held_modes, total_variation
from stillroom.report.words import number
from stillroom.settings import Refusal
from stillroom.train import load_product, product_hash
from stillroom.train.teacher import frozen, is_mixture, is_ours, open_teacher, part_of
from stillroom.train.world import pick_device

DIRECT, PROJECTED = 1024, 256       # numbers of an item that are taken as they are; directions of larger ones
APART = 0.05                        # total variation between label laws from which it is said


class Space(NamedTuple):
    name: str
    of: Callable[[Tensor], Tensor]      # [B, *shape] -> [B, D]
    how: str = ""


@dataclass
class Table:
    space: Space
    dim: int
    columns: dict[str, dict[str, float]] = field(default_factory=dict)      # title -> {metric: value}
    note: str = ""

    def text(self) -> str:
        rows = [["", *self.columns]]
        rows += [[metric, *(self.cell(metric, c) for c in self.columns.values())] for metric in METRICS
                 if any(metric in c for c in self.columns.values())]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.space.name} ({self.dim} dimensions{', ' + self.space.how if self.space.how else ''})"]
        for row in rows:
            cells = [cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True)]
            arrow = ["higher is better"] if row[0] in HIGHER_IS_BETTER else []
            lines.append("   ".join([f"  {row[0]:<{wide[0]}}", *cells, *arrow]))
        return "\n".join(lines + ([f"  {self.note}"] if self.note else []))

    @staticmethod
    def cell(metric: str, column: Mapping[str, float]) -> str:
        if metric not in column:
            return ""
        spread = f" +- {number(column['kid_std'], 2)}" if metric == "kid" else ""
        return number(column[metric]) + spread


@dataclass
class Report:
    about: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        head = "\n".join(f"{k:<10} {v}" for k, v in self.about.items())
        return "\n\n".join([head, *(t.text() for t in self.tables), *(["\n".join(self.notes)] if self.notes else [])])

    def content(self) -> dict[str, Any]:
        spaces = {t.space.name: {"dimensions": t.dim, "how": t.space.how, **t.columns} for t in self.tables}
        return {"about": self.about, "spaces": spaces, "notes": self.notes, **self.more}


def evaluate(place: str, settings: Evaluation) -> Report:
    device = pick_device(settings.device)
    samples, real, fresh = sides(place, settings, device)
    spaces = spaces_of(settings, samples, real, device)
    teacher = teacher_of(settings, samples) if settings.teacher else None
    if settings.labels == "data":
        require_classes(settings, samples, real)
    stats = None if settings.stats is None else statistics_for(settings.stats, spaces, settings.batch)
    if stats is not None and real is None:      # nothing but its own space can be looked at
        spaces = [space for space in spaces if space.name == stats.features]
    report = Report(notes=list(samples.notes))
    reference, law = gathered(real, spaces)
    floor, _ = gathered(fresh, spaces)
    mine, labels = gathered(samples, spaces, law if settings.labels == "data" else None)
    report.about |= {"samples": f"{samples.name}: {samples.count:,}, {samples.how}"}
    if real is not None and fresh is not None:
        report.about |= {"reference": told(real), "real": f"{told(fresh)}: the floor, for as many fresh real ones"}
        report.about["pairs"] = (f"{', '.join(HIGHER_IS_BETTER)} by {NEIGHBOURS} neighbours, of equally many on both "
                                 f"sides, {WITH_BALLS:,} at most; energy and mmd of {PAIRED:,} at most")
        report.tables += [table(s, mine[s.name], reference[s.name], floor[s.name]) for s in spaces]
    if samples.kind == "pixels":
        report.about["pixels"] = "rounded to 8 bits on both sides"
    report.about["labels"] = f"samples {shares(labels)}" + ("" if real is None else f"; data {shares(law)}")
    if settings.labels == "balanced":
        redrawn = real is not None and law_is_drawn(samples, real)
        hint = "; --labels data draws from a run by the data's" if redrawn else ""
        report.notes += [note + hint for note in labels_apart(labels, law)]
    if stats is not None:
        report.tables.append(against(stats, settings.stats, spaces, mine, floor))
    if samples.encoding is None and real is not None and real.encoding is not None:
        report.notes.append("samples do not say of which codec their latents are: not looked at")
    if real is not None and real.grey:
        report.notes.append("the data are grey and the samples in colour: the data are taken in three equal channels")
    report.notes += replaced(real, fresh)
    if is_mixture(settings.data):
        report.more["modes"] = modes_of(settings.data, mine, floor, report)
    if teacher is not None:
        report.more["teacher"] = paired(settings, samples, teacher.to(device), report)
    if settings.save_stats is not None:
        save(settings, spaces[-1], reference, report)
    return report


def sides(place: str, settings: Evaluation, device: torch.device) -> tuple[Side, Side | None, Side | None]:
    """Samples, reference and fresh real data, all of one kind."""
    first = samples = open_samples(Path(place), settings)
    if settings.codec:
        samples = pictures_of(samples, settings.codec, device)
    if not settings.data:
        if settings.codec and first is samples:
            raise Refusal(f"--codec {settings.codec}: there are no latents to decode; leave it out")
        return samples, None, None
    pair = open_real(settings, settings.size or samples.shape[-1], samples.count)
    real, fresh = (pictures_of(side, settings.codec, device) for side in pair) if settings.codec else pair
    if settings.codec and first is samples and real is pair[0]:
        raise Refusal(f"--codec {settings.codec}: there are no latents to decode; leave it out")
    stored = first is samples and samples.draws is None
    samples, real, fresh = in_like_channels(samples, real, fresh, stored)
    require_comparable(samples, real, bool(settings.codec))
    return samples, real, fresh


def require_classes(settings: Evaluation, samples: Side, real: Side | None) -> None:
    """Of --labels data: samples can be drawn of the data's classes."""
    if real is None:
        raise Refusal("--labels data: there is no --data whose labels they could be; leave it out, or give --data")
    if real.classes is None:
        raise Refusal(f"--labels data: {settings.data} has no labels")
    if samples.draws is not None and samples.draws.limit is not None:
        raise Refusal(f"{samples.name}: points have the labels that they have: leave out --labels")
    if not law_is_drawn(samples, real):
        knows = samples.draws and samples.draws.classes
        raise Refusal(f"--labels data: {samples.name} knows {knows or 'no'} classes, and {real.name} has "
                      f"{real.classes}: leave it out")


def law_is_drawn(samples: Side, real: Side) -> bool:
    draws = samples.draws
    return draws is not None and draws.limit is None and draws.classes is not None and draws.classes == real.classes


# ---- feature spaces ----


def spaces_of(settings: Evaluation, samples: Side, real: Side | None, device: torch.device) -> list[Space]:
    found = [plain_space(samples, real)]
    if settings.features:
        found.append(learned_space(settings.features, samples, real, device))
    if settings.inception is not None:
        if samples.kind != "pixels":
            raise Refusal(f"--inception: looks at pictures, and these are {samples.kind}; give the --codec that "
                          "decodes them")
        net = FidInception.from_file(settings.inception).to(device)
        found.append(Space(INCEPTION, lambda x: net(x.expand(-1, 3, -1, -1).to(device)).cpu(),
                           "resized to 299 pixels, bilinear without antialiasing"))
    return found


def plain_space(samples: Side, real: Side | None) -> Space:
    """The items themselves; where they are large, in fixed random directions."""
    dim, encoding = math.prod(samples.shape), samples.encoding or (real and real.encoding)
    of = f" of codec {encoding['codec'][:12]}" if encoding else ""
    name = f"{samples.kind} {'x'.join(map(str, samples.shape))}{of}"
    if dim <= DIRECT:
        return Space(name, lambda x: x.flatten(1), "as they are, flattened")
    unit = directions(dim, PROJECTED)
    return Space(f"{name} in {PROJECTED} random directions", lambda x: x.flatten(1) @ unit,
                 f"of {dim} numbers: too many for distances as they are")


def learned_space(spec: str, samples: Side, real: Side | None, device: torch.device) -> Space:
    know_recipe(Path(spec))
    net, card = frozen(part_of(spec, "features")).to(device), load_product(spec).card
    encoding = samples.encoding or (real and real.encoding)
    channels = card.get("shape", samples.shape)[0]
    grey = channels == 1 and real is not None and real.grey
    if len(samples.shape) != 3 or not (grey or channels == samples.shape[0]):
        raise Refusal(f"features {spec}: they are of {card.get('shape')}, and these are {list(samples.shape)}")
    if card.get("encoding") != encoding:
        raise Refusal(f"features {spec}: learned on other latents, or on pictures where these are latents, or the "
                      "other way round")
    name, how = f"features {product_hash(spec)[:12]}", f"pooled, of {spec}"

    def of(x: Tensor) -> Tensor:
        return net.pooled((x.mean(1, keepdim=True) if grey else x).to(device)).float().cpu()

    return Space(name, of, f"{how}, of the mean of three channels" if grey else how)


@torch.no_grad()
def gathered(side: Side | None, spaces: Sequence[Space],
             law: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
    """{space: [n, D]} and labels [n], in one pass: nothing else is held."""
    if side is None:
        return {}, None
    vectors: dict[str, list[Tensor]] = {space.name: [] for space in spaces}
    labels, seen = list[Tensor](), 0
    for x, y in side.batches(law):
        finite = x.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise Refusal(f"{side.name}: item {seen + int((~finite).nonzero()[0])} holds NaN or infinity")
        x, seen = as_8bit(x) if side.kind == "pixels" else x.float(), seen + len(x)
        labels += [] if y is None else [y]
        for space in spaces:
            vectors[space.name].append(space.of(x))
    return {name: torch.cat(parts) for name, parts in vectors.items()}, torch.cat(labels) if labels else None


# ---- figures ----


def table(space: Space, mine: Tensor, reference: Tensor, fresh: Tensor) -> Table:
    """Samples beside as many fresh real ones. Where there are fewer of these, so many samples are looked at too: most
    distances grow as samples get fewer."""
    made, mine = Table(space, mine.shape[1]), shuffled(mine)
    made.columns[f"{len(mine)} samples"] = panel(mine, reference)
    m = min(len(mine), len(fresh))
    if m < len(mine):
        made.columns[f"{m} samples"] = panel(mine[:m], reference)
    made.columns[f"{m} real"] = panel(fresh[:m], reference)
    least = min(len(mine), len(reference), m)
    if is_few(least, made.dim):
        made.note = (f"frechet: {least} items for {made.dim} dimensions: it is biased upwards, on both sides; take "
                     f"{2 * made.dim} or more to compare it with other figures")
    return made


def against(stats: Statistics, file: Path | None, spaces: Sequence[Space], mine: Mapping[str, Tensor],
            fresh: Mapping[str, Tensor]) -> Table:
    """The Fréchet distance to a file of statistics."""
    space = next(s for s in spaces if s.name == stats.features)
    x = shuffled(mine[space.name])
    count = "an unknown number" if stats.n is None else f"{stats.n:,}"
    how = "; ".join(f"{k}: {v}" for k, v in stats.how.items() if v)
    made = Table(space._replace(name=f"{space.name} against {file}"), x.shape[1], note=f"statistics of {count}. {how}")

    def distance(part: Tensor) -> dict[str, float]:
        return {"frechet": Statistics.of(Moments(part.shape[1]).add(part), space.name).distance(stats)}

    made.columns[f"{len(x)} samples"] = distance(x)
    if space.name in fresh:
        m = min(len(x), len(fresh[space.name]))
        if m < len(x):
            made.columns[f"{m} samples"] = distance(x[:m])
        made.columns[f"{m} real"] = distance(fresh[space.name][:m])
    if is_few(len(x), made.dim):
        made.note += f"; {len(x)} samples are few for {made.dim} dimensions: biased upwards"
    return made


def statistics_for(file: Path, spaces: Sequence[Space], batch: int) -> Statistics:
    """What a file holds, or what its pictures come to, in one of the spaces."""
    stats = read_statistics(file) if holds_moments(file) else None
    name, known = INCEPTION if stats is None else stats.features, {space.name: space for space in spaces}
    if name not in known:
        how = "give --inception FILE" if name == INCEPTION else f"looked at are: {'; '.join(known)}"
        raise Refusal(f"{file}: statistics of {name}; {how}")
    if stats is not None:
        return stats
    samples, moments = read_samples(file), None
    if not samples.are_pictures:
        raise Refusal(f"{file}: holds {list(samples.shape)}, and {name} looks at pictures, [1 or 3, H, W]")
    with torch.no_grad():
        for x in samples.batches(batch):
            vectors = known[name].of(as_8bit(x))
            moments = (moments or Moments(vectors.shape[1])).add(vectors)
    assert moments is not None
    return Statistics.of(moments, name, reference=f"the pictures of {file}", pixels="; ".join(samples.notes))


def told(side: Side) -> str:
    return f"{side.name}: {side.count:,}" + (f", {side.how}" if side.how else "")


def labels_apart(mine: Tensor | None, law: Tensor | None) -> list[str]:
    """What is said where the two sides are of different classes."""
    if mine is None or law is None:
        return []
    known, which = torch.cat([mine, law]).unique(return_inverse=True)       # labels need not be small numbers
    a, b = (torch.bincount(y, minlength=len(known)) / len(y) for y in which.split([len(mine), len(law)]))
    if (apart := float(total_variation(a, b))) <= APART:
        return []
    return [f"labels of samples and data are {apart:.2f} apart in total variation, which is in every figure"]


def shares(y: Tensor | None) -> str:
    if y is None:
        return "without labels"
    counts = y.unique(return_counts=True)[1]
    low, high = int(counts.min()), int(counts.max())
    if high - low <= 1:
        return f"balanced over {len(counts)} classes"
    return f"of {len(counts)} classes, {low / len(y):.1%} to {high / len(y):.1%} each"


def modes_of(spec: str, mine: Mapping[str, Tensor], fresh: Mapping[str, Tensor], report: Report) -> dict[str, Any]:
    """Of a mixture: how many of its modes are held, and how many points lie within three deviations of one."""
    mixture = open_teacher(spec).denoiser
    assert isinstance(mixture, Mixture)
    radius = 3 * float(mixture.stds.max())
    (x,), (y,) = mine.values(), fresh.values()
    found = {"samples": held_modes(x, mixture.means, radius), "real": held_modes(y, mixture.means, radius)}
    said = ", ".join(f"{name} {held.modes} with {held.good:.1%} within 3 deviations" for name, held in found.items())
    report.about["modes"] = f"of {len(mixture.means)}: {said}"
    return {name: Held._asdict(held) for name, held in found.items()}


def teacher_of(settings: Evaluation, samples: Side) -> Flow:
    """A flow that can follow the same noise."""
    if samples.draws is None or samples.draws.limit is not None or settings.codec:
        raise Refusal("--teacher: compares what a flow or generator draws, before it is decoded; leave out --codec, or "
                      "--teacher")
    return teacher_beside(settings, samples.name, samples.draws)


def teacher_beside(settings: Evaluation, of: str, draws: Draws) -> Flow:
    """A flow of the same samples: of the same shape, classes and latents."""
    know_recipe(Path(settings.teacher))
    flow, name = open_teacher(settings.teacher, settings.prompts), f"teacher {settings.teacher}"
    if tuple(flow.shape) != tuple(draws.shape):
        raise Refusal(f"{name}: it makes {list(flow.shape)}, and {of} {list(draws.shape)}")
    if draws.limit is None and flow.classes not in (None, draws.classes):
        raise Refusal(f"{name}: it knows {flow.classes} classes, and {of} {draws.classes or 'none'}")
    if is_ours(Path(settings.teacher)) and load_product(settings.teacher).card.get("encoding") != draws.encoding:
        raise Refusal(f"{name}: its latents are of another codec than those of {of}")
    return flow


def paired(settings: Evaluation, samples: Side, flow: Flow, report: Report) -> dict[str, float]:
    """Beside the teacher's own samples from the same noise and labels, at its own steps, and at the guidance at which
    the samples are drawn or, where that is in the weights, at which they were taught."""
    draws, n = cast(Draws, samples.draws), samples.count
    strength = settings.guidance if settings.guidance != 1 else draws.guidance
    y, guidance = (draws.labels(0, n), strength) if flow.classes else (None, 1.0)
    x = torch.cat([part for _, part in draws.chunks(0, n)])
    found = paired_error(x, flow.sample(n, settings.seed, y, guidance, batch=settings.batch), y)
    unrelated = "another sample" + ("" if y is None or not has_pairs(y) else " of its class")
    report.about["teacher"] = (f"{settings.teacher}, {flow.steps} steps, guidance {guidance:g}, from the same noise: "
                               f"rms error {number(found.rms)}; mean square {number(found.relative, 3)} of that to "
                               f"{unrelated}")
    return {**found._asdict(), "steps": flow.steps, "guidance": guidance}


def save(settings: Evaluation, space: Space, reference: Mapping[str, Tensor], report: Report) -> None:
    file, x = settings.save_stats, reference[space.name]
    assert file is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    how = {"reference": report.about["reference"], "pixels": report.about.get("pixels", ""), "resize": space.how,
           "labels": report.about["labels"].partition("; data ")[2]}
    Statistics.of(Moments(x.shape[1]).add(x), space.name, **how).save(file)
    report.notes.append(f"{file}: statistics of the reference in {space.name}")

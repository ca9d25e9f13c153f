"""What `stillroom compare` does with flows, generators and points: one teacher, one noise, one reference, and for each
run what is measured, unless it lies there already."""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.codecs import fingerprint
from stillroom.flows import Flow, Mixture, Tally
from stillroom.flows.prompted import prompted
from stillroom.judge.asked import Evaluation, OfRuns
from stillroom.judge.codecs import Kept
from stillroom.judge.contenders import Entry, Run, identity, made, of_noise, opened, require_alike, teacher_hash
from stillroom.judge.draws import Draws
from stillroom.judge.evaluation import Space, gathered, labels_apart, spaces_of, teacher_beside, told
from stillroom.judge.measures import plain
from stillroom.judge.places import codec_at
from stillroom.judge.sides import (
    Side,
    in_channels,
    in_like_channels,
    open_real,
    pictures_of,
    replaced,
    require_comparable,
    side_of_draws,
)
from stillroom.measure.distances import has_pairs, paired_error
from stillroom.measure.diversity import contrast, relative_spread, saturated, within_classes
from stillroom.measure.images import as_8bit
from stillroom.measure.metrics import is_few, panel
from stillroom.measure.samples import held_modes, modes, total_variation
from stillroom.settings import Refusal, seed_of, to_mapping
from stillroom.settings.files import write_atomically
from stillroom.train.pictures import grid
from stillroom.train.watch import Watch
from stillroom.train.world import pick_device

STANDS_FOR_DATA = 5000      # samples of a teacher
NUMBERS = 2**27             # of samples that are held at once, for errors in pairs: 512 MB
SHOWN, POINTS = 8, 2000     # rows of the grid; points of a cloud

# ---- what all are held against ----

class Teacher:
    """The flow that runs were distilled from, drawn from at any number of steps with the noise of the runs."""

    def __init__(self, spec: str, flow: Flow, asked: Evaluation, encoding: Any, limit: int):
        self.spec, self.flow, self.asked, self.encoding, self.limit = spec, flow, asked, encoding, limit
        self.seen: dict[float, Tensor] = {}

    @cached_property
    def made(self) -> list[str | None]:
        """Once: the weights of a large model take long to read."""
        return made(self.spec)

    @property
    def mixture(self) -> Mixture | None:
        return self.flow.denoiser if isinstance(self.flow.denoiser, Mixture) else None

    def side(self, steps: int, guidance: float, seed: int, count: int) -> Side:
        def sampler(n: int, seed: int, **more) -> Tensor:
            return self.flow.sample(n, seed, guidance=guidance, steps=steps, **more)

        f = self.flow
        draws = Draws(f.shape, sampler, f.labels, seed, self.asked.batch, {}, self.encoding, f.classes, model=f)
        return side_of_draws(self.spec, draws, count)

    def ends(self, guidance: float) -> Tensor:
        """Where its own steps lead from the noise of the runs."""
        if guidance not in self.seen:
            side = self.side(self.flow.steps, guidance, self.asked.seed, self.limit)
            self.seen[guidance] = torch.cat([x for x, _ in side.batches(None)])
        return self.seen[guidance]


def opened_teacher(entries: Sequence[Entry], settings: OfRuns, asked: Evaluation, device: torch.device,
                   limit: int) -> Teacher | None:
    runs = [run for entry in entries for run in entry.runs]
    named = [run for run in runs if run.teacher]
    spec = settings.teacher or (named[0].teacher if named else "")
    if not spec:
        return None
    if not settings.teacher and (Path(spec).is_absolute() and not Path(spec).exists()):
        raise Refusal(f"{named[0].place}: its teacher is no longer at {spec}; say where it is: --teacher RUN")
    if named and identity(spec) != teacher_hash(named[0]):
        raise Refusal(f"--teacher {spec}: is not the teacher of {named[0].place}, which names {named[0].teacher}"
                      if settings.teacher else
                      f"{named[0].place}: at {spec} lies another model than the teacher that it was distilled from; "
                      "say where that is: --teacher RUN")
    prompts, first = settings.prompts or (named[0].prompts if named else ""), of_noise(runs)[0]
    assert first.side.draws is not None
    flow = teacher_beside(replace(asked, teacher=spec, prompts=prompts), first.place, first.side.draws).to(device)
    if (net := prompted(flow)) and not first.points and net.prompts.sha256 != first.table:
        raise Refusal(f"--prompts {prompts}: are not those of {first.place}")
    return Teacher(spec, flow, asked, first.side.encoding, limit)


def reference_of(entries: Sequence[Entry], settings: OfRuns, asked: Evaluation, teacher: Teacher | None,
                 first: Side) -> tuple[Side, Side]:
    """What samples, of which `first` are some, are held against, and as many fresh ones of the same kind."""
    if settings.data:
        return open_real(asked, settings.size or first.shape[-1], settings.n)
    if teacher is None:
        raise Refusal("there is nothing to hold samples against: the runs name no teacher; give --data, or --teacher")
    if teacher.mixture is not None:
        count = min(settings.reference, STANDS_FOR_DATA)
        return open_real(replace(asked, data=teacher.spec, reference=count), 1, settings.n)
    guidances = {run.guidance for entry in entries for run in entry.runs}
    if len(guidances) > 1:
        raise Refusal(f"the runs follow their teacher at guidance {', '.join(f'{g:g}' for g in sorted(guidances))}, so "
                      "that there is no one set of its samples to hold them against: give --data")
    counts = {"reference": min(settings.reference, STANDS_FOR_DATA), "fresh": settings.n}
    (guidance,) = guidances
    reference, fresh = (teacher.side(teacher.flow.steps, guidance, seed_of(settings.seed, what), count)
                        for what, count in counts.items())
    return reference, fresh


# ---- measuring ----

@dataclass(frozen=True)
class Table:
    spaces: Sequence[Space]
    reference: dict[str, Tensor]        # features of what samples are held against
    law: Tensor | None                  # and its labels
    teacher: Teacher | None
    settings: OfRuns
    device: torch.device
    limit: int
    digest: str
    codec: str
    tell: Callable[[str], None]

    @property
    def main(self) -> str:
        """The space by which runs are ordered: of learned features, where they are given."""
        return self.spaces[-1].name

    def decoded(self, side: Side) -> Side:
        return in_channels(pictures_of(side, self.settings.codec, self.device), 3) if self.settings.codec else side

    def measure(self, side: Side, guidance: float | None) -> dict[str, Any]:
        """`guidance`: of the teacher beside whose trajectories the samples stand; None for samples of other noise."""
        raw, looks = list[Tensor](), list[tuple[Tensor, Tensor]]()

        def keeping(law: Tensor | None):
            for x, y in side.batches(law):
                raw.append(x[: max(0, self.limit - sum(map(len, raw)))])
                yield x, y

        shown = self.decoded(replace(side, batches=keeping))

        def looking(law: Tensor | None):
            for x, y in shown.batches(law):
                if shown.kind == "pixels":
                    looks.append((saturated(as_8bit(x)), contrast(x.clamp(-1, 1))))
                yield x, y

        tally, model = Tally(), side.draws and side.draws.model
        if model is not None:
            tally.watch("", model)
        with tally.counting():
            vectors, labels = gathered(replace(shown, batches=looking), self.spaces)
        x = vectors[self.main]
        found: dict[str, Any] = {
            "n": len(x), "spaces": {s.name: panel(vectors[s.name], self.reference[s.name], self.settings.seed)
                                    for s in self.spaces},
            "evaluations": None if model is None else whole(tally.counts[""] / len(x)),
            "diversity": relative_spread(x, labels, self.reference[self.main], self.law),
            "paired": None, "modes": None, "pictures": None,
        }
        if looks:
            ends, deviations = (torch.cat(parts).mean() for parts in zip(*looks, strict=True))
            found["pictures"] = {"saturated": float(ends), "contrast": float(deviations)}
        if self.teacher is not None and guidance is not None:
            mine = torch.cat(raw)
            there = self.teacher.ends(guidance)[: len(mine)]
            y = None if labels is None else labels[: len(mine)]
            found["paired"] = paired_error(mine, there, y)._asdict()
        if self.teacher is not None and self.teacher.mixture is not None:
            found["modes"] = modes_of(torch.cat(raw), self.teacher.mixture)
        return plain(found)


def whole(x: float) -> float | int:
    return int(x) if x == int(x) else x


def modes_of(x: Tensor, mixture: Mixture) -> dict[str, float]:
    means = mixture.means.cpu()
    held, of = held_modes(x, means, 3 * float(mixture.stds.max())), modes(x, means)
    true = float((mixture.weights * mixture.stds**2).sum().sqrt())
    return {"held": held.modes, "of": len(means), "good": held.good, "spread": float(of.spread) / true,
            "apart": float(total_variation(of.share, mixture.weights.cpu()))}


def cost_of(run: Run) -> dict[str, Any]:
    """As the run's own record says; None for what it does not."""
    record = run.record
    model = run.side.draws and run.side.draws.model
    return {
        "recipe": str(record.get("recipe", "")).rpartition(":")[2], "steps": record.get("steps"),
        "seconds": record.get("seconds"), "memory_gib": record.get("memory_gib"),
        "trained": record.get("trained"), "parameters": record.get("parameters", {}),
        "evaluations": record.get("evaluations"),
        "weights": None if model is None else sum(p.numel() for p in model.parameters()),
    }


# ---- all of it ----

def compare(specs: Sequence[str], settings: OfRuns, watch: Watch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything measured, as compare.json holds it, and, of points, clouds to be shown."""
    device = pick_device(settings.device)
    shared = {f.name for f in dataclasses.fields(Evaluation)} & {f.name for f in dataclasses.fields(settings)}
    asked = Evaluation(**{name: getattr(settings, name) for name in shared - {"codec", "teacher", "out"}})
    entries = opened(specs, asked)
    require_alike(entries)
    least = min((run for entry in entries for run in entry.runs), key=lambda run: run.side.count)
    fewer = least.side.count < settings.n       # most distances grow as samples get fewer: all are as many
    if fewer:
        settings, asked = replace(settings, n=least.side.count), replace(asked, n=least.side.count)
        entries = opened(specs, asked)
    first = entries[0].runs[0].side
    limit = min(settings.n, max(64, NUMBERS // math.prod(first.shape)))
    teacher = opened_teacher(entries, settings, asked, device, limit)
    reference, fresh, table = laid(entries, settings, asked, teacher, device, limit, watch.note)
    settings.out.mkdir(parents=True, exist_ok=True)
    floor = table.measure(fresh, None)
    fewest = min(settings.n, reference.count, fresh.count)
    found = {
        "about": {
            "reference": told(reference), "fresh": told(fresh), "is_data": bool(settings.data) or bool(
                teacher and teacher.mixture), "spaces": [
                {"name": s.name, "how": s.how, "dim": (dim := table.reference[s.name].shape[1]),
                 "few": is_few(fewest, dim)} for s in table.spaces],
            "main": table.main, "shape": list(first.shape), "kind": table.decoded(first).kind,
            "classes": first.draws.classes if first.draws else None, "n": settings.n, "least": fewest,
            "teacher": teacher and teacher.spec, "own_steps": teacher and teacher.flow.steps, "device": device.type,
            "threads": torch.get_num_threads(),
            "notes": [*([f"{least.place} holds {settings.n} points: as many samples of each are looked at"] if fewer
                        else []), *of_points(entries), *of_labels(entries, table),
                      *(["the data are grey: they are taken in three equal channels"] if reference.grey else []),
                      *replaced(reference, fresh)],
        },
        "settings": to_mapping(settings),
        "floor": floor,
        "teacher": teacher_lines(entries, table),
        "entries": [{"name": entry.name, "runs": [run_line(entry, i, run, table) for i, run in enumerate(entry.runs)]}
                    for entry in entries],
    }
    clouds = shown(entries, table)
    write_atomically(settings.out / "compare.json", json.dumps(found, indent=1, allow_nan=False))
    return found, clouds


def laid(entries: Sequence[Entry], settings: OfRuns, asked: Evaluation, teacher: Teacher | None, device: torch.device,
         limit: int, tell: Callable[[str], None]) -> tuple[Side, Side, Table]:
    """Reference and fresh ones, and the table on which all are measured; what does not fit is refused here."""
    first, codec = entries[0].runs[0].side, fingerprint(codec_at(settings.codec)) if settings.codec else ""
    probe = Table((), {}, None, teacher, settings, device, limit, "", codec, lambda text: None)
    samples = probe.decoded(first)
    if settings.codec and samples is first:
        raise Refusal(f"--codec {settings.codec}: there are no latents to decode; leave it out")
    pair = reference_of(entries, settings, asked, teacher, samples)
    samples, reference, fresh = in_like_channels(samples, *(probe.decoded(side) for side in pair), stored=False)
    require_comparable(samples, reference, bool(settings.codec))
    spaces = spaces_of(asked, samples, reference, device)
    tell(f"{told(reference)}, in {len(spaces)} feature space{'s' * (len(spaces) > 1)}")
    vectors, law = gathered(reference, spaces)
    told_of = [*(vectors[s.name] for s in spaces), *([] if law is None else [law])]
    digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in told_of)).hexdigest()[:16]
    return reference, fresh, replace(probe, spaces=spaces, reference=vectors, law=law, digest=digest, tell=tell)


def depends(table: Table, **more: Any) -> dict[str, Any]:
    """What a kept measurement is of."""
    s, teacher = table.settings, table.teacher
    net = prompted(teacher.flow) if teacher else None
    of = teacher and [*teacher.made, *([net.prompts.sha256] if net else [])]
    return {"reference": table.digest, "spaces": [space.name for space in table.spaces], "n": s.n, "seed": s.seed,
            "codec": table.codec, "teacher": of, **more}


def run_line(entry: Entry, i: int, run: Run, table: Table) -> dict[str, Any]:
    kept = Kept(table.settings.out / entry.name)

    def measure() -> dict[str, Any]:
        table.tell(f"{entry.name}: {run.side.count} samples of {run.place}")
        return table.measure(run.side, None if run.points else run.guidance)

    of = depends(table, run=run.hash, built=run.built, guidance=run.guidance)
    return {"place": run.place, "hash": run.hash, "guidance": run.guidance, "cost": cost_of(run),
            **kept(f"run {i}", of, measure)}


def teacher_lines(entries: Sequence[Entry], table: Table) -> list[dict[str, Any]]:
    """At few steps and at its own, at each guidance that a run was to follow."""
    if table.teacher is None:
        return []
    lines, teacher = list[dict[str, Any]](), table.teacher
    own = teacher.flow.steps
    for guidance in sorted({run.guidance for entry in entries for run in entry.runs}):
        for steps in sorted({*table.settings.teacher_steps, own}):
            def measure(steps: int = steps, guidance: float = guidance) -> dict[str, Any]:
                table.tell(f"teacher: {table.settings.n} samples in {steps} step{'s' * (steps > 1)}")
                return table.measure(teacher.side(steps, guidance, table.settings.seed, table.settings.n), guidance)

            kept = Kept(table.settings.out / "teacher")
            of = depends(table, steps=steps, guidance=guidance)
            found = kept(f"{steps} steps, guidance {guidance:g}", of, measure)
            lines.append({"steps": steps, "own": steps == own, "guidance": guidance, **found})
    return lines


# ---- what is shown ----

def first_labels(side: Side) -> Tensor | None:
    return side.draws.labels(0, side.count) if side.draws else None


def of_points(entries: Sequence[Entry]) -> list[str]:
    names = [entry.name for entry in entries if entry.runs[0].points]
    return [f"{', '.join(names)}: points, which are of no noise, so that where the teacher leads from it is nothing to "
            "them; nothing is evaluated to draw them"] if names else []


def of_labels(entries: Sequence[Entry], table: Table) -> list[str]:
    """What is said of the labels of samples; of each method, where that is not the same for all."""
    told = dict[str, list[str]]()
    for entry in entries:
        y = first_labels(entry.runs[0].side)
        told[entry.name] = [*labels_apart(y, table.law), *taken_together(y, table)]
    every = list(told.values())
    if all(lines == every[0] for lines in every):
        return every[0]
    return [f"{name}: {line}" for name, lines in told.items() for line in lines]


def taken_together(y: Tensor | None, table: Table) -> list[str]:
    """What is said of figures that cannot be taken within classes."""
    unlabelled = y is None and table.law is None
    within = {"diversity": unlabelled or within_classes(y, table.law),
              "of unrelated": table.teacher is None or has_pairs(None if y is None else y[: table.limit])}
    names = [name for name, holds in within.items() if not holds]
    return [f"as far as labels say, no two of a class are among the samples, or what they are held against: "
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} of all classes together"] if names else []


def shown(entries: Sequence[Entry], table: Table) -> dict[str, Tensor]:
    """Pictures, to grid.png: a row for each noise, a column for each method; clouds of points as they are."""
    sides = {entry.name: entry.runs[0].side for entry in entries}
    if table.teacher is not None:
        teacher, guidance = table.teacher, entries[0].runs[0].guidance
        own = teacher.side(teacher.flow.steps, guidance, table.settings.seed, POINTS)
        sides = {"teacher": own, **sides}
    points = next(iter(sides.values())).kind == "points"
    count = min(table.settings.n, POINTS) if points else min(table.settings.n, SHOWN)
    found = {name: torch.cat([x for x, _ in table.decoded(
        side_of_draws(side.name, side.draws, count)).batches(None)]) for name, side in sides.items() if side.draws}
    if points:
        return {name: x for name, x in found.items() if x.shape[1:] == (2,)}
    x = torch.stack([visible(x) for x in found.values()], 1).flatten(0, 1)          # [rows * columns, C, H, W]
    out = io.BytesIO()
    grid(x, columns=len(found)).save(out, "PNG")
    write_atomically(table.settings.out / "grid.png", out.getvalue())
    return {}


def visible(x: Tensor) -> Tensor:
    """Of latents the first three channels."""
    return x if x.shape[1] in (1, 3) else x[:, : 1 if x.shape[1] == 2 else 3]

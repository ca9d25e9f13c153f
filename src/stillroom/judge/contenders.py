"""The flows, generators and points that `stillroom compare` is asked to compare: their runs, what these say of
themselves, and whether one table can hold them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from stillroom.flows import Denoiser
from stillroom.flows.prompted import prompted
from stillroom.judge.asked import Evaluation
from stillroom.judge.codecs import called
from stillroom.judge.draws import built
from stillroom.judge.places import CODECS, is_codec_name, know_recipe, record_at, require_there
from stillroom.judge.sides import Side, drawn
from stillroom.settings import Refusal, read_toml
from stillroom.train import load_product, product_hash
from stillroom.train.teacher import is_ours, kind_of, weights_digest

DRAWN = {"flow": "a flow", "generator": "a generator", "points": "a set of points"}
"""Kinds of products that samples are of."""
TAKEN = ("teacher", "real")
"""Names of lines that are there without being asked for."""


def places_of(spec: str) -> list[str]:
    """The runs of RUN or NAME=RUN,RUN,RUN."""
    place = called(spec)[1] if "=" in spec else spec
    return [place] if Path(place).exists() else place.split(",")


def contender(place: str) -> str:
    """Its kind; what is no product of ours is a codec."""
    require_there(place, CODECS, is_codec_name(place))
    return kind_of(place) or "codec"


@dataclass(frozen=True)
class Run:
    """One run, and how it is drawn from."""

    place: str
    card: dict[str, Any]
    side: Side

    @property
    def hash(self) -> str:
        return product_hash(self.place)

    @property
    def built(self) -> str:
        return built(self.place)

    @property
    def points(self) -> bool:
        """Which are what they are: of no noise, and no prompts."""
        return self.side.draws is not None and self.side.draws.limit is not None

    @property
    def guidance(self) -> float:
        """Of the teacher that it was to follow."""
        return float(self.card.get("guidance", 1.0))

    @property
    def teacher(self) -> str:
        return self.card.get("teacher") or ""

    @property
    def prompts(self) -> str:
        return self.card.get("prompts") or ""

    @cached_property
    def table(self) -> str:
        """Which prompts its labels are; "" where they are none."""
        model = self.side.draws and self.side.draws.model
        net = prompted(model) if model else None
        return net.prompts.sha256 if net else ""

    @cached_property
    def folder(self) -> Path | None:
        return next((p for p in (Path(self.place), Path(self.place).parent) if (p / "run.json").is_file()), None)

    @cached_property
    def record(self) -> dict[str, Any]:
        return record_at(Path(self.place))

    @property
    def data(self) -> dict[str, Any]:
        """What it recorded of the data that it learned from: which, how many, and how pictures became squares. Samples
        of its teacher are none, and that teacher is compared by itself."""
        if self.folder is None or not (told := self.record.get("inputs", {}).get("data")):
            return {}
        if told["name"] == self.teacher:
            return {}
        settings = self.folder / "settings.toml"
        how = read_toml(settings) if settings.is_file() else {}
        used = ("crop", "shrink", "flip") if how.get("crop") == "shrink" else ("crop", "flip")
        return {**told, **{name: how[name] for name in used if name in how}}


@dataclass(frozen=True)
class Entry:
    name: str
    runs: Sequence[Run]


def opened(specs: Sequence[str], asked: Evaluation) -> list[Entry]:
    entries = list[Entry]()
    for spec in specs:
        places = places_of(spec)
        if len(places) > 1 and "=" not in spec:
            raise Refusal(f"{spec}: several runs of one method have one name: say NAME={spec}")
        name = called(spec)[0]
        if name in TAKEN:
            raise Refusal(f"{spec}: a line called {name!r} is on the page already; say NAME=RUN")
        if name in [e.name for e in entries]:
            raise Refusal(f"two methods are called {name!r} ({spec} is one): give them two names, NAME=RUN, or seeds "
                          "of one method one, NAME=RUN,RUN")
        entries.append(Entry(name, [opened_run(place, asked) for place in places]))
        require_seeds(entries[-1].runs)
    return entries


def require_seeds(runs: Sequence[Run]) -> None:
    """Runs of one method, each once: their spread is told as that over seeds."""
    for a, b in combinations(runs, 2):
        if product_hash(a.place) == product_hash(b.place):
            raise Refusal(f"{a.place}, {b.place}: the same weights twice, and seeds of a method were asked for; give "
                          "each once")
        mine, other = a.record.get("recipe"), b.record.get("recipe")
        if mine and other and mine != other:
            raise Refusal(f"{a.place} is of {mine}, and {b.place} of {other}: runs of one name are seeds of one "
                          "method; give them two names")


def opened_run(place: str, asked: Evaluation) -> Run:
    know_recipe(Path(place))
    product = load_product(place)
    if product.kind == "points":
        return Run(place, dict(product.card), drawn(Path(place), Evaluation(n=asked.n, batch=asked.batch)))
    model: Any = product.parts[product.kind]
    told_strength = product.kind == "flow" and isinstance(model.denoiser, Denoiser) and model.denoiser.takes_strength
    guidance = float(product.card.get("guidance", 1.0)) if told_strength else 1.0       # of others it is built in
    return Run(place, dict(product.card), drawn(Path(place), replace(asked, guidance=guidance)))


def identity(spec: str) -> str:
    """Two places of one teacher have one: that of its weights; its name, where none lie there."""
    return weights_digest(spec) or spec


def made(spec: str) -> list[str | None]:
    """What a model draws depends on: its weights and, of ours, how it is built."""
    return [identity(spec), built(spec)] if is_ours(Path(spec)) else [spec, weights_digest(spec)]


def require_alike(entries: Sequence[Entry]) -> None:
    """Runs that one table can hold."""
    runs = [run for entry in entries for run in entry.runs]
    first, *others = runs
    for run in others:
        a, b = first.side, run.side
        if a.shape != b.shape:
            raise Refusal(f"{run.place} makes {list(b.shape)}, and {first.place} {list(a.shape)}: they cannot be "
                          "compared")
        if a.encoding != b.encoding:
            raise Refusal(f"{run.place} makes other latents than {first.place}: of another codec, space or crop")
    first, *others = of_noise(runs)
    for run in others:
        a, b = first.side, run.side
        if a.draws and b.draws and a.draws.classes != b.draws.classes:
            raise Refusal(f"{run.place} knows {b.draws.classes or 'no'} classes, and {first.place} "
                          f"{a.draws.classes or 'none'}")
        if first.table != run.table:
            raise Refusal(f"{run.place} was distilled with other prompts than {first.place}: their labels mean other "
                          "pictures")
    first, *others = [run for run in runs if run.teacher] or runs[:1]
    for run in others:
        if teacher_hash(run) != teacher_hash(first):
            raise Refusal(f"{run.place} was distilled from another teacher than {first.place}: {run.teacher}, and not "
                          f"{first.teacher}")
    first, *others = [run for run in runs if run.data] or runs[:1]
    for run in others:
        for what in [what for what in first.data if what in run.data and run.data[what] != first.data[what]]:
            raise Refusal(f"{run.place} was distilled from other data than {first.place}: "
                          f"{what * (what != 'name')} {run.data[what]}, and not {first.data[what]}")


def of_noise(runs: Sequence[Run]) -> Sequence[Run]:
    """Without points; all, where there is nothing else."""
    return [run for run in runs if not run.points] or runs


def teacher_hash(run: Run) -> str:
    """Of the weights that taught it: as its card says of ours, as the run recorded of other people's; else of what lies
    there now."""
    recorded = run.record.get("weights", {}).get("teacher")
    return run.card.get("teacher_hash") or recorded or identity(run.teacher)

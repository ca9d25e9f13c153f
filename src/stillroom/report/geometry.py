"""The page and the terminal's tables of an inspection, from the mapping that its JSON file holds: every number with
what it was taken over, and last, in words, whether drifting will work."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.match.drift import temperature_for
from stillroom.measure.geometry import FLOOR, Seen, equivalent_time, temperature_at
from stillroom.measure.groups import kappa
from stillroom.measure.portrait import SCOPES
from stillroom.report import geometry_plots as plots
from stillroom.report.geometry_words import as_grouping, ks, verdict
from stillroom.report.page import Figure, Header, Panels, Section, Settings, Table, Text, page
from stillroom.report.terminal import printed
from stillroom.report.words import number
from stillroom.settings.files import write_atomically

Found = Mapping[str, Any]
Place = Mapping[str, Any]
Portrait = Mapping[str, Any]
TITLES = {"element": ("Elements", "Each sample is one vector."),
          "token": ("Tokens", "All places of all samples are one set; those of one sample are not independent."),
          "pooled": ("Pooled", "The mean of each sample's tokens is a vector.")}
NOTE = (f"Participation ratio, Fisher ratio and eta without bias. Condition number: eigenvalues below {FLOOR:g} of the "
        "largest count as that. TwoNN with its standard error. Share seen, of the particles, and as predicted by "
        "exp(-1 / (2 PR R²)); that, noise time and kappa are ours. What nothing normalises stands with what is.")


def write_inspection(out: Path, found: Found) -> Path:
    write_atomically(out, page(title(found), sections(found), header(found)))
    return out


def title(found: Found) -> str:
    return ", ".join(names(found))


def short(place: Place) -> str:
    return Path(place["name"]).name or place["name"]


def names(found: Found) -> list[str]:
    """Short ones where they tell the places apart."""
    told = [short(place) for place in found["places"]]
    told = told if len(set(told)) == len(told) else [place["name"] for place in found["places"]]
    return [name if told.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(told, 1)]


def header(found: Found) -> Header:
    places = found["places"]
    if len(places) > 1:
        return Header("stillroom inspect", lead=f"{len(places)} spaces, side by side.")
    only, told = places[0], verdict(places[0], found["settings"])
    return Header("stillroom inspect", told.status[0].upper() + told.status[1:], told.tone, only["what"], [
        ("Samples", f"{only['n']:,}"), ("Shape", " × ".join(map(str, only["shape"]))),
        ("Classes", str(only["classes"] or "none")), ("Seed", str(found["settings"]["seed"]))])


def sections(found: Found) -> list[Section]:
    who = names(found)
    overs = [over for over in TITLES if any(p["over"] == over for place in found["places"] for p in place["portraits"])]
    return [
        *(Text("Will drifting work here?" if len(who) == 1 else f"Will drifting work in {name}?",
               in_words(place, found["settings"])) for name, place in zip(who, found["places"], strict=True)),
        Panels("Spectra", {"": [*key(who), *(plots.spectra(found, over) for over in overs)]},
               "Each eigenvalue's share of the variance over its rank, both in decades. Dashed: within classes."),
        Panels("Distances", {"": [*key(who), *(plots.distances(found, over) for over in overs)]},
               "Density of pairwise distances over their mean. A narrow peak is a kernel that can tell little apart. "
               "Dashed: pairs of one class."),
        Panels("What a kernel sees", {"": [*key(who), *(plots.seen(found, over) for over in overs)]},
               f"Share of {found['settings']['particles']} samples that count (dashed: of one class, and of fewer "
               "samples where classes are small), over the temperature in mean distances; dotted, as the participation "
               "ratio predicts."),
        *bends(found, who),
        *(Table(heading, heads, body, f"{told} {NOTE}") for heading, told, heads, body in tables(found)),
        Table("Trajectories", ["statistic", *who], trajectory_rows(found),
              "On the linear path, whatever the flow's own: x0 data, x1 noise, v = dx/dt. "
              "The gap of one step is over the variance of what many steps make: at t = 1 an ideal flow knows no more "
              "than the mean (of the class), so a gap near 1 says nothing against it."),
        Settings("How it was measured", how(found, who)),
    ]


def in_words(place: Place, settings: Found) -> list[str]:
    told = verdict(place, settings)
    return [f"{told.status[0].upper()}{told.status[1:]}.", *told.sentences, *place["notes"]]


def key(who: list[str]) -> list[Any]:
    return [plots.key(who)] if len(who) > 1 else []


def bends(found: Found, who: list[str]) -> list[Section]:
    if all("why" in place["trajectories"] for place in found["places"]):
        return []
    return [Figure("Where trajectories bend", plots.bends(found, who),
                   "Change of the velocity per unit of time, over the mean speed; from noise on the right to data on "
                   "the left.")]


def how(found: Found, who: list[str]) -> dict[str, Any]:
    places = {name: {"place": place["name"], "what": place["what"], "samples": place["n"], "shape": place["shape"],
                     "normaliser": place["normaliser"], "classes": place["classes"] or "none"}
              for name, place in zip(who, found["places"], strict=True)}
    asked = {k: v for k, v in found["settings"].items() if k not in ("out", "against", "device") and v}
    return {"settings": asked, **places}


# ---- tables ----

class Column(NamedTuple):
    place: int
    scope: str
    portrait: Portrait


def columns(found: Found, over: str, stage: str) -> list[Column]:
    """A column for each place and scope of which anything is known."""
    return [Column(i, scope, p) for i, place in enumerate(found["places"]) for p in place["portraits"]
            if (p["over"], p["stage"]) == (over, stage) for scope in SCOPES if "why" not in p["spectra"][scope]]


def tables(found: Found) -> list[tuple[str, str, list[str], list[list[Any]]]]:
    """(title, what it is over, heads, rows): one for each kind of vector and side of the normaliser."""
    who, told = names(found), []
    for over, (title, over_what) in TITLES.items():
        for stage in ("after", "before"):
            cells = columns(found, over, stage)
            if cells:
                body = [[name, *(cell(c) for c in cells)] for name, cell in statistics(found["settings"])]
                body = [row for row in body if any(x is not None for x in row[1:])]
                heads = ["", *(f"{who[c.place]}, {c.scope}" for c in cells)]
                told.append((f"{title}, {stage} normalisation", over_what, heads, body))
    return told


def statistics(settings: Found) -> list[tuple[str, Callable[[Column], Any]]]:
    temperatures, finest = settings["temperatures"], min(settings["temperatures"])
    return [
        ("vectors", lambda c: c.portrait["spectra"][c.scope]["taken"]["n"]),
        ("dimensions", lambda c: c.portrait["spectra"][c.scope]["taken"]["d"]),
        ("participation ratio (biased)", lambda c: beside(spread(c, "participation"), spread(c, "plain"))),
        ("effective rank", lambda c: spread(c, "effective_rank")),
        ("condition number", condition),
        *((f"variance in the {k} largest" if k > 1 else "variance in the largest", top(k)) for k in (1, 8, 64)),
        ("dimension by TwoNN", globally(intrinsic)),
        ("Fisher ratio of the classes", globally(lambda p: p["classes"].get("fisher"))),
        ("eta of the classes", globally(lambda p: p["classes"].get("eta"))),
        ("near ones of the same class (chance)", globally(purity)),
        ("CV of distances (1 / sqrt(2 PR))", variation),
        *((f"share seen at R = {r:g} (predicted)", seen(i)) for i, r in enumerate(temperatures)),
        *((f"equivalent noise time of R = {r:g}", noise_time(r)) for r in temperatures),
        (f"R that sees {settings['wanted']:.0%} (predicted)", star(settings)),
        (f"kappa of labels at R = {finest:g}", index("labels", "global", finest)),
        (f"kappa of clusters at R = {finest:g}", index("clusters", "global", finest)),
        (f"kappa of clusters in classes at R = {finest:g}", index("clusters within class", "within class", finest)),
    ]


def beside(a: float | None, b: float | None, digits: int = 3) -> str | None:
    return None if a is None else f"{number(a, digits)} ({'none' if b is None else number(b, digits)})"


def spread(c: Column, name: str) -> Any:
    return c.portrait["spectra"][c.scope][name]


def condition(c: Column) -> Any:
    told, floored = number(spread(c, "condition"), 3), spread(c, "floored")
    return f"≥ {told}, {floored} at the floor" if floored else told


def top(k: int) -> Callable[[Column], Any]:
    return lambda c: spread(c, "top").get(str(k))


def globally(cell: Callable[[Portrait], Any]) -> Callable[[Column], Any]:
    """Of what is not taken within classes."""
    return lambda c: cell(c.portrait) if c.scope == "global" else None


def intrinsic(p: Portrait) -> str | None:
    s = p["intrinsic"]
    if "why" in s:
        return None
    twins = f", {s['duplicates']} duplicates" if s["duplicates"] else ""
    return f"{number(s['dimension'], 3)} ± {number(s['error'], 2)}{twins}"


def purity(p: Portrait) -> str | None:
    s = p["classes"]
    return None if "why" in s else f"{s['purity']:.1%} of {s['neighbours']} ({s['chance']:.1%})"


def variation(c: Column) -> str | None:
    return beside(c.portrait["distances"][c.scope].get("variation"), (2 * spread(c, "participation")) ** -0.5)


def seen(i: int) -> Callable[[Column], Any]:
    def cell(c: Column) -> Any:
        s = c.portrait["seen"][c.scope]
        return None if "why" in s else beside(s["measured"][i], s["predicted"][i])

    return cell


def noise_time(r: float) -> Callable[[Column], Any]:
    return lambda c: equivalent_time(spread(c, "participation"), r).time


def star(settings: Found) -> Callable[[Column], Any]:
    def cell(c: Column) -> Any:
        curve, wanted = c.portrait["curves"][c.scope], settings["wanted"]
        if "why" in curve:
            return None
        predicted = temperature_for(spread(c, "participation"), curve["particles"], wanted * curve["particles"])
        measured = temperature_at(Seen(**curve), wanted)
        return f"none ({number(predicted, 3)})" if measured is None else beside(measured, predicted)

    return cell


def index(name: str, scope: str, r: float) -> Callable[[Column], Any]:
    def cell(c: Column) -> Any:
        s = c.portrait["groupings"].get(name, {"why": ""})
        if c.scope != scope or "why" in s:
            return None
        grouping = as_grouping(s)
        null = "" if grouping.null is None else f", where there are none {number(grouping.null, 3)}"
        told = number(kappa(grouping.eta, r), 3) if grouping.real else "abstains"
        return f"{told}: k {ks(grouping)}, eta {number(grouping.eta, 3)}{null}"

    return cell


TRAJECTORY = {"straightness": "straightness E∫|v - (x1 - x0)|² / E|x1 - x0|²", "path_ratio": "path length / chord",
              "turning": "turning Σ|Δv| / mean |v|", "curvature": "curvature, per unit of length",
              "one_step_gap": "one step against many", "steps": "steps", "n": "trajectories"}


def trajectory_rows(found: Found) -> list[list[Any]]:
    """Figures of flows; for places without one, why."""
    told = [[words, *(place["trajectories"].get(name) for place in found["places"])]
            for name, words in (TRAJECTORY | {"why": "none, because"}).items()]
    return [row for row in told if any(x is not None for x in row[1:])]


# ---- in the terminal ----

def in_terminal(found: Found) -> None:
    who = names(found)
    paths = "Trajectories", "", ["", *who], trajectory_rows(found)
    verdicts = [(name, in_words(place, found["settings"])) for name, place in zip(who, found["places"], strict=True)]
    printed([(f"{heading}. {told}".strip(), heads, body) for heading, told, heads, body in [*tables(found), paths]],
            [(f"{name}: {status}", told) for name, (status, *told) in verdicts])

"""The page, the terminal's tables, the .csv and the LaTeX of a comparison of flows and generators, from the mapping
that compare.json holds: one set of tables for all four."""

import csv
import io
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stillroom.report import compare_runs_plots as plots
from stillroom.report.compare import HIGHER, LOWER
from stillroom.report.page import Figure, Files, Header, Images, Panels, Section, Settings, Table, Text, page
from stillroom.report.plots import scatter
from stillroom.report.terminal import printed
from stillroom.report.words import listed, number
from stillroom.settings.files import write_atomically

Found = Mapping[str, Any]
Measured = Mapping[str, Any]
FILES = {"compare.csv": "all tables in one, with deviations in columns of their own",
         "compare.tex": "all tables, for LaTeX", "compare.json": "everything that was measured"}
GAP = "\N{NO-BREAK SPACE}"
CLEAR = 2.0             # deviations between runs, below which two methods are not told apart


def write_comparison(out: Path, at: Path, found: Found, clouds: Mapping[str, Tensor]) -> Path:
    """The page, `at` its place, and the files of the folder `out`. `clouds`: points to be shown, by method; pictures
    lie in grid.png."""
    write_atomically(out / "compare.csv", as_csv(found))
    write_atomically(out / "compare.tex", as_latex(found))
    write_atomically(at, page(title(found), sections(out, at, found, clouds), header(found)))
    return at


def title(found: Found) -> str:
    """The methods, or how many where a line would not hold them."""
    names = [entry["name"] for entry in found["entries"]]
    return ", ".join(names) if len(names) < 5 else f"{len(names)} methods"


def header(found: Found) -> Header:
    about = found["about"]
    return Header("stillroom compare", sentences(found)[0], "plain", f"Held against {about['reference']}.", [
        ("Methods", str(len(found["entries"]))), ("Runs", str(sum(len(e["runs"]) for e in found["entries"]))),
        ("Samples of each", f"{about['n']:,}"), ("Teacher", str(about["teacher"] or "none")),
        ("Classes", str(about["classes"] or "none")), ("Feature space", about["main"]),
        ("Seed", str(found["settings"]["seed"]))])


def sections(out: Path, at: Path, found: Found, clouds: Mapping[str, Tensor]) -> list[Section]:
    beside = Path(os.path.relpath(out, at.parent))
    return [
        Text("What can be said", sentences(found)),
        *([Figure("Quality against cost of a sample", sampling, "Evaluations of a network for one sample; the "
                  "teacher's line joins its numbers of steps. Bars: one deviation over runs.")]
          if (sampling := plots.quality(found)) else []),
        *([Figure("Quality against cost of training", training, "Evaluations of all networks in training, a forward of "
                  "B samples being B; learning from one costs about two more.")]
          if (training := plots.training(found)) else []),
        *(Table(s.title, ["", *s.columns], s.rows(), s.note) for s in sheets(found)),
        *shown(out, found, clouds),
        Settings("How it was measured", how(found)),
        Files("Files", [(str(beside / name), name, what, "") for name, what in FILES.items()]),
    ]


def shown(out: Path, found: Found, clouds: Mapping[str, Tensor]) -> list[Section]:
    if clouds:
        first, *others = clouds.items()
        target = first[1] if first[0] == "teacher" else None
        panels = scatter(dict(others) or dict([first]), target)
        before = "" if target is None else ", before the teacher's"
        return [Panels("Samples", {"": panels}, f"All of the same noise{but_points(found)}{before}.")]
    names = [*(["the teacher"] if found["about"]["teacher"] else []), *(e["name"] for e in found["entries"])]
    if not (out / "grid.png").is_file():
        return []
    return [Images("Samples", [(out / "grid.png", "columns: " + ", ".join(names))],
                   f"Each row is of one noise and one label{but_points(found)}.")]


def but_points(found: Found) -> str:
    """Which nothing was evaluated to draw."""
    return ", but for points" * any(run["evaluations"] is None for entry in found["entries"] for run in entry["runs"])


def how(found: Found) -> dict[str, Any]:
    about = found["about"]
    asked = {k: v for k, v in found["settings"].items() if v not in (None, "", []) and k not in ("out", "data")}
    return {"reference": {k: about[k] for k in ("reference", "fresh", "device", "threads")},
            "spaces": {s["name"]: f"{s['how']}, {s['dim']} dimensions" for s in about["spaces"]}, "settings": asked,
            **{f"{entry['name']}{f', run {i}' if len(entry['runs']) > 1 else ''}": {
                "run": run["place"], "hash": run["hash"][:16], "recipe": run["cost"]["recipe"] or "unknown",
                "guidance": run["guidance"], "weights": run["cost"]["weights"], **of_roles(run["cost"])}
               for entry in found["entries"] for i, run in enumerate(entry["runs"])}}


def of_roles(cost: Mapping[str, Any]) -> dict[str, Any]:
    return {f"weights of {role}": count for role, count in cost["parameters"].items()}


# ---- tables ----

class Cell(NamedTuple):
    """Of one number per run."""

    mean: float | None
    deviation: float | None = None

    @staticmethod
    def of(values: Sequence[float | None]) -> "Cell":
        known = [v for v in values if v is not None]
        if not values or len(known) < len(values):
            return Cell(None)
        if len(set(known)) == 1:
            return Cell(known[0])
        return Cell(statistics.fmean(known), statistics.stdev(known))

    def shown(self) -> float | str | None:
        return self.mean if self.mean is None or self.deviation is None else self.text()

    def text(self) -> str:
        if self.mean is None:
            return "–"
        return number(self.mean) + ("" if self.deviation is None else f"{GAP}±{GAP}{number(self.deviation, 2)}")


class Sheet(NamedTuple):
    title: str
    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""
    key: str = ""       # tells columns of one name apart, where all sheets are one table

    def rows(self) -> list[list[Any]]:
        return [[name, *(cell.shown() for cell in cells)] for name, cells in self.lines]


Pick = Callable[[Measured], Any]


def contenders(found: Found) -> list[tuple[str, Sequence[Measured]]]:
    """Lines of the tables: methods with their runs, the teacher at its numbers of steps, and fresh real ones."""
    guidances = {line["guidance"] for line in found["teacher"]}
    lines = [(entry["name"], entry["runs"]) for entry in found["entries"]]
    for line in found["teacher"]:
        steps = f"{line['steps']} step{'s' * (line['steps'] > 1)}{' (its own)' if line['own'] else ''}"
        lines.append((f"teacher, {steps}" + (f", guidance {line['guidance']:g}" if len(guidances) > 1 else ""), [line]))
    return [*lines, (floor_name(found), [found["floor"]])]


def floor_name(found: Found) -> str:
    return "fresh real ones" if found["about"]["is_data"] else "the teacher, of other noise"


def sheet(title: str, lines: Sequence[tuple[str, Sequence[Measured]]], picks: Mapping[str, Pick], note: str = "",
          key: str = "") -> Sheet:
    """Without columns that say nothing."""
    cells = [(name, [Cell.of([pick(run) for run in runs]) for pick in picks.values()]) for name, runs in lines]
    told = [i for i in range(len(picks)) if any(row[i].mean is not None for _, row in cells)]
    columns = [name for i, name in enumerate(picks) if i in told]
    return Sheet(title, columns, [(name, [row[i] for i in told]) for name, row in cells], note, key)


def sheets(found: Found) -> list[Sheet]:
    about, lines = found["about"], contenders(found)
    made = [sheet(f"Distances: {s['name']}", lines, distances(s["name"]), distance_note(found, s), s["name"])
            for s in about["spaces"]]
    beside = sheet("Beside the teacher", lines, {
        f"rms to its ends {LOWER}": inside("paired", "rms"), f"of unrelated {LOWER}": inside("paired", "relative"),
        "modes held": inside("modes", "held"), f"near a mode {HIGHER}": inside("modes", "good"),
        f"shares off by {LOWER}": inside("modes", "apart"), "spread / true": inside("modes", "spread"),
        "diversity": lambda run: run["diversity"], "saturated": inside("pictures", "saturated"),
        "contrast": inside("pictures", "contrast"),
    }, beside_note(found))
    return [*made, beside, cost_sheet(found)]


def distances(space: str) -> dict[str, Pick]:
    told = {"frechet": f"{'FID' if space.startswith('inception') else 'Fréchet'} {LOWER}", "kid": f"KID {LOWER}",
            "sliced_w2": f"sliced W2 {LOWER}", "energy": f"energy {LOWER}", "precision": f"precision {HIGHER}",
            "recall": f"recall {HIGHER}", "density": f"density {HIGHER}", "coverage": f"coverage {HIGHER}"}
    return {title: (lambda run, name=name: run["spaces"][space][name]) for name, title in told.items()}


def distance_note(found: Found, space: Mapping[str, Any]) -> str:
    about, several = found["about"], any(len(entry["runs"]) > 1 for entry in found["entries"])
    few = "" if not space["few"] else (f" {about['least']:,} items are few for {space['dim']} dimensions: Fréchet "
                                       "distances are biased upwards, in every line.")
    return (f"Of {about['n']:,} samples against {about['reference']}." + fewer_fresh(found) + few
            + (" ± one standard deviation over runs of a method." if several else ""))


def fewer_fresh(found: Found) -> str:
    """What is said of a floor of fewer than there are samples: it is another figure."""
    m, n = found["floor"]["n"], found["about"]["n"]
    return "" if m >= n else (f" {floor_name(found).capitalize()} are {m:,} only: most distances grow as samples get "
                              f"fewer, so that theirs lie above what {n:,} would come to.")


def inside(part: str, name: str) -> Pick:
    return lambda run: None if run.get(part) is None else run[part][name]


def beside_note(found: Found) -> str:
    told = []
    if found["about"]["teacher"]:
        told.append(f"Its ends: where {found['about']['own_steps']} steps of the teacher lead from the same noise, at "
                    "the guidance that a run was to follow; of unrelated: the mean square over that to another sample "
                    "of the class.")
    if found["floor"]["modes"]:
        told.append(f"Modes: of {found['floor']['modes']['of']}, those with a tenth of their share or more; near: "
                    "within three deviations of one; shares off by: total variation.")
    told.append("Diversity: root mean square distance of two samples of a class, over that of what is held against.")
    if found["floor"]["pictures"]:
        told.append("Saturated: share of values at an end of their range. Contrast: deviation of a picture's values. "
                    "Guidance raises both where it costs diversity.")
    return " ".join(told)


def cost_sheet(found: Found) -> Sheet:
    roles = list(dict.fromkeys(role for entry in found["entries"] for run in entry["runs"] for role in asked(run)))
    lines = [(name, runs) for name, runs in contenders(found) if name != floor_name(found)]
    picks: dict[str, Pick] = {
        "evaluations a sample": lambda run: run["evaluations"],
        **{f"evaluations of {role}": (lambda run, role=role: asked(run).get(role, 0) if asked(run) else None)
           for role in roles},
        "all in training": evaluations, "weights learned": known("trained"), "steps": known("steps"),
        "wall time, s": known("seconds"), "memory, GiB": known("memory_gib"),
    }
    return sheet("Cost", lines, picks,
                 "As runs recorded it: evaluations are samples that a network has answered for in training, forwards "
                 "alone; memory is the process's peak, or the accelerator's.")


def known(name: str) -> Pick:
    return lambda run: run.get("cost", {}).get(name)


def asked(run: Measured) -> dict[str, int]:
    """Evaluations in training by role; those of several students are one."""
    found: dict[str, int] = {}
    for role, count in (run.get("cost", {}).get("evaluations") or {}).items():
        name = re.sub(r" \d+$", "", role)
        found[name] = found.get(name, 0) + count
    return found


def evaluations(run: Measured) -> int | None:
    return sum(asked(run).values()) or None


# ---- what can be said ----

def quality(found: Found, runs: Sequence[Measured]) -> Cell:
    """The Fréchet distance in the main space."""
    return Cell.of([run["spaces"][found["about"]["main"]]["frechet"] for run in runs])


def sentences(found: Found) -> list[str]:
    cells = {entry["name"]: quality(found, entry["runs"]) for entry in found["entries"]}
    order = sorted(cells, key=lambda name: cells[name].mean or 0.0)
    told = [f"By Fréchet distance in {found['about']['main']}: "
            + ", ".join(f"{name} ({cells[name].text()})" for name in order) + "."]
    told += against_teacher(found, cells, order)
    told.append(f"{floor_name(found).capitalize()}: {quality(found, [found['floor']]).text()}." + fewer_fresh(found))
    close = [f"{a} and {b}" for i, a in enumerate(order) for b in order[i + 1 :] if not apart(cells[a], cells[b])]
    if close:
        told.append(f"Within {CLEAR:g} deviations of each other's runs, so that their order cannot be read: "
                    f"{'; '.join(close)}.")
    single = [name for name in order if len(runs_of(found, name)) == 1]
    if single:
        whose = "each" if len(single) == len(order) > 1 else listed(single)
        told.append(f"One run of {whose}: what another seed would change is not known.")
    return [*told, *found["about"]["notes"]]


def runs_of(found: Found, name: str) -> Sequence[Measured]:
    return next(entry["runs"] for entry in found["entries"] if entry["name"] == name)


def apart(a: Cell, b: Cell) -> bool:
    """Whether runs tell two methods apart; where there is one run of either, that is not asked."""
    if None in (a.mean, b.mean, a.deviation, b.deviation):
        return True
    both = ((a.deviation or 0) ** 2 + (b.deviation or 0) ** 2) ** 0.5
    return abs((a.mean or 0) - (b.mean or 0)) > CLEAR * both


def against_teacher(found: Found, cells: Mapping[str, Cell], order: Sequence[str]) -> list[str]:
    """How many of the teacher's steps a method stands for, at the guidance that it was to follow; methods of which the
    same is to be said, in one sentence."""
    alike: dict[str, list[str]] = {}
    several = len({line["guidance"] for line in found["teacher"]}) > 1
    for name in order:
        runs = runs_of(found, name)
        guidance = runs[0]["guidance"]
        lines = [line for line in found["teacher"] if line["guidance"] == guidance]
        if not lines:
            continue
        teacher = f"the teacher{f' of guidance {guidance:g}' * several}"
        beaten = [line for line in lines if (quality(found, [line]).mean or 0) >= (cells[name].mean or 0)]
        cost = Cell.of([run["evaluations"] for run in runs])
        if beaten:
            best = max(beaten, key=lambda line: line["evaluations"])
            steps = f"{best['steps']} step{'s' * (best['steps'] > 1)}"
            spent = "" if cost.mean is None else (f": {cost.text()} against {number(best['evaluations'])} evaluations "
                                                  "a sample")
            said = f"no farther than {teacher} at {steps}{spent}"
        else:
            said = f"farther than {teacher} at any of these numbers of steps"
        alike.setdefault(said + near(found, cells[name], lines), []).append(name)
    return [f"{listed(names)} {'are' if len(names) > 1 else 'is'} {said}." for said, names in alike.items()]


def near(found: Found, cell: Cell, lines: Sequence[Measured]) -> str:
    """The teacher's numbers of steps that a method's runs do not tell it apart from; one run alone cannot say."""
    within = [str(line["steps"]) for line in lines if cell.deviation is not None
              and abs((quality(found, [line]).mean or 0) - (cell.mean or 0)) <= CLEAR * cell.deviation]
    return f"; not told apart, by runs, from the teacher at {listed(within)}" if within else ""


# ---- files, and the terminal ----

def as_csv(found: Found) -> str:
    """A line per method, over all tables."""
    every, counts = sheets(found), {name: len(runs) for name, runs in contenders(found)}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"{column} ({s.key})" if s.key else column for s in every for column in s.columns]
    writer.writerow(["method", "runs", *(f"{head}{end}" for head in heads for end in ("", " sd"))])
    for name, count in counts.items():
        row = list[Any]()
        for s in every:
            cells = dict(s.lines).get(name) or [Cell(None)] * len(s.columns)
            row += [value for cell in cells for value in (cell.mean, cell.deviation)]
        writer.writerow([name, count, *("" if value is None else value for value in row)])
    return out.getvalue()


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", HIGHER: r"$\uparrow$",
           LOWER: r"$\downarrow$", GAP: "~", "±": r"$\pm$", "–": "--", **{c: f"\\{c}" for c in "&%$#_{}"}}


def latex(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)


def as_latex(found: Found) -> str:
    """A tabular per table, without packages."""
    parts = list[str]()
    for s in sheets(found):
        heads = " & ".join(map(latex, ["", *s.columns]))
        body = [" & ".join(map(latex, [name, *(cell.text() for cell in cells)])) + r" \\" for name, cells in s.lines]
        parts += [f"% {s.title}", rf"\begin{{tabular}}{{l{'r' * len(s.columns)}}}", r"\hline", heads + r" \\",
                  r"\hline", *body, r"\hline", r"\end{tabular}", ""]
    return "\n".join(parts)


def in_terminal(found: Found) -> None:
    """A line for each method; turned, a column for each, where these are fewer."""
    def table(s: Sheet) -> tuple[str, list[str], list[list[Any]]]:
        if len(s.lines) > len(s.columns):
            return s.title, ["", *s.columns], s.rows()
        return (s.title, ["", *(name for name, _ in s.lines)],
                [[column, *(cells[i].shown() for _, cells in s.lines)] for i, column in enumerate(s.columns)])

    printed([table(s) for s in sheets(found)], [("", sentences(found))])

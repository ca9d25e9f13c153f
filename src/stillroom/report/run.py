"""The report of a run: reads the run folder, and nothing but the folder, and writes report.html into it."""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stillroom.recipes import listing
from stillroom.report import words
from stillroom.report.metrics import POINTS, Metrics, gather, rows
from stillroom.report.page import Files, Header, Images, Panels, Section, Settings, Table, Text, image, page
from stillroom.report.plots import curves
from stillroom.settings import Refusal
from stillroom.settings.files import write_atomically
from stillroom.train.checkpoint import Shelf

SHOWN = 8  # pictures of one series, evenly spaced: the page carries every byte it shows
KNOWN = {  # of a run folder: name -> what it is
    "settings.toml": "resolved settings; start from these to repeat the run",
    "run.json": "machine, sessions, notes",
    "metrics.jsonl": "one row per logged step",
    "samples": "pictures drawn during the run",
    "product": "what the run leaves; loadable by itself",
    "tables": "tables of this page",
    "checkpoints": "what a resume needs",
}


def write_report(run: Path) -> Path:
    """Writes run/report.html in one move, so that a reader of an older report never sees half of a new one."""
    run = Path(run)
    target = run / "report.html"
    write_atomically(target, _page(run), os.getpid())  # a run that ends may write its own beside `stillroom report`
    return target


def _page(run: Path) -> str:
    for name in ("settings.toml", "run.json"):
        if not (run / name).is_file():
            raise Refusal(f"{run}: not a run folder, it has no {name}; name the folder that a recipe wrote")
    settings, record = _toml(run / "settings.toml"), _json(run / "run.json")
    unreadable: list[int] = []
    metrics = gather(rows(run / "metrics.jsonl", unreadable))
    recipe = str(record.get("recipe") or settings.get("recipe") or "run")
    sections: list[Section] = [
        *_product(run), *_samples(run), *_curves(metrics, unreadable), *_tables(run),
        Settings("Settings", settings),
        *_record(record), Files("Files", _files(run)),
    ]
    title = recipe.rpartition(":")[2]  # of FILE.py:CLASS; the settings have the file
    step = max((s for s in (metrics.step, *Shelf(run / "checkpoints", 1).steps()) if s is not None), default=None)
    return page(title, sections, _header(recipe, record, settings, metrics, step))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise Refusal(f"{path}: not readable as TOML ({error}); restore the file or start the run again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise Refusal(f"{path}: not readable as JSON ({error}); restore the file or remove it") from error
    if not isinstance(found, dict):
        raise Refusal(f"{path}: holds a {type(found).__name__}, not an object; restore the file or remove it")
    return found


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = record.get(key) or {}
    return found if isinstance(found, Mapping) else {key: found}


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    found = record.get(key) or []
    return found if isinstance(found, list) else [found]


def _header(recipe: str, record: Mapping[str, Any], settings: Mapping[str, Any], metrics: Metrics,
            step: int | None) -> Header:
    """`step`: the last of which there is a row or a checkpoint."""
    steps = record.get("steps", settings.get("steps"))  # the settings' may be those of one stage of several
    lead = next((entry.title for entry in listing() if entry.name == recipe), "")
    of = f" of {steps:,}" if isinstance(steps, int) and steps > 0 else ""
    if record.get("finished"):
        status, tone = "finished" + (f": {steps:,} steps" if of else ""), "good"
    else:
        at = f"at step {step:,}{of}" if step is not None else f"before the first row{of and f', 0{of}'}"
        status, tone = f"stopped {at}", "open"
        open_end = "The run has not recorded its end: it was interrupted, or still going when this page was written."
        lead = f"{lead} {open_end}".strip()
    return Header(f"stillroom {record.get('stillroom', '')} · run".replace("  ", " "), status, tone, lead,
                  [(label, fact) for label, fact in _facts(record, settings, metrics) if fact])


def _facts(record: Mapping[str, Any], settings: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    machine, sessions = _mapping(record, "machine"), len(_list(record, "sessions"))
    seconds = record.get("seconds") or metrics.seconds  # the record has none before the end
    parameters = _mapping(record, "parameters")
    time = words.duration(seconds) if isinstance(seconds, int | float) else ""
    memory = machine.get("memory_gib")
    place = [
        str(machine.get("device", "")),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{memory:g} GiB" if words.is_number(memory) else "",
    ]
    software = [f"{name} {machine[key]}" for name, key in (("torch", "torch"), ("Python", "python")) if key in machine]
    return [
        ("Wall time", f"{time} in {sessions} sessions" if time and sessions > 1 else time),
        ("Started", _moment(record.get("created"))),
        ("Machine", ", ".join(x for x in place if x)),
        ("Software", ", ".join(software)),
        ("Parameters", ", ".join(f"{k} {n:,}" if words.is_number(n) else f"{k} {n}" for k, n in parameters.items())),
        ("Precision", str(record.get("precision") or "")),
        ("Processes", str(record.get("processes") or "")),
        ("Seed", str(settings.get("seed", ""))),
    ]


def _moment(text: Any) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%-d %B %Y, %H:%M %Z").strip()
    except (TypeError, ValueError):
        return str(text or "")


def _product(run: Path) -> list[Section]:
    if not (run / "product" / "product.json").is_file():
        return []
    product = _json(run / "product" / "product.json")
    card, parts = product.get("card") or {}, _mapping(product, "parts")
    values = {"kind": product.get("kind", "unknown")} | (dict(card) if isinstance(card, Mapping) else {"card": card})
    if parts:
        values["parts"] = {name: _part(part) for name, part in parts.items()}
    if product.get("base"):
        values["base"] = product["base"]
    return [Settings("Product", values)]


def _part(part: Any) -> Any:
    """A part's whole description can hold hundreds of arguments; its class says most of it."""
    if part == {"tensor": True}:
        return "tensor"
    if isinstance(part, Mapping) and "class" in part:
        own = _mapping(part, "arguments")
        return f"{part['class']}({', '.join(f'{k}={v}' for k, v in own.items() if not isinstance(v, Mapping | list))})"
    return words.value(part)


def _samples(run: Path) -> list[Section]:
    """Names that differ only in their numbers are one series. The run's steps come first, the newest at the head."""
    series: dict[str, list[Path]] = {}
    for path in sorted((run / "samples").glob("*.png"), key=lambda p: words.natural(p.name)):
        series.setdefault(re.sub(r"\d+", "#", path.stem), []).append(path)
    shown: list[tuple[Path | bytes, str]] = []
    torn: list[str] = []
    for _, paths in sorted(series.items(), key=lambda item: not item[0].startswith("step")):
        last, few = len(paths) - 1, min(SHOWN, len(paths))
        chosen = [round(i * last / max(few - 1, 1)) for i in reversed(range(few))]
        for path in (paths[i] for i in chosen):
            try:
                image(path, path.stem)
                shown.append((path, words.caption(path.stem)))
            except Refusal:  # cut off while it was drawn; the rest of the report stands
                torn.append(path.name)
    total = sum(map(len, series.values()))
    few = f"{len(shown)} of {total:,} pictures, evenly spaced; the others are in samples/."
    notes = [few] if len(shown) + len(torn) < total else []
    notes += [f"Left out, not a whole picture: {', '.join(torn)}."] if torn else []
    return [Images("Samples", shown, " ".join(notes))] if total else []


def _curves(metrics: Metrics, unreadable: list[int]) -> list[Section]:
    torn = ""
    if unreadable:
        listed = ", ".join(map(str, unreadable[:5])) + (", …" if len(unreadable) > 5 else "")
        lines = "one line" if len(unreadable) == 1 else f"{len(unreadable):,} lines"
        torn = (f"Left out: {lines} of metrics.jsonl that could not be read (line {listed}); "
                "a run that is cut off while writing a row leaves it torn.")
    if not metrics.series:
        return [Text("Curves", ["No measurements yet: metrics.jsonl has no rows to draw.", *([torn] if torn else [])])]
    most = max(len(series.steps) for series in metrics.series.values())
    notes = ["Over steps; at the right of each name, its last value."]
    if most > POINTS:
        notes.append(f"Lines are means over as many as {math.ceil(most / POINTS):,} rows, "
                     "bands reach from the least of them to the greatest.")
    if len(metrics.stages) > 1:
        opened = ", ".join(f"{name} from {step:,.0f}" for step, name in metrics.stages)
        notes.append(f"Dashed lines open stages: {opened}.")
    groups = {role or "the run": panels for role, panels in curves(metrics).items()}
    return [Panels("Curves", groups, " ".join([*notes, *([torn] if torn else [])]))]


def _tables(run: Path) -> list[Section]:
    tables: list[Section] = []
    for path in sorted((run / "tables").glob("*.json"), key=lambda p: words.natural(p.name)):
        found = _json(path)
        missing = [key for key in ("title", "columns", "rows") if key not in found]
        if missing:
            raise Refusal(f"{path}: a table needs title, columns and rows, here {', '.join(missing)} is missing; "
                          "add it or remove the file")
        try:
            tables.append(Table(str(found["title"]), found["columns"], found["rows"], str(found.get("note") or "")))
        except (TypeError, ValueError) as error:
            raise Refusal(f"{path}: {error}; mend or remove the file") from error
    return tables


def _record(record: Mapping[str, Any]) -> list[Section]:
    notes, sessions = [words.value(note) for note in _list(record, "notes")], _list(record, "sessions")
    sections: list[Section] = [Text("Notes", notes)] if notes else []
    if len(sessions) > 1 and all(isinstance(session, Mapping) for session in sessions):
        lines = [(s.get("start_step"), _moment(s.get("started"))) for s in sessions]
        sections.append(Table("Sessions", ["from step", "started"], lines))
    return sections


def _files(run: Path) -> list[tuple[str, str, str, str]]:
    """What lies in the folder, the product's files one by one. Addresses are relative: the folder may move."""
    found = []
    for name, what in KNOWN.items():
        path = run / name
        if path.is_file():
            found.append((quote(name), name, what, words.size(path.stat().st_size)))
        elif path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
            told = f"{what}; {len(inside):,} {'file' if len(inside) == 1 else 'files'}"
            found.append((f"{quote(name)}/", f"{name}/", told, words.size(sum(p.stat().st_size for p in inside))))
            if name == "product":
                local = [(p, p.relative_to(run).as_posix()) for p in inside]
                found += [(quote(r), r, "", words.size(p.stat().st_size)) for p, r in local[:20]]
    return found



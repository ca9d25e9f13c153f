"""One self-contained HTML file from a title and sections: pictures inline, no scripts, nothing fetched."""

import base64
import functools
import hashlib
import importlib.resources
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure as Plot
from PIL import Image

from stillroom.report.plots import VARIABLES
from stillroom.report.words import flatten, is_number, number, value
from stillroom.settings import Refusal

Picture = bytes | Path | Plot
PIXELS = 320  # narrower pictures are shown enlarged with hard pixels


@dataclass(frozen=True)
class Header:
    """What stands above the sections. The tone colours the status: good, open (not decided yet), bad or plain."""

    kicker: str = ""
    status: str = ""
    tone: Literal["good", "open", "bad", "plain"] = "plain"
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Text:
    title: str
    paragraphs: Sequence[str] | str

    def view(self) -> dict[str, Any]:
        return {"paragraphs": [self.paragraphs] if isinstance(self.paragraphs, str) else self.paragraphs}


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self):
        for index, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                cells = f"{len(row)} cells for {len(self.columns)} columns"
                raise ValueError(f"table {self.title!r}: row {index} has {cells}")

    def view(self) -> dict[str, Any]:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        right = [any(map(is_number, c)) and all(x is None or is_number(x) for x in c) for c in columns]
        heads = list(zip(self.columns, right, strict=True))
        rows = [[(_cell(x), r) for x, r in zip(row, right, strict=True)] for row in self.rows]
        return {"heads": heads, "rows": rows, "note": self.note}


@dataclass(frozen=True)
class Figure:
    title: str
    picture: Picture
    caption: str = ""

    def view(self) -> dict[str, Any]:
        return {"markup": markup(self.picture, self.caption or self.title), "caption": self.caption}


@dataclass(frozen=True)
class Panels:
    """Small pictures of equal shape under headings; the page sets as many side by side as it has room for."""

    title: str
    groups: Mapping[str, Sequence[Picture]]
    caption: str = ""

    def view(self) -> dict[str, Any]:
        groups = [
            (name, all(map(_square, pictures)), [markup(p, name or self.title) for p in pictures])
            for name, pictures in self.groups.items()
        ]
        return {"groups": groups, "caption": self.caption}


@dataclass(frozen=True)
class Images:
    """Pictures with captions; each opens over the whole window."""

    title: str
    images: Sequence[tuple[Path | bytes, str]]
    note: str = ""

    def view(self) -> dict[str, Any]:
        return {"shots": [(image(source, caption), caption) for source, caption in self.images], "note": self.note}


@dataclass(frozen=True)
class Settings:
    """Nested names and values: settings, a product's card."""

    title: str
    values: Mapping[str, Any]
    note: str = ""

    def view(self) -> dict[str, Any]:
        return {"groups": flatten(self.values), "note": self.note}


@dataclass(frozen=True)
class Files:
    """(address relative to the page or '', name, what it is, size in words)."""

    title: str
    files: Sequence[tuple[str, str, str, str]]

    def view(self) -> dict[str, Any]:
        return {"files": self.files}


Section = Text | Table | Figure | Panels | Images | Settings | Files


def page(title: str, sections: Sequence[Section], header: Header | None = None) -> str:
    """The whole page as text. Everything that is not a picture is escaped."""
    views, taken = [], set()
    for section in sections:
        views.append({"kind": type(section).__name__, "title": section.title, "id": _anchor(section.title, taken)}
                     | section.view())
    return _template().render(title=title, header=header or Header(), sections=views)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files("stillroom.report").joinpath("page.html")
    return environment.from_string(source.read_text("utf-8"))


def _anchor(title: str, taken: set[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    taken.add(name)
    return name


def _square(picture: Picture) -> bool:
    return isinstance(picture, Plot) and picture.get_figwidth() < 1.2 * picture.get_figheight()


def _cell(thing: Any) -> str:
    if thing is None:
        return "–"
    return number(thing) if is_number(thing) else value(thing)


def markup(picture: Picture, words: str) -> Markup:
    return svg(picture, words) if isinstance(picture, Plot) else image(picture, words)


def image(source: Path | bytes, words: str) -> Markup:
    """An <img> that carries its bytes. Broken pictures are refused: a page must not show a torn one as a result."""
    raw = source if isinstance(source, bytes) else source.read_bytes()
    name = "a picture of the page" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG", "JPEG", "GIF", "WEBP"]) as opened:
            opened.load()
            kind, (wide, high) = Image.MIME[opened.format or ""], opened.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f"{name}: not a whole PNG, JPEG, GIF or WebP picture ({error}); draw it again") from error
    shape = "pixels" if wide < PIXELS else "wide" if wide > 2.4 * high else ""
    return Markup('<img src="data:{};base64,{}" alt="{}" width="{}" height="{}" class="{}">').format(
        kind, base64.b64encode(raw).decode(), words, wide, high, shape
    )


def svg(plot: Plot, words: str) -> Markup:
    """Inline SVG: text stays text in the page's font, the colours of `plots` become the page's variables, and names
    carry the figure's hash, since all figures of a page share one document."""
    words, out = str(plot.get_label() or words), io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillroom"}):
        plot.savefig(out, format="svg", dpi=200, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type=.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    mark = f"f{hashlib.sha256(text.encode()).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box, "matplotlib writes a viewBox"
    opening = Markup('<svg {} role="img" aria-label="{}">').format(Markup(box[0]), words)
    return opening + Markup(re.sub(r"\n\s*", "\n", text[text.index(">") + 1 :]).strip())

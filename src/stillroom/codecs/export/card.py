"""The model card of an export: what it is, where it comes from, what it measures, and code that runs as it stands."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.codecs.codec import Codec

TOLD = ("title", "teacher", "licence", "credits")     # keys of a card with a place of their own
UNLICENSED = "not stated; those of the teacher and of the data apply"
UNTAUGHT = "not stated; that of the data applies"


def write_card(folder: Path, codec: Codec, card: Mapping[str, Any] | None, figures: Sequence[Mapping[str, Any]],
               form: str, snippet: str, library: str = "") -> None:
    """`form` says what the files are; `snippet` must run as it stands in the folder."""
    space, card = codec.space, card or {}
    taught = "teacher" in card
    title = card.get("title", "A distilled image codec" if taught else "An image codec")
    counts = [f"{sum(p.numel() for p in half.parameters()):,}" for half in (codec.encoder, codec.decoder)]
    tags = f"[autoencoder, vae{', distillation' * taught}]"
    header = {"library_name": library, "license": card.get("licence"), "tags": tags}
    parts = [
        "\n".join(["---", *(f"{k}: {v}" for k, v in header.items() if v), "---"]),
        f"# {title}",
        form,
        "\n".join([
            f"- latents: {space.channels} channels, one per {space.factor} x {space.factor} pixels, the first centred "
            f"on pixel {space.offset:g}",
            f"- parameters: encoder {counts[0]}, decoder {counts[1]}",
            *([f"- teacher: {card['teacher']}"] if taught else []),
            f"- licence: {card.get('licence', UNLICENSED if taught else UNTAUGHT)}",
            *([f"- credits: {_line(card['credits'])}"] if "credits" in card else []),
            *(f"- {name.replace('_', ' ')}: {_line(value)}" for name, value in card.items() if name not in TOLD),
        ]),
        f"## Use\n\n```python\n{snippet.strip()}\n```",
        *([f"## Figures\n\n{table(figures)}"] if figures else []),
        f"Written by stillroom {importlib.metadata.version('stillroom')}.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, with a column for every name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_line(each)}" for name, each in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_line, value)) if isinstance(value, list | tuple) else _cell(value)

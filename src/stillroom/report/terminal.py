"""Tables and sentences in a terminal; elsewhere, in lines of 160 columns."""

from collections.abc import Iterable, Sequence
from typing import Any

from stillroom.report.words import is_number, number, value


def printed(tables: Iterable[tuple[str, Sequence[str], Sequence[Sequence[Any]]]],
            told: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Tables, each (title, heads, rows), and sentences, each under a heading or under none ("")."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(emoji=False, markup=False, highlight=False)
    console = console if console.is_terminal else Console(emoji=False, markup=False, highlight=False, width=160)
    for title, heads, body in tables:
        grid = Grid(title=title, title_justify="left", box=None, title_style="bold")
        for i, head in enumerate(heads):
            grid.add_column(head, justify="right" if i else "left", overflow="fold")
        for row in body:
            grid.add_row(*("–" if x is None else number(x) if is_number(x) else value(x) for x in row))
        console.print(grid, "")
    for heading, sentences in told:
        if heading:
            console.print(heading, style="bold", soft_wrap=not console.is_terminal)
        console.print("\n".join(sentences), soft_wrap=not console.is_terminal)

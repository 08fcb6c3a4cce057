"""Tables and figures for people, on stderr; JSON for programs, on stdout."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False)


def print_json(document: object) -> None:
    """The one document that a verb gives with ``--json``."""
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def say(line: str) -> None:
    """A line of text as it is, never wrapped or marked up: it may hold a path."""
    console.print(line, soft_wrap=True, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table whose first column is text and whose others are numbers unless they are text."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        texts = [str(row[number]) for row in rows]
        is_text = number == 0 or not any(text[:1].isdigit() for text in texts)
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(table)


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

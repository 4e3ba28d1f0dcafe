"""Tables as text: in Markdown for pages, and for terminals, where a table that is too wide becomes a list of its
rows."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Sequence

from steer.errors import escaped

Rows = Sequence[Sequence[str]]
#: A function that writes a table from its head and rows.
Table = Callable[[Sequence[str], Rows], str]
#: A cell of a column of figures, which is aligned to the right.
FIGURE = re.compile(r"[+−-]?\d.*|[–]?")
#: The width if the output is not a terminal and COLUMNS is not set.
UNLIMITED = 10_000


def markdown(head: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table that is readable as plain text too: figures to the right, texts to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    figures = [all(FIGURE.fullmatch(row[i]) for row in rows) for i in range(len(head))]
    rule = [f"{'-' * (width - 1)}:" if right else "-" * width for width, right in zip(widths, figures, strict=True)]
    lines = (
        " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, figures, strict=True)
        )
        for row in (head, rule, *rows)
    )
    return "\n".join(f"| {line} |" for line in lines)


def shown(head: Sequence[str], rows: Rows) -> str:
    """Return a table for the terminal: in Markdown, or if that is too wide, each row as a list of its cells."""
    columns = terminal_width()
    table = markdown(head, rows)
    if max(map(len, table.splitlines())) <= columns:
        return table
    cells = [
        wrapped(f"{name}: {cell}", columns, first="" if name == head[0] else "  ", further="    ")
        for row in rows
        for name, cell in zip(head, row, strict=True)
        if cell
    ]
    return "\n".join(cells)


def wrapped(text: str, columns: int, first: str = "", further: str = "") -> str:
    """Return `text`, which need not be trusted, in lines of at most `columns`. `first` and `further` are the
    indentations of the first and of the other lines."""
    text = escaped(re.sub(r"\s", " ", text))
    return textwrap.fill(text, max(columns, 20), initial_indent=first, subsequent_indent=further)


def terminal_width(otherwise: int = UNLIMITED) -> int:
    """Return the columns of the terminal, or `otherwise` if the output is not a terminal."""
    return shutil.get_terminal_size((otherwise, 24)).columns

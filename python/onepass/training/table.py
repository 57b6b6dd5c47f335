"""Tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table_line(cells: Iterable[Any], formats: Iterable[str]) -> str:
    """Return one line of a table whose other lines are not known yet.

    Args:
        cells: The values of the columns.
        formats: Alignment and width of each column as in a format specification, such as ``"<12"`` or ``">8"``.
    """
    return "  ".join(format(str(cell), spec) for cell, spec in zip(cells, formats, strict=True)).rstrip()


def text_table(rows: Iterable[Iterable[Any]], align: str = "<>") -> str:
    """Return a table as plain text.

    Args:
        rows: The values of each row, the headings first if there are any. At least one row.
        align: ``<`` (left) or ``>`` (right) for each column. The last character applies to all further columns.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    formats = [f"{side}{width}" for side, width in zip(align.ljust(len(widths), align[-1]), widths, strict=True)]
    return "\n".join(table_line(row, formats) for row in cells)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, without those columns but the first that have only empty cells."""
    rows = list(rows)
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in lines)

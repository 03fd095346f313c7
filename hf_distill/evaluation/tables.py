"""Numbers and tables as reports and cards print them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.table import Table

# Wider than any table of a report: what is printed into a string is not cut to a terminal.
TEXT_WIDTH = 1000


def format_cell(value: object) -> str:
    """One cell: four significant digits, thousands separated; nothing for what is None or not finite."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def format_share(value: float | None) -> str:
    """A share in percent; nothing for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def format_interval(low: float | None, high: float | None) -> str:
    """An interval of shares in percent; nothing when it is not defined."""
    return "" if low is None or high is None else f"{100 * low:.1f} to {format_share(high)}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table without the columns that are empty in every row; columns of numbers stand on the right."""
    headings, cells = _filled(columns, rows)
    rules = ["---:" if numeric else "---" for numeric in _numeric(cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, rules, *cells])


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """The same table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    headings, cells = _filled(columns, rows)
    table = Table()
    for heading, numeric in zip(headings, _numeric(cells), strict=True):
        table.add_column(Text(heading), justify="right" if numeric else "left")
    for row in cells:
        table.add_row(*(Text(cell.replace("\\|", "|")) for cell in row))
    return table


def rich_text(item: Any) -> str:
    """What rich prints, as plain text, without colours."""
    from rich.console import Console

    written = io.StringIO()
    Console(file=written, width=TEXT_WIDTH, color_system=None).print(item)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip().splitlines())


def _filled(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the columns that hold something."""
    cells = [[format_cell(value) for value in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in cells]


def _numeric(cells: list[list[str]]) -> list[bool]:
    """Which columns hold numbers alone, or nothing."""
    return [all(cell[:1] in "-0123456789" for cell in column) for column in zip(*cells, strict=True)]

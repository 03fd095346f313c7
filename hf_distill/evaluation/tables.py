"""Numbers and tables as reports and cards print them."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
    cells = [[format_cell(value) for value in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    rules = ["---:" if all(row[i][:1] in "-0123456789" for row in cells) else "---" for i in kept]
    lines = [[columns[i] for i in kept], rules, *([row[i] for i in kept] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

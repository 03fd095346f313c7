"""Write the tables of benchmarks/README.md, and the plot of the growth, from the rows in benchmarks/results.

    python benchmarks/report.py

Of the rows with one setting, number of threads and machine, the last counts. The plot needs the extra `plots`.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from measure import RESULTS, medians

from hf_distill.evaluation.tables import markdown_table


README = Path(__file__).parent / "README.md"
PLOT = RESULTS / "growth.png"
START, END = "<!-- tables -->", "<!-- end of the tables -->"
Row = dict[str, Any]


def load(suite: str) -> list[Row]:
    path = RESULTS / f"{suite}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return list({json.dumps([row["setting"], row["threads"], row["machine"]]): row for row in rows}.values())


def section(suite: str, row: Row) -> str:
    """One table: the first case is the reference of the ratios."""
    seconds, peaks = medians(row), row["peak_mb"]
    first = next(iter(peaks))
    columns = ["", "seconds", "ratio", "peak (MB)", "ratio"]
    columns += ["floor"] * ("floor" in seconds)
    cells = []
    for name, peak in peaks.items():
        cell = [name, round(seconds[name], 3), round(seconds[name] / seconds[first], 2)]
        cell += [round(peak), round(peak / peaks[first], 3)]
        cells.append(cell + [f"{seconds['floor'] / seconds[name]:.0%}"] * ("floor" in seconds))
    setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
    turns = len(row["seconds"][first])
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    notes = [
        f"`{row['command']}`: {setting}; median of {turns} turns on {row['threads']} threads.",
        f"{row['machine']['gpu'] or row['machine']['cpu']}, {versions}.",
    ]
    return "\n".join([f"### {suite}, {row['preset']}", "", *notes, "", markdown_table(columns, cells)])


def plot_growth(rows: list[Row]) -> None:
    """Seconds and peaks against tokens, a line per case and vocabulary."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    rows = sorted(rows, key=lambda row: (row["setting"]["vocabulary"], row["setting"]["tokens"]))
    for vocabulary, group in groupby(rows, lambda row: row["setting"]["vocabulary"]):
        same = list(group)
        tokens = [row["setting"]["tokens"] for row in same]
        for name in same[0]["peak_mb"]:
            label = f"{name}, V={vocabulary:,}"
            axes[0].plot(tokens, [medians(row)[name] for row in same], marker="o", label=label)
            axes[1].plot(tokens, [row["peak_mb"][name] for row in same], marker="o", label=label)
    for axis, title in zip(axes, ("seconds, forward and backward", "peak over the inputs (MB)"), strict=True):
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    tables = [section(suite, row) for suite in ("loss", "step", "growth") for row in load(suite)]
    growth = load("growth")
    if growth:
        plot_growth(growth)
        tables.append(f"![How time and memory grow]({PLOT.relative_to(README.parent)})")
    before, rest = README.read_text().split(START)
    _, after = rest.split(END)
    README.write_text(before + "\n\n".join([START, *tables, END]) + after)


if __name__ == "__main__":
    main()

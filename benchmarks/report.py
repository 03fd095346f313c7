"""Write the tables of benchmarks/README.md, and the plot of the growth, from the rows in benchmarks/results.

    python benchmarks/report.py

Of the rows with one setting, number of threads and machine, the last counts; of `objectives` all. The plot needs the
extra `plots`.
"""

from __future__ import annotations

import json
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

import measure
from measure import RESULTS, medians

from hf_distill.evaluation.tables import format_cell, markdown_table


README = Path(__file__).parent / "README.md"
PLOT = RESULTS / "growth.png"
# Terms of the reference, by the names of their shares.
OWN = ("ce", "forward_kl", "taid")
START, END = "<!-- tables -->", "<!-- end of the tables -->"
SECTIONS = ("loss", "step", "labels", "sizes", "cached", "build", "read", "taps")
Row = dict[str, Any]


def load(suite: str) -> list[Row]:
    """The last row of each setting."""
    return list({_setting(row): row for row in measure.load(suite)}.values())


def _setting(row: Row) -> str:
    return json.dumps([row["setting"], row["threads"], row["machine"]])


FORMATS = {
    "seconds": "{:.4g}",
    "ratio": "{:.2f}",
    "peak (MB)": "{:,.0f}",
    "ratio of peaks": "{:.3f}",
    "floor": "{:.0%}",
    "tokens/s": "{:,.0f}",
    "bytes": "{:.1f}",
    "angle": "{:.2f}",
    "norm": "{:.3f}",
    "token_cosine": "{:.4f}",
}


def section(suite: str, row: Row) -> str:
    """One table: the first case is the reference of the ratios."""
    found = measure.table(row)
    columns = list(next(iter(found.values())))
    cells = [
        [name, *(FORMATS[column].format(value) for column, value in case.items())] for name, case in found.items()
    ]
    turns = [len(turns) for turns in row["seconds"].values()] if "seconds" in row else []
    how = f"median of {turns[0]} turns on {row['threads']} threads" if turns else f"{row['threads']} threads"
    return "\n".join(
        [f"### {suite}, {row['preset']}", "", *_notes(row, how), "", markdown_table(["", *columns], cells)]
    )


def _notes(row: Row, how: str) -> list[str]:
    setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return [f"`{row['command']}`: {setting}; {how}.", f"{row['machine']['gpu'] or row['machine']['cpu']}, {versions}."]


def comparison(rows: list[Row], cost: Row | None = None) -> str:
    """What each case of `objectives` gave, and how it differs from the first of them under the same seed.

    Args:
        rows: Of one setting.
        cost: A row of `taps`, for the ratios of time and memory.
    """
    reference, metrics, cells = rows[0]["case"], list(rows[0]["metrics"]), []
    base = {row["seed"]: row["metrics"] for row in rows if row["case"] == reference}
    for case in dict.fromkeys(row["case"] for row in rows):
        runs = [row for row in rows if row["case"] == case]
        added = [sum(share for part, share in row["shares"].items() if part not in OWN) for row in runs]
        cell = [case, runs[0]["spec"]["weight"] or None, round(statistics.mean(added), 2) or None]
        for metric in metrics:
            paired = [row["metrics"][metric] - base[row["seed"]][metric] for row in runs if row["seed"] in base]
            cell += [_spread([row["metrics"][metric] for row in runs]), _spread(paired) if case != reference else None]
        cells.append(cell + [_ratio(part, case) for part in ((medians(cost), cost["peak_mb"]) if cost else ({}, {}))])
    columns = ["", "weight", "share", *(name for metric in metrics for name in (metric, "difference"))]
    return markdown_table([*columns, "seconds", "peak"], cells)


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {format_cell(statistics.stdev(values))}" if len(values) > 1 else ""
    return format_cell(statistics.mean(values)) + deviation


def _ratio(measured: dict[str, float], case: str) -> float | None:
    return round(measured[case] / next(iter(measured.values())), 3) if case in measured else None


def comparison_section(rows: list[Row], costs: list[Row]) -> str:
    """The table of `objectives` with what it means."""
    last, seeds = rows[-1], len({row["seed"] for row in rows})
    same = ("threads", "machine")
    cost = next((row for row in reversed(costs) if all(row[key] == last[key] for key in same)), None)
    notes = [
        *_notes(last, f"{seeds} seeds on {last['threads']} threads"),
        "Mean and standard deviation over seeds; differences from the first row are seed by seed. `share` is what the",
        "added term has of the gradient in the first step. `seconds` and `peak` are ratios of a step, from `taps`.",
    ]
    return "\n".join(["### objectives", "", *notes, "", comparison(rows, cost)])


def growth_section(rows: list[Row]) -> str:
    """One table of all sizes."""
    columns, cells = ["", "tokens", "vocabulary", "seconds", "peak (MB)", "floor"], []
    for row in rows:
        seconds, setting = medians(row), row["setting"]
        for name, peak in row["peak_mb"].items():
            size = [f"{setting['tokens']:,}", f"{setting['vocabulary']:,}"]
            cells.append(
                [name, *size, round(seconds[name], 3), round(peak), f"{seconds['floor'] / seconds[name]:.0%}"]
            )
    turns = f"the last row of {len(rows)}; median of {len(next(iter(rows[-1]['seconds'].values())))} turns"
    notes = _notes(rows[-1], f"{turns} on {rows[-1]['threads']} threads")
    return "\n".join(["### growth", "", *notes, "", markdown_table(columns, cells)])


def plot_growth(rows: list[Row]) -> None:
    """Seconds and peaks against tokens, a line per case and vocabulary."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
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
    tables = [section(suite, row) for suite in SECTIONS for row in load(suite)]
    runs = sorted(measure.load("objectives"), key=_setting)  # stable
    tables += [comparison_section(list(group), load("taps")) for _, group in groupby(runs, _setting)]
    growth = sorted(load("growth"), key=lambda row: (row["setting"]["vocabulary"], row["setting"]["tokens"]))
    if growth:
        plot_growth(growth)
        tables.append(growth_section(growth))
        tables.append(f"![How time and memory grow]({PLOT.relative_to(README.parent)})")
    before, rest = README.read_text().split(START)
    _, after = rest.split(END)
    README.write_text(before + "\n\n".join([START, *tables, END]) + after)


if __name__ == "__main__":
    main()

"""Tables and plots of the runs of `compress_smollm2.py`: means over seeds, with the standard deviation."""

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from hf_distill.evaluation.json_file import write_json
from hf_distill.evaluation.tables import markdown_table
from hf_distill.pipelines import StageRow


Models = Mapping[str, Sequence[StageRow]]
# Order of the study of arXiv:2511.19495 (Qwen2.5-3B, NF4, one seed): perplexity.
PUBLISHED = {
    "P-KD-Q": 5.05,
    "KD-P-Q": 5.55,
    "P-Q-KD": 5.60,
    "Q-KD-P": 24.07,
    "Q-P-KD": 34.49,
    "KD-Q-P": 53.37,
}


def values_of(rows: Sequence[StageRow]) -> dict[str, list[float]]:
    """The values of each benchmark over seeds."""
    return {
        entry.benchmark: [
            found.student for row in rows for found in row.report.rows if found.benchmark == entry.benchmark
        ]
        for entry in rows[0].report.rows
    }


def print_table(models: Models) -> None:
    """Print one row a model."""
    names = list(values_of(next(iter(models.values()))))
    table = [
        [label, *map(_spread, values_of(rows).values()), *_kept(rows), *_size(rows)] for label, rows in models.items()
    ]
    print(
        markdown_table(
            ["model", *names, "continuation kept", "95 % interval, first seed", "M", "MB", "tokens/s"], table
        )
    )


def save(models: Models, path: Path) -> None:
    """Write what is in the table, and each seed's values."""
    write_json(
        {
            label: {"values": values_of(rows), "rows": [row.to_dict() | {"facts": {}} for row in rows]}
            for label, rows in models.items()
        },
        path,
    )


def draw_orders(models: Models, folder: Path) -> None:
    """Draw perplexity by order beside the published one, where matplotlib is."""
    for order, rows in models.items():
        print(f"{order}: perplexity {_spread(values_of(rows)['perplexity'])}, published {PUBLISHED[order]}")
    if find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed.")
        return
    from matplotlib.figure import Figure

    measured = {order: statistics.fmean(values_of(rows)["perplexity"]) for order, rows in models.items()}
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    ours, theirs = figure.subplots(1, 2)
    for axes, values, title in [
        (ours, measured, "SmolLM2-135M, w4a16"),
        (theirs, PUBLISHED, "Qwen2.5-3B, NF4 (arXiv:2511.19495)"),
    ]:
        order = sorted(values, key=lambda name: values[name])
        axes.barh(order[::-1], [values[name] for name in order[::-1]])
        axes.set(title=title, xlabel="perplexity, lower is better", xscale="log")
    figure.savefig(folder / "orders.png", dpi=150)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.4g}"


def _kept(rows: Sequence[StageRow]) -> list[str]:
    found = [next(entry for entry in row.report.rows if entry.benchmark == "continuation") for row in rows]
    first = found[0]
    interval = "" if first.ci_low is None else f"{first.ci_low:.1%} to {first.ci_high:.1%}"
    return [_spread([entry.retention for entry in found]), interval]


def _size(rows: Sequence[StageRow]) -> list[object]:
    return [rows[0].parameters / 1e6, rows[0].weight_bytes / 1e6, round(rows[0].tokens_per_second)]

"""Tables and plots of the runs of `compress_smollm2.py`: means over seeds, with the standard deviation."""

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from hf_distill.evaluation import RetentionReport, RetentionRow
from hf_distill.evaluation.json_file import write_json
from hf_distill.evaluation.tables import format_interval, markdown_table
from hf_distill.pipelines import StageRow


Models = Mapping[str, Sequence[StageRow]]
Reports = Mapping[str, Sequence[RetentionReport]]
# Order of the study of arXiv:2511.19495 (Qwen2.5-3B, NF4, one seed): perplexity.
PUBLISHED = {
    "P-KD-Q": 5.05,
    "KD-P-Q": 5.55,
    "P-Q-KD": 5.60,
    "Q-KD-P": 24.07,
    "Q-P-KD": 34.49,
    "KD-Q-P": 53.37,
}


def values_of(reports: Sequence[RetentionReport]) -> dict[str, list[float | None]]:
    """The values of each benchmark over seeds."""
    return {
        name: [row.student for report in reports for row in report.rows if row.benchmark == name]
        for name in (row.benchmark for row in reports[0].rows)
    }


def print_table(models: Models) -> None:
    """Print one row a model of a pipeline, with its size."""
    print_reports(_reports(models), {label: _size(rows[0]) for label, rows in models.items()})


def print_reports(reports: Reports, sizes: Mapping[str, Sequence[object]] | None = None) -> None:
    """Print means and standard deviations over seeds, and how much of the teacher's choices is kept."""
    columns = ["model", "seeds", *values_of(next(iter(reports.values()))), "choices kept", "95 %, first seed"]
    cells = [
        [label, len(found), *map(_spread, values_of(found).values()), *_kept(found), *(sizes or {}).get(label, ())]
        for label, found in reports.items()
    ]
    print(markdown_table([*columns, *(("M", "MB", "tokens/s") if sizes else ())], cells))


def save(models: Models, path: Path) -> None:
    """Write every seed's values and the sizes."""
    save_reports(_reports(models), path, {label: list(_size(rows[0])) for label, rows in models.items()})


def save_reports(reports: Reports, path: Path, sizes: Mapping[str, object] | None = None) -> None:
    """Write every seed's values, and the retention of the choices with its interval."""
    found = {
        label: {
            "values": values_of(each),
            "choices kept": [[row.retention, row.ci_low, row.ci_high] for row in map(_choices, each)],
        }
        for label, each in reports.items()
    }
    write_json({"models": found, "parameters (M), MB, tokens/s": sizes or {}}, path)


def draw_orders(models: Models, folder: Path) -> None:
    """Draw perplexity by order beside the published one, where matplotlib is."""
    reports = _reports(models)
    for order in models:
        print(f"{order}: perplexity {_spread(values_of(reports[order])['perplexity'])}, published {PUBLISHED[order]}")
    if find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed.")
        return
    from matplotlib.figure import Figure

    measured = {order: statistics.fmean(values_of(each)["perplexity"]) for order, each in reports.items()}
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    ours, theirs = figure.subplots(1, 2)
    for axes, values, title in [
        (ours, measured, "SmolLM2-135M, w4a16"),
        (theirs, PUBLISHED, "Qwen2.5-3B, NF4 (arXiv:2511.19495)"),
    ]:
        order = sorted(values, key=lambda name: values[name])
        axes.bar_label(axes.barh(order[::-1], [values[name] for name in order[::-1]]), fmt="%.4g", padding=2)
        axes.set(xlabel="perplexity, lower is better")
        axes.set_title(title, fontsize="medium")
        axes.margins(x=0.25)
    figure.savefig(folder / "orders.png", dpi=150)


def _spread(values: Sequence[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""  # a teacher that is no better than chance
    mean = statistics.fmean(values)
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.4g}"


def _reports(models: Models) -> Reports:
    return {label: [row.report for row in rows if row.report is not None] for label, rows in models.items()}


def _choices(report: RetentionReport) -> RetentionRow:
    return next(row for row in report.rows if row.benchmark == "continuation")


def _kept(reports: Sequence[RetentionReport]) -> list[str]:
    found = [_choices(report) for report in reports]
    return [_spread([row.retention for row in found]), format_interval(found[0].ci_low, found[0].ci_high)]


def _size(row: StageRow) -> list[object]:
    size = None if row.weight_bytes is None else row.weight_bytes / 1e6
    return [row.parameters / 1e6, size, round(row.tokens_per_second)]

"""Plots of a retention report: per-benchmark bars, and retention against size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_distill.evaluation.scoring import STUDENT, TEACHER


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_distill.evaluation.report import RetentionReport

FORMATS = ("png", "svg")
# A fixed salt and no date: the same report gives the same bytes.
STYLE: Any = {"svg.hashsalt": "hf_distill", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STUDENT_COLOR, TEACHER_COLOR, OTHER_COLORS = "#1f6fb4", "#444444", ("#c9c9c9", "#e3b778", "#9cbf9a", "#c6a3c9")


def draw(report: RetentionReport, folder: Path) -> list[Path]:
    """Write the plots of a report; see `RetentionReport.plot`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed: pip install 'hf_distill[plots]'.") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in (("retention", _bars(report)), ("tradeoff", _tradeoff(report))):
            if figure is not None:
                written += [_write(figure, folder / f"{name}.{ending}") for ending in FORMATS]
    return written


def _bars(report: RetentionReport) -> Figure | None:
    """Retention of the student with its intervals on every benchmark, beside those of what it is compared with."""
    rows = [row for row in report.rows if row.retention is not None]
    if not rows:
        return None
    figure, axes = _canvas(6.4, 1.4 + 0.45 * len(rows) * (1 + 0.5 * len(report.baselines)))
    series = [STUDENT, *report.baselines]
    height = 0.8 / len(series)
    for place, name in enumerate(series):
        kept = [row.retention if name == STUDENT else row.kept_by(row.baselines.get(name)) for row in rows]
        drawn = [(index + height * (place - (len(series) - 1) / 2), share) for index, share in enumerate(kept)]
        drawn = [(position, 100 * share) for position, share in drawn if share is not None]
        color = STUDENT_COLOR if name == STUDENT else _other_color(place - 1)
        if drawn:
            axes.barh(*zip(*drawn, strict=True), height=height, color=color, label=name)
    offset = -height * (len(series) - 1) / 2
    for index, row in enumerate(rows):
        if row.ci_low is not None and row.ci_high is not None:
            _whisker(axes, [100 * row.ci_low, 100 * row.ci_high], [index + offset] * 2)
    axes.axvline(100, color=TEACHER_COLOR, linewidth=1, linestyle="--", label="teacher")
    axes.set_yticks(range(len(rows)), [_label(row.benchmark, row.metric) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("retention (%), 95 % interval")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _tradeoff(report: RetentionReport) -> Figure | None:
    """Mean retention against the bytes of the weights, which rounding saves too, a point a model."""
    sizes = {item.model: item.weight_bytes for item in report.footprints}
    kept = {TEACHER: 1.0, STUDENT: report.mean_retention}
    kept |= {name: report.mean_retention_of(name) for name in report.baselines}
    points = [
        (name, sizes[name] / 1e6, 100 * share) for name, share in kept.items() if share is not None and name in sizes
    ]
    if report.mean_retention is None or STUDENT not in sizes:
        return None
    colors = {TEACHER: TEACHER_COLOR, STUDENT: STUDENT_COLOR}
    colors |= {name: _other_color(place) for place, name in enumerate(report.baselines)}
    figure, axes = _canvas(6.4, 3.6)
    for name, size, share in points:
        axes.plot(size, share, "o", color=colors[name])
        axes.annotate(name, (size, share), textcoords="offset points", xytext=(6, 6))
    if report.mean_ci_low is not None and report.mean_ci_high is not None:
        _whisker(axes, [sizes[STUDENT] / 1e6] * 2, [100 * report.mean_ci_low, 100 * report.mean_ci_high])
    axes.set_xlabel("weights (MB)")
    axes.set_ylabel("mean retention (%), 95 % interval")
    axes.margins(0.2)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if min(share for *_, share in points) < 0 else 0)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own, in inches: nothing is shown, and no global state of pyplot moves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _whisker(axes: Any, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, color="black", linewidth=1.2, marker="|" if y[0] == y[1] else "_")


def _other_color(place: int) -> str:
    return OTHER_COLORS[place % len(OTHER_COLORS)]


def _label(benchmark: str, metric: str) -> str:
    return benchmark if benchmark == metric else f"{benchmark}\n({metric})"


def _write(figure: Figure, path: Path) -> Path:
    """Save a figure; an interrupted write leaves an older one whole."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(unfinished, dpi=150, metadata=metadata)
    unfinished.replace(path)
    return path

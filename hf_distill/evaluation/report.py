"""The report of a retention measurement: what it holds, and how it is written and printed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_distill.evaluation.bootstrap import retention
from hf_distill.evaluation.footprint import LENGTH, ROWS, Footprint
from hf_distill.evaluation.json_file import load_json, write_json
from hf_distill.evaluation.tables import (
    format_interval,
    format_share,
    markdown_table,
    rich_table,
    rich_text,
)


if TYPE_CHECKING:
    from rich.console import Group

BASELINE = "baseline"
FOOTPRINT_NOTE = (
    f"Measured by turns on one machine, in forward passes over {ROWS} rows of up to {LENGTH} tokens; peak memory is "
    "the weights and the most that a pass allocates beside them."
)


@dataclass(frozen=True)
class RetentionRow:
    """One benchmark of a report. What is not defined, or not finite, is None.

    Args:
        benchmark: Its name.
        metric: What is measured.
        higher_is_better: Its direction.
        chance: The value of a guess, which retention does not count.
        n: Number of items (documents, rows), the unit of the bootstrap.
        teacher: The teacher's value.
        student: The student's value.
        baseline: The value of the model that the student is compared with, of the first one where there are several.
        retention: (student - chance) / (teacher - chance), or teacher / student where lower is better.
        ci_low: Lower end of the 95 % paired bootstrap interval of the retention.
        ci_high: Upper end.
        baselines: The values of all models that the student is compared with, by name.
        license: Licence of the items, where it is known.
    """

    benchmark: str
    metric: str
    higher_is_better: bool
    chance: float
    n: int
    teacher: float | None
    student: float | None
    baseline: float | None
    retention: float | None
    ci_low: float | None
    ci_high: float | None
    baselines: Mapping[str, float | None] = field(default_factory=dict)
    license: str | None = None

    def __post_init__(self) -> None:
        if self.baseline is not None and not self.baselines:
            object.__setattr__(self, "baselines", {BASELINE: self.baseline})

    def kept_by(self, value: float | None) -> float | None:
        """The retention of any model's value on these items."""
        if value is None or self.teacher is None:
            return None
        kept: float = retention(value, self.teacher, higher_is_better=self.higher_is_better, chance=self.chance).item()
        return kept if math.isfinite(kept) else None


@dataclass(frozen=True)
class RetentionReport:
    """What a student keeps of its teacher, benchmark by benchmark.

    Args:
        rows: One per benchmark.
        mean_ci_low: Lower end of the 95 % interval of the mean retention.
        mean_ci_high: Upper end.
        footprints: Size, speed and memory of every model: the teacher, the student and what it is compared with.
    """

    rows: tuple[RetentionRow, ...]
    mean_ci_low: float | None = None
    mean_ci_high: float | None = None
    footprints: tuple[Footprint, ...] = ()

    @property
    def mean_retention(self) -> float | None:
        """The mean over the rows that have a retention; None when none has."""
        return _mean([row.retention for row in self.rows])

    @property
    def baselines(self) -> list[str]:
        """Names of the models that the student is compared with, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.baselines))

    def mean_retention_of(self, baseline: str) -> float | None:
        """The mean retention of a model that the student is compared with, over the rows of the student's mean.

        None where one of these rows has no value of it: the two means would be of different benchmarks.
        """
        kept = [row.kept_by(row.baselines.get(baseline)) for row in self.rows if row.retention is not None]
        return None if None in kept else _mean(kept)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return {
            "mean_retention": self.mean_retention,
            "mean_ci_low": self.mean_ci_low,
            "mean_ci_high": self.mean_ci_high,
            "rows": [asdict(row) for row in self.rows],
            "footprints": [asdict(item) for item in self.footprints],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RetentionReport:
        """The report that `to_dict` described."""
        rows = tuple(RetentionRow(**row) for row in data["rows"])
        footprints = tuple(Footprint(**item) for item in data.get("footprints", ()))
        return cls(rows, data["mean_ci_low"], data["mean_ci_high"], footprints)

    def save(self, path: str | Path) -> None:
        """Write JSON; an interrupted write leaves an older file whole."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> RetentionReport:
        """Read what `save` wrote."""
        return load_json(path, "a retention report", cls.from_dict)

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw the retention on every benchmark and, where sizes are known, retention against size.

        Args:
            folder: Gets `retention.png` and `.svg`, `tradeoff.png` and `.svg`; what is not defined is not drawn.

        Returns:
            The files that were written.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from hf_distill.evaluation.plots import draw

        return draw(self, Path(folder))

    def to_markdown(self) -> str:
        """A table with one row per benchmark; columns without a value are left out."""
        return markdown_table(*self._retention_cells())

    def footprint_markdown(self) -> str | None:
        """A table of sizes, speeds and memory, and what they are; None where nothing was measured."""
        return f"{markdown_table(*self._footprint_cells())}\n\n{FOOTPRINT_NOTE}" if self.footprints else None

    def summary(self) -> str | None:
        """The mean retention with its interval in words; None where there is none."""
        if self.mean_retention is None:
            return None
        count = sum(row.retention is not None for row in self.rows)
        bounds = format_interval(self.mean_ci_low, self.mean_ci_high)
        interval = f", 95 % interval {bounds}" if bounds else ""
        return f"Mean retention {format_share(self.mean_retention)} ({count} benchmark{'s'[: count != 1]}{interval})."

    def __str__(self) -> str:
        if importlib.util.find_spec("rich") is not None:
            return rich_text(self)
        return "\n\n".join(part for part in (self.to_markdown(), self.summary(), self.footprint_markdown()) if part)

    def __rich__(self) -> Group:
        """What rich prints: the tables, fitted to its console."""
        from rich.console import Group

        parts: list[Any] = [rich_table(*self._retention_cells())]
        if summary := self.summary():
            parts.append(summary)
        if self.footprints:
            parts.append(rich_table(*self._footprint_cells()))
        return Group(*parts)

    def _retention_cells(self) -> tuple[list[str], list[list[object]]]:
        names = self.baselines
        columns = ["benchmark", "metric", "n", "teacher", "student", *names, "retention", "95 % interval", "licence"]
        return columns, [_cells(row, names) for row in self.rows]

    def _footprint_cells(self) -> tuple[list[str], list[list[object]]]:
        columns = ["model", "parameters", "weights (MB)", "tokens/s", "peak memory (MB)", "dtype", "device"]
        rows: list[list[object]] = [
            [
                item.model,
                item.parameters,
                item.weight_bytes / 1e6,
                None if item.tokens_per_second is None else round(item.tokens_per_second),
                None if item.peak_bytes is None else item.peak_bytes / 1e6,
                item.dtype,
                item.device,
            ]
            for item in self.footprints
        ]
        return columns, rows


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _cells(row: RetentionRow, baselines: list[str]) -> list[object]:
    note = f"chance {row.chance:.3g}" if row.chance else f"{'higher' if row.higher_is_better else 'lower'} is better"
    bounds, kept = format_interval(row.ci_low, row.ci_high), format_share(row.retention)
    others = [row.baselines.get(name) for name in baselines]
    metric = f"{row.metric} ({note})"
    return [row.benchmark, metric, row.n, row.teacher, row.student, *others, kept, bounds, row.license]

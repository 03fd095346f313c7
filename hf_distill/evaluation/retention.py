"""Retention of a student against its teacher: the measurement and the report."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_distill.evaluation.benchmarks import Benchmark
from hf_distill.evaluation.bootstrap import interval, resampled_means, retention
from hf_distill.evaluation.scoring import TEACHER, Lineup, preserved_state
from hf_distill.evaluation.tables import format_interval, format_share, markdown_table


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        baseline: The value of the model that the student is compared with, where one was given.
        retention: (student - chance) / (teacher - chance), or teacher / student where lower is better.
        ci_low: Lower end of the 95 % paired bootstrap interval of the retention.
        ci_high: Upper end.
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


@dataclass(frozen=True)
class RetentionReport:
    """What a student keeps of its teacher, benchmark by benchmark.

    Args:
        rows: One per benchmark.
        mean_ci_low: Lower end of the 95 % interval of the mean retention.
        mean_ci_high: Upper end.
    """

    rows: tuple[RetentionRow, ...]
    mean_ci_low: float | None = None
    mean_ci_high: float | None = None

    @property
    def mean_retention(self) -> float | None:
        """The mean over the rows that have a retention; None when none has."""
        values = [row.retention for row in self.rows if row.retention is not None]
        return math.fsum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return {
            "mean_retention": self.mean_retention,
            "mean_ci_low": self.mean_ci_low,
            "mean_ci_high": self.mean_ci_high,
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RetentionReport:
        """The report that `to_dict` described."""
        rows = tuple(RetentionRow(**row) for row in data["rows"])
        return cls(rows=rows, mean_ci_low=data["mean_ci_low"], mean_ci_high=data["mean_ci_high"])

    def save(self, path: str | Path) -> None:
        """Write JSON; an interrupted write leaves an older file whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> RetentionReport:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_markdown(self) -> str:
        """A table with one row per benchmark; cells without a value are empty."""
        columns = ["benchmark", "metric", "n", "teacher", "student", "baseline", "retention", "95 % interval"]
        return markdown_table(columns, [_cells(row) for row in self.rows])

    def __str__(self) -> str:
        return self.to_markdown()


def _cells(row: RetentionRow) -> list[object]:
    note = f"chance {row.chance:.3g}" if row.chance else f"{'higher' if row.higher_is_better else 'lower'} is better"
    bounds = format_interval(row.ci_low, row.ci_high)
    kept = format_share(row.retention)
    return [row.benchmark, f"{row.metric} ({note})", row.n, row.teacher, row.student, row.baseline, kept, bounds]


def evaluate_retention(
    student: Any,
    teacher: Any,
    benchmarks: Sequence[Benchmark],
    tokenizer: PreTrainedTokenizerBase | None = None,
    baseline: Any = None,
) -> RetentionReport:
    """Measure how much of its teacher a student keeps, on the same items.

    Models run where they are and in their own dtype (call this under `torch.autocast` for another). Their mode and all
    random states are as before afterwards.

    Args:
        student: A Hugging Face model, wrapped or not, or a PEFT model.
        teacher: The same, or a Teacher.
        benchmarks: For example `[Perplexity(held_out), KLDivergence(held_out)]`.
        tokenizer: Needed when a dataset holds text.
        baseline: Another model to report beside the student, for example the student before distillation.

    Returns:
        One row per benchmark, with a 95 % paired bootstrap interval over items.

    Raises:
        ValueError: There is no benchmark, two have one name, or one does not fit the models; before any model runs.

    Example:
        ```python
        report = evaluate_retention(student, teacher, [Perplexity(held_out), Top1Agreement(held_out)], tokenizer)
        print(report)
        report.save("retention.json")
        ```
    """
    _check_benchmarks(benchmarks)
    models = {"student": student, TEACHER: teacher} | ({} if baseline is None else {"baseline": baseline})
    lineup = Lineup(models, tokenizer)
    for benchmark in benchmarks:
        benchmark.check(lineup)
    with preserved_state(models.values()):
        measured = [_measure(benchmark, lineup) for benchmark in benchmarks]
    kept = [(row, replicates) for row, replicates in measured if row.retention is not None]
    low, high = None, None
    if kept and all(row.ci_low is not None for row, _ in kept):
        low, high = interval(np.mean([replicates for _, replicates in kept], axis=0))
    return RetentionReport(tuple(row for row, _ in measured), low, high)


def _check_benchmarks(benchmarks: Sequence[Benchmark]) -> None:
    if not isinstance(benchmarks, Sequence) or not all(isinstance(item, Benchmark) for item in benchmarks):
        raise ValueError(f"`benchmarks` is {benchmarks!r}; expected a list of benchmarks: [Perplexity(dataset)].")
    if not benchmarks:
        raise ValueError("`benchmarks` is empty; expected at least one, for example [Perplexity(dataset)].")
    names = [(item.name, item.metric) for item in benchmarks]
    repeated = sorted({name for name, metric in names if names.count((name, metric)) > 1})
    if repeated:
        raise ValueError(f'`benchmarks` holds {repeated} twice; tell them apart: Perplexity(dataset, name="news").')


def _measure(benchmark: Benchmark, lineup: Lineup) -> tuple[RetentionRow, np.ndarray]:
    """One row, and the bootstrap replicates of its retention."""
    scores = benchmark.score(lineup)
    values = {role: _finite(benchmark, role, benchmark.value(item.mean())) for role, item in scores.items()}
    student, teacher, chance = values["student"], values[TEACHER], benchmark.chance(lineup)
    keep = partial(retention, higher_is_better=benchmark.higher_is_better, chance=chance)
    means = resampled_means([scores["student"], scores[TEACHER]])
    replicates = keep(*(benchmark.value(mean) for mean in means))
    kept = None if student is None or teacher is None else float(keep(student, teacher))
    kept = kept if kept is not None and math.isfinite(kept) else None
    n = len(scores[TEACHER])
    # One item has no spread to estimate.
    low, high = interval(replicates) if kept is not None and n > 1 else (None, None)
    row = RetentionRow(
        benchmark=benchmark.name,
        metric=benchmark.metric,
        higher_is_better=benchmark.higher_is_better,
        chance=chance,
        n=n,
        teacher=teacher,
        student=student,
        baseline=values.get("baseline"),
        retention=kept,
        ci_low=low,
        ci_high=high,
    )
    return row, replicates


def _finite(benchmark: Benchmark, role: str, value: Any) -> float | None:
    if math.isfinite(value):
        return float(value)
    warnings.warn(f"The {role}'s {benchmark.metric} on {benchmark.name!r} is {value}: it is left out.", stacklevel=4)
    return None

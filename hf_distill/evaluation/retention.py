"""Retention of a student against its teacher: the measurement."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_distill.evaluation.benchmarks import Benchmark
from hf_distill.evaluation.bootstrap import ItemScores, interval, resampled_means, retention
from hf_distill.evaluation.footprint import SPEED_ROUNDS, Footprint, footprint, speed_once
from hf_distill.evaluation.report import BASELINE, RetentionReport, RetentionRow
from hf_distill.evaluation.scoring import STUDENT, TEACHER, Lineup, module_of, preserved_state


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RetentionReport", "RetentionRow", "evaluate_retention"]


def evaluate_retention(
    student: Any,
    teacher: Any,
    benchmarks: Sequence[Benchmark],
    tokenizer: PreTrainedTokenizerBase | None = None,
    baseline: Any = None,
    *,
    measure_footprints: bool = True,
) -> RetentionReport:
    """Measure how much of its teacher a student keeps, on the same items.

    Models run where they are and in their own dtype (call this under `torch.autocast` for another). Their mode, their
    device, the tokenizer and all random states are as before afterwards.

    Args:
        student: A Hugging Face model, wrapped or not, or a PEFT model.
        teacher: The same, or a Teacher.
        benchmarks: For example `[Perplexity(held_out), KLDivergence(held_out)]`.
        tokenizer: Needed when a dataset holds text.
        baseline: Another model to report beside the student, for example the student before distillation, or several
            by name: `{"before distillation": before, "cross-entropy only": alone}`.
        measure_footprints: Whether size, speed and memory of every model are measured too, in seven forward passes.

    Returns:
        One row per benchmark, with a 95 % paired bootstrap interval over items, and the footprint of every model that
        is here: a teacher that is a cache has none.

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
    lineup = Lineup({STUDENT: student, TEACHER: teacher} | _baselines(baseline), tokenizer)
    for benchmark in benchmarks:
        benchmark.check(lineup)
    with preserved_state(lineup.models.values()):
        measured = [_measure(benchmark, lineup, benchmark.score(lineup)) for benchmark in benchmarks]
        footprints = _footprints(lineup) if measure_footprints else ()
    return _report(measured, footprints)


def compare_retention(
    students: Mapping[str, Any],
    teacher: Any,
    benchmarks: Sequence[Benchmark],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, RetentionReport]:
    """Measure several students against one teacher, which runs once; see `evaluate_retention`.

    Args:
        students: By name.
        teacher: As for `evaluate_retention`.
        benchmarks: The same.
        tokenizer: The same.

    Returns:
        A report for each student, with intervals and without footprints.
    """
    _check_benchmarks(benchmarks)
    lineup = Lineup({TEACHER: teacher} | _baselines(students), tokenizer)
    for benchmark in benchmarks:
        benchmark.check(lineup)
    with preserved_state(lineup.models.values()):
        scores = [(benchmark, benchmark.score(lineup)) for benchmark in benchmarks]
        return {
            name: _report(
                [
                    _measure(benchmark, lineup, {STUDENT: found[name], TEACHER: found[TEACHER]})
                    for benchmark, found in scores
                ]
            )
            for name in students
        }


def _report(
    measured: Sequence[tuple[RetentionRow, np.ndarray]], footprints: tuple[Footprint, ...] = ()
) -> RetentionReport:
    """All rows, and the interval of the mean retention."""
    kept = [(row, replicates) for row, replicates in measured if row.retention is not None]
    low, high = None, None
    if kept and all(row.ci_low is not None for row, _ in kept):
        low, high = interval(np.mean([replicates for _, replicates in kept], axis=0))
    return RetentionReport(tuple(row for row, _ in measured), low, high, footprints)


def _check_benchmarks(benchmarks: Sequence[Benchmark]) -> None:
    if not isinstance(benchmarks, Sequence) or not all(isinstance(item, Benchmark) for item in benchmarks):
        raise ValueError(f"`benchmarks` is {benchmarks!r}; expected a list of benchmarks: [Perplexity(dataset)].")
    if not benchmarks:
        raise ValueError("`benchmarks` is empty; expected at least one, for example [Perplexity(dataset)].")
    names = [(item.name, item.metric) for item in benchmarks]
    repeated = sorted({name for name, metric in names if names.count((name, metric)) > 1})
    if repeated:
        raise ValueError(f'`benchmarks` holds {repeated} twice; tell them apart: Perplexity(dataset, name="news").')


def _baselines(baseline: Any) -> dict[str, Any]:
    """The models that the student is compared with, by name."""
    if baseline is None:
        return {}
    if not isinstance(baseline, Mapping):
        return {BASELINE: baseline}
    taken = [name for name in baseline if name in (STUDENT, TEACHER) or not isinstance(name, str) or not name]
    if taken or not baseline:
        raise ValueError(
            f"`baseline` has the names {list(baseline)}; expected at least one, and other names than "
            f"{STUDENT!r} and {TEACHER!r}: `baseline={{'before distillation': model}}`."
        )
    return dict(baseline)


def _measure(
    benchmark: Benchmark, lineup: Lineup, scores: Mapping[str, ItemScores]
) -> tuple[RetentionRow, np.ndarray]:
    """One row, and the bootstrap replicates of its retention."""
    values = {role: _finite(benchmark, role, benchmark.value(item.mean())) for role, item in scores.items()}
    student, teacher, chance = values[STUDENT], values[TEACHER], benchmark.chance(lineup)
    baselines = {role: value for role, value in values.items() if role not in (STUDENT, TEACHER)}
    keep = partial(retention, higher_is_better=benchmark.higher_is_better, chance=chance)
    means = resampled_means([scores[STUDENT], scores[TEACHER]])
    replicates = keep(*(benchmark.value(mean) for mean in means))
    if np.array_equal(scores[STUDENT].numerator, scores[TEACHER].numerator):
        replicates = np.ones_like(replicates)  # also in the draws in which the teacher is no better than chance
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
        baseline=next(iter(baselines.values()), None),
        retention=kept,
        ci_low=low,
        ci_high=high,
        baselines=baselines,
        license=benchmark.license,
    )
    return row, replicates


def _finite(benchmark: Benchmark, role: str, value: Any) -> float | None:
    if math.isfinite(value):
        return float(value)
    warnings.warn(f"The {role}'s {benchmark.metric} on {benchmark.name!r} is {value}: it is left out.", stacklevel=4)
    return None


def _footprints(lineup: Lineup) -> tuple[Footprint, ...]:
    """Of every model that is here, the teacher first."""
    present = [role for role in lineup.models if module_of(lineup.models[role]) is not None]
    speeds: dict[str, list[float]] = {role: [] for role in sorted(present, key=lambda role: role != TEACHER)}
    # By turns: what else the machine does for a while slows all of them.
    for _ in range(SPEED_ROUNDS):
        for role, measured in speeds.items():
            with lineup.running(role) as module:
                measured.append(speed_once(module))
    footprints = []
    for role, measured in speeds.items():
        with lineup.running(role) as module:
            footprints.append(footprint(role, module, statistics.median(measured)))
    return tuple(footprints)

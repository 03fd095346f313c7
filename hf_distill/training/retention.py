"""`RetentionCallback`: how much of its teacher the student keeps, measured while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_distill.evaluation import Benchmark, RetentionReport, evaluate_retention
from hf_distill.teachers import Teacher


PREFIX = "eval_"
METRIC = "retention"


class RetentionCallback(TrainerCallback):
    """Measures retention in training: at every evaluation of the trainer, or every so many steps, and at the end.

    The results are in `state.log_history` and go to the trackers: `eval_retention` (the mean, with
    `eval_retention_ci_low` and `_ci_high`), `eval_retention_NAME` and `eval_student_NAME` (the student's value) for
    every benchmark. What is not defined is left out. They are among the metrics of the trainer's own evaluation, so
    that `metric_for_best_model="retention"` chooses checkpoints by them and `EarlyStoppingCallback` stops by them.

    It measures under the trainer's mixed precision, as the trainer evaluates; sizes and speeds once, at the end. Each
    rank measures all items, and all take what the main process found.

    Args:
        trainer: The trainer that it is added to: a `KDTrainer`, one with a `DistillationCallback`, or any other.
        benchmarks: For example `[Perplexity(held_out), Top1Agreement(held_out)]`.
        every: Measure every so many optimizer steps. None: at every evaluation of the trainer.
        teacher: A model or a Teacher; that of the trainer if None.
        baseline: As that of `evaluate_retention`; measured at the end only.

    Attributes:
        report: The last `RetentionReport`; a `KDTrainer` has it as `retention_report` too, for its card.

    Raises:
        ValueError: There is no teacher, no benchmark, or `every` is no positive number.

    Example:
        ```python
        trainer = KDTrainer(student, teacher, KDConfig("out", eval_strategy="steps", save_strategy="best",
            metric_for_best_model="retention", load_best_model_at_end=True), ...)
        trainer.add_callback(RetentionCallback(trainer, [Perplexity(held_out)]))
        trainer.add_callback(EarlyStoppingCallback(3))
        ```
    """

    def __init__(
        self,
        trainer: Any,
        benchmarks: Sequence[Benchmark],
        *,
        every: int | None = None,
        teacher: PreTrainedModel | Teacher | None = None,
        baseline: Any = None,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"`every` is {every}; expected a number of optimizer steps >= 1, for example 100.")
        if not benchmarks:
            raise ValueError(
                "`benchmarks` is empty; expected at least one: `RetentionCallback(trainer, [Perplexity(dataset)])`."
            )
        self.trainer = trainer
        self.benchmarks = list(benchmarks)
        self.every = every
        self.teacher = _teacher_of(trainer) if teacher is None else teacher
        self.baseline = baseline
        self.report: RetentionReport | None = None
        self._measured: tuple[int, dict[str, float]] | None = None  # in this run: at which step, and what

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the trainer's choice of the best model finds its metric, and stand before who reads it."""
        self._check_best_metric(args)
        self._measured = None
        callbacks = self.trainer.callback_handler.callbacks
        # Behind the trainer's own first callback, which decides on evaluations, and before early stopping.
        callbacks.remove(self)
        callbacks.insert(1, self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the chosen steps; where the trainer evaluates now too, as part of that."""
        if self.every is not None and state.global_step % self.every == 0 and not control.should_evaluate:
            self._measure(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Add the results to the metrics of the trainer's evaluation."""
        if self.every is None or state.global_step % self.every == 0 or not self.trainer.is_in_train:
            metrics.update(self._measure(state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the final student, with its size and speed."""
        self._measured = None
        self._measure(state, final=True)
        self._measured = None

    def _measure(self, state: Any, *, final: bool = False) -> dict[str, float]:
        """The metrics at this step of the training, measured and logged once."""
        if self._measured is not None and self._measured[0] == state.global_step and self.trainer.is_in_train:
            return self._measured[1]
        trainer = self.trainer
        with trainer.accelerator.autocast():
            report = evaluate_retention(
                trainer.model,
                self.teacher,
                self.benchmarks,
                trainer.processing_class,
                self.baseline if final else None,
                measure_footprints=final,
            )
        # Ranks may differ in the last digit, and would disagree on when to stop.
        [self.report] = broadcast_object_list([report])
        metrics = retention_metrics(self.report)
        if hasattr(trainer, "retention_report"):
            trainer.retention_report = self.report
        self._measured = state.global_step, metrics
        # A subclass would close its own window of training metrics here, and the step's own log may still be due.
        due = trainer.control.should_log
        Trainer.log(trainer, dict(metrics))
        trainer.control.should_log = due
        return metrics

    def _check_best_metric(self, args: Any) -> None:
        best = (args.metric_for_best_model or "").removeprefix(PREFIX)
        ours = best == METRIC or best.startswith(tuple(f"{METRIC}_{item.name}" for item in self.benchmarks))
        ours = ours or best.startswith(tuple(f"student_{item.name}" for item in self.benchmarks))
        often = self.every is None or (args.eval_strategy == "steps" and args.eval_steps % self.every == 0)
        if ours and not often:
            raise ValueError(
                f"`metric_for_best_model` is {args.metric_for_best_model!r}, but with `every={self.every}` retention "
                "is not measured at every evaluation of the trainer; leave `every` out, so that it is."
            )


def retention_metrics(report: RetentionReport) -> dict[str, float]:
    """The figures of a report as a trainer logs them."""
    figures = {
        METRIC: report.mean_retention,
        f"{METRIC}_ci_low": report.mean_ci_low,
        f"{METRIC}_ci_high": report.mean_ci_high,
    }
    names = [row.benchmark for row in report.rows]
    for row in report.rows:
        # One task may be there with several metrics.
        name = row.benchmark if names.count(row.benchmark) == 1 else f"{row.benchmark}_{row.metric}"
        figures |= {f"{METRIC}_{name}": row.retention, f"student_{name}": row.student}
    return {f"{PREFIX}{name}": value for name, value in figures.items() if value is not None}


def _teacher_of(trainer: Any) -> Teacher:
    """The teacher of a trainer that distils.

    Raises:
        ValueError: It has none.
    """
    teacher = getattr(trainer, "teacher", None) or getattr(getattr(trainer, "_distillation", None), "teacher", None)
    if teacher is None:
        raise ValueError(
            f"`teacher` is None and the {type(trainer).__name__} has none; give the model that the student is "
            "compared with: `RetentionCallback(trainer, benchmarks, teacher=load_teacher(name))`."
        )
    return teacher

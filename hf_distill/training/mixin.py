"""Distillation for any `transformers.Trainer`: the same mixin over two bases makes both trainers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.anatomy import resolve_head, shape_of, task_of, unwrap
from hf_distill.evaluation import Benchmark, RetentionReport, evaluate_retention
from hf_distill.functional import LinearLossOutput, reduce_sum
from hf_distill.objectives import LogitObjective, Objective, logit_loss
from hf_distill.objectives.logits import STUDENT_MONITORS, TEACHER_MONITORS
from hf_distill.signals import (
    Projection,
    Signal,
    StudentSignals,
    Targets,
    TeacherSignals,
    Tokens,
    identity,
)
from hf_distill.taps import tap_last_hidden, tap_layers
from hf_distill.teachers import Teacher, prepare_quantized_student
from hf_distill.training.card import CardMixin
from hf_distill.training.checks import check_columns, check_parallelism, check_positions, check_teacher_argument
from hf_distill.training.gradient_shares import Losses, measure_shares, measured_shares, term_losses
from hf_distill.training.metrics import MetricWindow
from hf_distill.training.parameters import ObjectiveParametersMixin
from hf_distill.training.schedules import ScheduleCallback, scheduled_values
from hf_distill.training.teacher import build_teacher
from hf_distill.training.terms import Compared, FeatureTerms, build_objectives


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # the trainer that a subclass names beside the mixin

# Keys of a batch that are not inputs of the student.
TARGET_KEYS = ("labels", "num_items_in_batch")
TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class Distilled:
    """What one batch gave: the loss, its parts, the student's outputs, its logits before projection, and its terms."""

    loss: Tensor
    result: LinearLossOutput
    outputs: Any
    logits: Projection
    terms: Losses


class DistillationMixin(CardMixin, ObjectiveParametersMixin, Base):
    """Adds a teacher to a `transformers.Trainer`.

    The wrapped student is called as usual, once, without its vocabulary projection; the loss projects the labelled
    positions alone. The teacher runs on exactly the inputs that the student saw.

    Args:
        model: The student: a name or a model.
        args: A config with the fields of `DistillationArguments`.
        teacher_model: A name, "base", a `PreTrainedModel` or a `Teacher`; the config can name it instead.
        objectives: Replaces the terms that the config's flags build. `ce_weight` stays.
        **kwargs: Arguments of the trainer.

    Raises:
        ValueError: An argument is wrong; as much as possible is found before any weight is loaded.
    """

    # The loss is divided by `num_items_in_batch`, which already counts all micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: Any,
        *,
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        objectives: Sequence[Objective] | None = None,
        **kwargs: Any,
    ) -> None:
        teacher_source = check_teacher_argument(teacher_model, args)
        self.objectives = build_objectives(args, objectives)
        self._logit_objectives = [term for term in self.objectives if isinstance(term, LogitObjective)]
        self._features = FeatureTerms(self.objectives)
        self._objective_lr_multiplier = args.objective_lr_multiplier
        super().__init__(model=self._prepare_student(model, args), args=args, **kwargs)
        self._check_runtime()
        self.task = task_of(self.model)
        # Trainer guesses both from the model's class; here they are known.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = self.task == "causal_lm"
        prepare_quantized_student(self.model)
        self.teacher = build_teacher(
            teacher_source,
            self.model,
            self.processing_class,
            quantization=self.args.teacher_quantization,
            dtype=self.args.teacher_dtype,
        )
        self.teacher.check_objectives(self.objectives)
        if len(self._logit_objectives) < len(self.objectives):
            self._set_up_features(shape_of(self.model, "student"), self.teacher.shape())
            self.teacher.check_layers(self._features.teacher_layers)
        self.teacher.prepare(self.accelerator)
        takes_token_types = TOKEN_TYPES in inspect.signature(unwrap(self.model).forward).parameters
        self._not_for_student = TARGET_KEYS if takes_token_types else (*TARGET_KEYS, TOKEN_TYPES)
        terms = [f"{name}_loss" for name in self._term_weights()]
        monitors = [*STUDENT_MONITORS, *TEACHER_MONITORS]
        self._train_window = MetricWindow([*terms, *monitors])
        self._eval_window = MetricWindow(["loss", *terms, *monitors])
        self._schedules = ScheduleCallback(self.objectives, self.accelerator, self._train_window)
        self.add_callback(self._schedules)
        self._warned_unlabelled = False
        self._set_up_card()

    def _prepare_student(self, model: str | PreTrainedModel | nn.Module, args: Any) -> Any:
        """Make what the base trainer is given as its model; it is called when the arguments have been checked."""
        return model

    def _check_runtime(self) -> None:
        """Refuse what the base trainer allows and the distillation loss would ignore."""
        check_parallelism(self)
        check_positions(self.model)
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` would be ignored; express it as an objective in `objectives=[...]`.")
        problem = getattr(unwrap(self.model).config, "problem_type", None)
        if problem not in (None, "single_label_classification"):
            raise ValueError(
                f"The student has problem_type={problem!r}; distillation compares distributions over classes: set "
                "`model.config.problem_type = 'single_label_classification'`, with one class id per row in `labels`."
            )

    def _term_weights(self) -> dict[str, float]:
        """The weight of every term of the loss by name, cross-entropy first."""
        weights = {"ce": self.args.ce_weight} if self.args.ce_weight > 0 else {}
        logits = {objective.divergence: objective.weight for objective in self._logit_objectives}
        return weights | logits | self._features.weights

    def _distill(self, model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Distilled:
        """Run teacher and student on one batch and compute the loss."""
        if inputs.get("labels") is None:
            raise ValueError(
                f"The batch has {sorted(inputs)} and no `labels`; use a collator that makes them, e.g. "
                "`DataCollatorForLanguageModeling(tokenizer, mlm=False)`, or add a `labels` column."
            )
        targets = Targets.from_labels(inputs["labels"], shift=self.task == "causal_lm")
        self._warn_if_unlabelled(targets)
        tokens = self._features.tokens(targets, inputs, per_row=self.task == "sequence_classification")
        # The teacher comes first, so that its activations are gone when the student's graph is built.
        teacher, theirs = self._teacher_signals(inputs, targets, tokens, training=model.training)
        with tap_layers(model, self._features.student_layers) as tap:
            outputs, logits = self._student_forward(model, inputs)
        student = StudentSignals(
            logits.at(targets.index), targets.labels, tap.hidden, attention=tap.attention, final_norm=tap.final_norm
        )
        compared = {choice: (student.at(kept), theirs[choice]) for choice, kept in tokens.items()}
        with self.accelerator.autocast():
            result = logit_loss(self._logit_objectives, self.args.ce_weight, student, teacher, denominator=num_items)
        result = self._add_features(result, compared, num_items)
        loss = result.loss + self._router_loss(outputs, result.count, num_items)
        options = {"denominator": num_items, "ce_weight": self.args.ce_weight}
        arguments = self._logit_objectives, self._features, student, teacher, compared
        terms = partial(term_losses, *arguments, **options)
        return Distilled(loss, result, outputs, logits, terms)

    def _add_features(
        self, result: LinearLossOutput, compared: Compared, num_items: Tensor | int | None
    ) -> LinearLossOutput:
        """Add the terms that look inside both models."""
        loss, parts = result.loss, dict(result.parts)
        for name, total in self._feature_sums(compared).items():
            loss = loss + self._features.weights[name] * reduce_sum(total, num_items, result.count)
            parts[name] = total.detach()
        return replace(result, loss=loss, parts=parts)

    def _router_loss(self, outputs: Any, count: Tensor, num_items: Tensor | int | None) -> Tensor | float:
        """The load-balancing loss of a mixture of experts whose config sets `output_router_logits`.

        The model adds it only to a loss that it computes itself. Micro-batches count by their labelled tokens.
        """
        value = getattr(outputs, "aux_loss", None)
        if value is None:
            return 0.0
        share = 1.0 if num_items is None else count / num_items
        return unwrap(self.model).config.get_text_config().router_aux_loss_coef * value * share

    def _warn_if_unlabelled(self, targets: Targets) -> None:
        if len(targets) == 0 and not self._warned_unlabelled:
            self._warned_unlabelled = True
            warnings.warn(
                "A batch has no labelled token (every label is -100): its loss is 0. If this is every batch, look at "
                "the prompt mask and at `max_length`, which may cut the answers off.",
                stacklevel=2,
            )

    def _student_forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Projection]:
        """Call the (wrapped) student and return its outputs and its logits before projection."""
        features = {key: value for key, value in inputs.items() if key not in self._not_for_student}
        if self.task == "sequence_classification":
            outputs = model(**features)
            return outputs, Projection(outputs.logits, identity)
        if self.task == "causal_lm":
            features["use_cache"] = False
        with tap_last_hidden(model) as tap:
            outputs = model(**features)
        return outputs, Projection(tap.hidden, resolve_head(model))

    def _teacher_signals(
        self, inputs: Mapping[str, Any], targets: Targets, tokens: Mapping[str, Tokens], training: bool
    ) -> tuple[TeacherSignals | None, Mapping[str, TeacherSignals]]:
        """Run the teacher where an objective or, in evaluation, a monitor needs it."""
        needs = frozenset().union(*(objective.needs for objective in self.objectives))
        if not training:
            needs |= self.teacher.provides & {Signal.LOGITS}
        if not needs:
            return None, dict.fromkeys(tokens, TeacherSignals())
        return self.teacher.signals(inputs, needs, self._features.teacher_layers).at(targets, tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one micro-batch; see `transformers.Trainer.compute_loss`.

        Language models return logits with no position in them; `evaluate` builds them where `compute_metrics` asks.
        """
        distilled = self._distill(model, inputs, num_items_in_batch)
        loss = distilled.loss
        if model.training:
            sums, count = self._sums(distilled.result), distilled.result.count
            self._train_window.add(sums, count)
            self._schedules.observe(sums, count)
            measure_shares(self, distilled.terms)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The denominator counts the tokens of all ranks, and DDP averages gradients over them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, distilled.outputs) if return_outputs else loss

    def _sums(self, result: LinearLossOutput) -> dict[str, Tensor]:
        return {f"{name}_loss": value for name, value in result.parts.items()} | dict(result.metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Evaluate one batch. Full logits are built only when `compute_metrics` needs them."""
        inputs = self._mask_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad():
            distilled = self._distill(model, inputs, None)
            result, weights = distilled.result, self._term_weights()
            total = sum(weights[name] * value for name, value in result.parts.items())
            self._eval_window.add(self._sums(result) | {"loss": total}, result.count)
            if prediction_loss_only:
                return distilled.loss, None, None
            with self.accelerator.autocast():
                logits = distilled.logits.head(distilled.logits.hidden)
        return distilled.loss, logits.detach(), inputs["labels"]

    def _mask_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Ignore the rows that Accelerate repeats to fill the last batch of every rank.

        They are the rows that `gather_for_metrics` cuts off, but sums over tokens are taken before any gathering.
        """
        state = self.accelerator.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0 and self.accelerator.num_processes > 1):
            return inputs
        labels = inputs["labels"].clone()
        if "position_ids" in inputs and "attention_mask" not in inputs:
            # A padding-free batch: its rows are documents that follow each other.
            row = (inputs["position_ids"] == 0).cumsum(-1) - 1
            rows = int(row.max()) + 1
        else:
            rows = labels.shape[0]
            row = torch.arange(rows, device=labels.device).view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
        labels[row + self.accelerator.process_index * rows >= state.remainder] = -100
        return {**inputs, "labels": labels}

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Run the base loop and put token-weighted means, over all ranks, in place of its mean of batch means."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._eval_window.reset()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        means = self._eval_window.reduce(self.accelerator)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the training window to the step logs."""
        if "loss" in logs:
            logs |= self._train_window.reduce(self.accelerator) | scheduled_values(self.objectives)
            logs |= measured_shares(self)
        super().log(logs, start_time)

    def evaluate_retention(self, benchmarks: Sequence[Benchmark], baseline: Any = None) -> RetentionReport:
        """Measure how much of the teacher the student keeps; the report goes into the model card.

        Args:
            benchmarks: For example `[Perplexity(held_out), KLDivergence(held_out)]`.
            baseline: Another model to report beside the student, for example the student before distillation, or
                several by name.
        """
        self.retention_report = evaluate_retention(
            self.model, self.teacher, benchmarks, self.processing_class, baseline
        )
        return self.retention_report

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teacher.reads_token_types and TOKEN_TYPES not in self._signature_columns:
            self._signature_columns.append(TOKEN_TYPES)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            check_columns(dataset, self._signature_columns, description or "given")
        return super()._remove_unused_columns(dataset, description)

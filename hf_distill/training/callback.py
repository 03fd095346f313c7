"""`DistillationCallback`: distillation for a trainer that the user already has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_distill.anatomy import resolve_head, shape_of, task_of
from hf_distill.functional import reduce_sum
from hf_distill.objectives import LogitObjective, Objective, logit_loss
from hf_distill.objectives.base import check_weight
from hf_distill.objectives.logits import STUDENT_MONITORS, TEACHER_MONITORS
from hf_distill.signals import AttentionStates, Norm, Projection, Signal, StudentSignals, Targets, identity
from hf_distill.taps import tap_head_input, tap_layers
from hf_distill.teachers import Teacher, prepare_quantized_student
from hf_distill.training.card import CardMixin
from hf_distill.training.checks import check_parallelism, check_positions, check_teacher_type
from hf_distill.training.gradient_shares import measure_shares, measured_shares, term_losses
from hf_distill.training.metrics import MetricWindow
from hf_distill.training.parameters import ObjectiveParametersMixin
from hf_distill.training.schedules import ScheduleCallback, scheduled_values
from hf_distill.training.teacher import build_teacher
from hf_distill.training.terms import FeatureTerms, check_objectives


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


@dataclass
class Heard:
    """What one forward call of the student was given, and what passed inside it."""

    kwargs: dict[str, Any] | None = None
    outputs: Any = None
    head_input: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionStates] = field(default_factory=dict)
    final_norm: Norm | None = None


class DistillationCallback(TrainerCallback):
    """Adds a teacher to a trainer instance, whose own loss stays what it is.

    For `Trainer`, TRL's `SFTTrainer`, `DPOTrainer` and `RewardTrainer`, and subclasses that call the student once per
    micro-batch in `compute_loss`. The student's own forward is listened to, so it runs no second time; the teacher
    reads exactly the keyword arguments that the student was given. The terms are divided by the labelled tokens of
    all micro-batches and ranks of an optimizer step, and logged beside the trainer's own metrics; `loss` is the sum.
    Evaluation is the trainer's own; its model card is the one that `KDTrainer` writes. It stays for every run of the
    trainer, resumed ones too, until `trainer.remove_callback(DistillationCallback)`, which makes the trainer what it
    was. Where the labels are the main thing, `KDTrainer` and `KDSFTTrainer` do the same and never build the student's
    logits.

    Args:
        trainer: The trainer that it is added to.
        teacher_model: A name, a `PreTrainedModel` or a `Teacher`; "base" is a LoRA student's own base model.
        objectives: The terms; `[LogitObjective(1.0)]` when not given. All weights may be 0: then they are only logged.
        objective_lr_multiplier: Learning rate of projectors, as a multiple of the student's.

    Raises:
        ValueError: The teacher or an objective does not fit the student, or the trainer cannot be added to.

    Example:
        ```python
        trainer = DPOTrainer(model, args=args, train_dataset=preferences)
        trainer.add_callback(DistillationCallback(trainer, teacher_model=load_teacher(name)))
        trainer.train()
        ```
    """

    def __init__(
        self,
        trainer: Any,
        teacher_model: str | PreTrainedModel | Teacher,
        objectives: Sequence[Objective] | None = None,
        *,
        objective_lr_multiplier: float = 10.0,
    ) -> None:
        self.objectives = [LogitObjective(1.0)] if objectives is None else list(objectives)
        check_objectives(self.objectives)
        check_teacher_type(teacher_model)
        check_weight("objective_lr_multiplier", objective_lr_multiplier)
        if isinstance(trainer, ObjectiveParametersMixin):
            raise ValueError(
                f"`trainer` is a {type(trainer).__name__}, which has a teacher already; pass `objectives=[...]` to "
                "it, or remove the callback that it has: `trainer.remove_callback(DistillationCallback)`."
            )
        check_parallelism(trainer)
        check_positions(trainer.model)
        prepare_quantized_student(trainer.model)
        self.trainer = trainer
        self.task = task_of(trainer.model)
        self.logits = [term for term in self.objectives if isinstance(term, LogitObjective)]
        self.reads_heads = any(Signal.LOGITS in term.needs for term in self.objectives)
        tokenizer = trainer.processing_class
        self.teacher = build_teacher(teacher_model, trainer.model, tokenizer, compares_logits=self.reads_heads)
        self.teacher.check_objectives(self.objectives)
        self.features = FeatureTerms(self.objectives)
        monitors = (*STUDENT_MONITORS, *TEACHER_MONITORS) if self.logits else ()
        terms = [f"{term.divergence}_loss" for term in self.logits] + [
            f"{name}_loss" for name in self.features.weights
        ]
        self.window = MetricWindow([*terms, *monitors])
        self.labels_in_step: Tensor | None = None
        self.schedules = ScheduleCallback(self.objectives, trainer.accelerator, self.window)
        self._class = type(trainer)
        self._attach(objective_lr_multiplier)
        try:
            if self.features.weights:
                trainer._set_up_features(shape_of(trainer.model, "student"), self.teacher.shape())
                self.teacher.check_layers(self.features.teacher_layers)
            self.teacher.prepare(trainer.accelerator)
        except Exception:
            self.detach()  # a trainer whose callback failed is the trainer that it was
            raise
        trainer.add_callback(self.schedules)

    def _attach(self, objective_lr_multiplier: float) -> None:
        """Put the methods of `ListeningMixin` before the trainer's own: a checkpoint is read before any event."""
        trainer = self.trainer
        trainer._distillation, trainer._features = self, self.features
        trainer._objective_lr_multiplier = objective_lr_multiplier
        trainer.__class__ = type(self._class.__name__, (ListeningMixin, self._class), {})
        trainer._set_up_card()

    def detach(self) -> None:
        """Make the trainer what it was; removing the callback from it does that."""
        self.trainer._drop_features()
        self.trainer._drop_card()
        self.trainer.callback_handler.pop_callback(self.schedules)
        del self.trainer._distillation
        self.trainer.__class__ = self._class

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a callback that was removed: by now its parameters would be missing from optimizer and checkpoint."""
        if getattr(self.trainer, "_distillation", None) is not self:
            raise ValueError(
                "This DistillationCallback was removed from its trainer and added again; make a new one: "
                "`trainer.add_callback(DistillationCallback(trainer, teacher_model=..., objectives=[...]))`."
            )

    @contextmanager
    def listen(self, model: nn.Module) -> Iterator[Heard]:
        """Hear the one forward call with gradient that `model` gets inside the context."""
        heard = Heard()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                heard.kwargs = kwargs if not args else None

        def after(module: nn.Module, args: Any, outputs: Any) -> None:
            if torch.is_grad_enabled():
                heard.outputs = outputs

        handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
        try:
            with tap_layers(model, self.features.student_layers) as layers:
                if self.task == "sequence_classification" or not self.reads_heads:
                    yield heard
                else:
                    with tap_head_input(model) as tap:
                        yield heard
                        heard.head_input = tap.hidden if heard.kwargs else None
            if heard.kwargs is None:
                raise ValueError(
                    f"{self._class.__name__}.compute_loss does not call the student with keyword arguments, so there "
                    "is nothing to distil; use KDTrainer or KDSFTTrainer."
                )
            heard.hidden, heard.attention, heard.final_norm = layers.hidden, layers.attention, layers.final_norm
        finally:
            for handle in handles:
                handle.remove()

    def targets(self, batch: Mapping[str, Any]) -> Targets:
        """What of a batch is distilled: its labels, a preference pair's completions, or all rows of a reward model."""
        labels, mask = batch.get("labels"), batch.get("completion_mask")
        if labels is None and mask is not None:
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
        if labels is None and self.task == "sequence_classification" and "input_ids" in batch:
            labels = batch["input_ids"].new_zeros(len(batch["input_ids"]))
        if labels is None:
            raise ValueError(
                f"The batches of {self._class.__name__} hold {sorted(batch)}, which does not say what is trained; "
                "expected `labels` or `completion_mask`. Use KDTrainer or KDSFTTrainer."
            )
        return Targets.from_labels(labels, shift=self.task == "causal_lm")

    def loss(self, model: nn.Module, heard: Heard, targets: Targets, own: Tensor) -> Tensor:
        """All terms of one micro-batch, weighted, over the labelled tokens of the optimizer step.

        Args:
            model: The student.
            heard: What its forward call was given and gave.
            targets: What of it is distilled.
            own: The trainer's own loss, on the scale of the terms.
        """
        accelerator, inputs = self.trainer.accelerator, heard.kwargs or {}
        tokens = self.features.tokens(targets, inputs, per_row=self.task == "sequence_classification")
        needs = frozenset().union(*(objective.needs for objective in self.objectives))
        teacher, theirs = self.teacher.signals(inputs, needs, self.features.teacher_layers).at(targets, tokens)
        logits = self._projection(model, heard).at(targets.index)
        student = StudentSignals(
            logits, targets.labels, heard.hidden, attention=heard.attention, final_norm=heard.final_norm
        )
        compared = {choice: (student.at(kept), theirs[choice]) for choice, kept in tokens.items()}
        count = torch.tensor(len(targets), device=targets.labels.device)
        total, sums = torch.zeros((), device=count.device), {}
        if self.logits:
            with accelerator.autocast():
                result = logit_loss(self.logits, 0.0, student, teacher, denominator=self.labels_in_step)
            total = total + result.loss
            sums = {f"{name}_loss": part for name, part in result.parts.items()} | dict(result.metrics)
        for name, value in self.trainer._feature_sums(compared).items():
            total = total + self.features.weights[name] * reduce_sum(value, self.labels_in_step, count)
            sums[f"{name}_loss"] = value.detach()
        self.window.add(sums, count)
        self.schedules.observe(sums, count)
        arguments = self.logits, self.features, student, teacher, compared
        terms = partial(term_losses, *arguments, denominator=self.labels_in_step)
        measure_shares(self.trainer, lambda: chain([("own", own)], terms()))
        return total

    def _projection(self, model: nn.Module, heard: Heard) -> Projection:
        if heard.head_input is not None:
            return Projection(heard.head_input, resolve_head(model))
        if self.task == "sequence_classification":
            return Projection(heard.outputs["logits"], identity)
        # Where no logits are compared, anything with one row for each position.
        queries = [states.query.transpose(1, 2).flatten(2) for states in heard.attention.values()]
        return Projection([*heard.hidden.values(), *queries][0], identity)


class ListeningMixin(CardMixin, ObjectiveParametersMixin, Base):
    """What a trainer does while a `DistillationCallback` is added to it."""

    _distillation: DistillationCallback

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss and, in training, the terms of the callback."""
        arguments = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not model.training:
            return super().compute_loss(model, inputs, **arguments)
        targets = self._distillation.targets(inputs)
        with self._distillation.listen(model) as heard:
            result = super().compute_loss(model, inputs, **arguments)
        # The count is that of all ranks, and DDP averages gradients over them.
        scale = self.accelerator.num_processes // self.get_tp_size()
        if not self._is_scaled_for_accumulation(num_items_in_batch):
            scale *= self.current_gradient_accumulation_steps
        own = result[0] if return_outputs else result
        terms = self._distillation.loss(model, heard, targets, own / scale) * scale
        return (result[0] + terms, result[1]) if return_outputs else result + terms

    def _is_scaled_for_accumulation(self, num_items: Tensor | int | None) -> bool:
        """Whether `training_step` takes the loss as it is; otherwise it divides it by the accumulation steps."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback; without the distillation's the trainer is what it was."""
        popped = super().pop_callback(callback)
        if popped is self._distillation:
            popped.detach()
        return popped

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, as `pop_callback`."""
        was_added = self._distillation in self.callback_handler.callbacks
        super().remove_callback(callback)
        if was_added and self._distillation not in self.callback_handler.callbacks:
            self._distillation.detach()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Count the labels of an optimizer step on all ranks."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        count = sum(len(self._distillation.targets(batch)) for batch in batches)
        total = torch.tensor(count, device=self.accelerator.device)
        self._distillation.labels_in_step = self.accelerator.reduce(total, reduction="sum")
        return batches, num_items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the terms to the step logs."""
        if "loss" in logs:
            callback = self._distillation
            logs |= callback.window.reduce(self.accelerator) | scheduled_values(callback.objectives)
            logs |= measured_shares(self)
        super().log(logs, *args, **kwargs)

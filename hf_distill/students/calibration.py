"""What every measurement on calibration text needs: its tokens by sequence, a loss, and a model left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.anatomy import describe, resolve_head, task_of
from hf_distill.functional import LinearLossOutput, linear_distillation_loss
from hf_distill.signals import IGNORE_INDEX, Projection, Targets, identity, real_tokens, rows_of, sequences
from hf_distill.taps import tap_last_hidden


@dataclass(frozen=True)
class Sequences:
    """The real tokens of a batch, each with the sequence that it belongs to.

    Args:
        index: Positions in the flattened batch, `[M]` int64.
        numbers: The sequence of each, `[M]` int64, from 0.
        count: How many sequences the batch has room for; some may have no token.
    """

    index: Tensor
    numbers: Tensor
    count: int

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Sequences:
        """Find them by `attention_mask`, or by `position_ids` where documents are packed."""
        real = real_tokens(batch).bool()
        numbers, index = sequences(batch, real).flatten(), real.flatten().nonzero().squeeze(1)
        return cls(index, numbers[index], int(numbers.max()) + 1 if numbers.numel() else 0)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each sequence, `[count]` int64."""
        return torch.bincount(self.numbers, minlength=self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Add up values `[..., C]` of all positions over the tokens of each sequence: `[count, C]` fp32."""
        rows = rows_of(values, self.index).float()
        return rows.new_zeros(self.count, rows.shape[-1]).index_add_(0, self.numbers.to(rows.device), rows)


class CalibrationLoss:
    """The loss by which units are scored: cross-entropy on the labels, or forward KL from a teacher.

    It is a sum over labelled tokens, so that it is the same however sequences are put into batches.

    Args:
        model: The model that is scored.
        teacher: None takes the labels; where a causal model's batch has none, its own real tokens.

    Raises:
        ValueError: The models have different tasks.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None) -> None:
        self.task = task_of(model)
        if teacher is not None and task_of(teacher) != self.task:
            raise ValueError(
                f"`teacher` is a {task_of(teacher)} model and `model` a {self.task} model; a teacher that guides "
                "does the same task."
            )
        self._model = model
        self._teacher = teacher
        self.name = "cross-entropy" if teacher is None else "forward KL from the teacher"

    def __call__(self, batch: Mapping[str, Tensor]) -> LinearLossOutput:
        """Run the model (and the teacher before it) on one batch."""
        targets = Targets.from_labels(self._labels(batch), shift=self.task == "causal_lm")
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.task == "causal_lm":
            inputs["use_cache"] = False
        theirs: dict[str, Any] = {}
        if self._teacher is not None:
            home = describe(self._teacher).model.device
            with torch.no_grad():
                moved = {key: value.to(home) if isinstance(value, Tensor) else value for key, value in inputs.items()}
                logits = _project(self._teacher, self.task, moved).at(targets.index)
            theirs = {"teacher_hidden": logits.hidden, "teacher_head": logits.head}
        ours = _project(self._model, self.task, inputs).at(targets.index)
        term = "ce" if self._teacher is None else "forward_kl"
        return linear_distillation_loss(
            ours.hidden, ours.head, targets.labels, terms={term: 1.0}, temperature=1.0, denominator=1, **theirs
        )

    def _labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        if "labels" in batch:
            return batch["labels"]
        if self.task != "causal_lm":
            raise ValueError(
                f"`dataloader` gives batches with {sorted(batch)} and no `labels`, which the loss of a {self.task} "
                "model needs; add them, or take methods without a loss ('activation', 'block_influence')."
            )
        return batch["input_ids"].masked_fill(real_tokens(batch) == 0, IGNORE_INDEX)


def _project(model: nn.Module, task: str, inputs: Mapping[str, Any]) -> Projection:
    """Call a model once: its logits, not yet projected for language models."""
    if task == "sequence_classification":
        return Projection(model(**inputs).logits, identity)
    with tap_last_hidden(model) as tap:
        model(**inputs)
    return Projection(tap.hidden, resolve_head(model))


@contextmanager
def left_as_it_was(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode with frozen weights; modes, `requires_grad` and random states come back at the end.

    A frozen weight collects no gradient, so `.grad` stays what it is too.
    """
    modules = {module: module.training for model in models for module in model.modules()}
    parameters = [(each, each.requires_grad) for model in models for each in model.parameters()]
    devices = sorted({each.device.index or 0 for each, _ in parameters if each.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            for model in models:
                model.eval().requires_grad_(False)
            yield
    finally:
        for module, training in modules.items():
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)

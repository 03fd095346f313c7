"""One walk over calibration text that feeds every statistic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_distill.anatomy import Anatomy
from hf_distill.students.calibration import CalibrationLoss, Sequences
from hf_distill.students.statistics import Statistic
from hf_distill.taps.skipping import SkippableLayers


class LeaveOneOut:
    """The increase of a loss when one layer is left out, for each layer.

    Args:
        layers: The model's.
        loss: A sum over labels.

    Attributes:
        labels: How many it was added up over.
    """

    def __init__(self, layers: Sequence[nn.Module], loss: CalibrationLoss) -> None:
        self._layers = layers
        self._loss = loss
        self._increase = torch.zeros(len(layers))
        self.labels = 0

    def take(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model on one batch with all layers, and without each."""
        left_out: set[int] = set()
        skippable = SkippableLayers(self._layers, left_out.__contains__)
        try:
            with torch.no_grad():
                whole = self._loss(batch)
                for index in range(len(self._layers)):
                    left_out.add(index)
                    self._increase[index] += (self._loss(batch).loss - whole.loss).float().cpu()
                    left_out.clear()
        finally:
            skippable.remove()
        self.labels += int(whole.count)

    def scores(self) -> Tensor:
        """Nats per label, `[layers]`."""
        return self._increase / self.labels


class Walk:
    """What was measured on the batches of a dataloader.

    Args:
        parts: The model, in eval mode and frozen.
        statistics: By kind of unit.
        loss: Whose gradient they see; None where no statistic needs one.
        leave_one_out: None where layers are not scored so.

    Attributes:
        tokens: Real tokens that were seen.
        sequences: Sequences that had any.
        labels: Labels of the loss that gave the gradient.
        loss_sum: This loss, added up over them.
    """

    def __init__(
        self,
        parts: Anatomy,
        statistics: Sequence[Statistic],
        loss: CalibrationLoss | None = None,
        leave_one_out: LeaveOneOut | None = None,
    ) -> None:
        self._parts = parts
        self._statistics = statistics
        self._loss = loss
        self._leave_one_out = leave_one_out
        self.tokens = self.sequences = self.labels = 0
        self.loss_sum = 0.0

    def over(self, dataloader: Iterable[Mapping[str, Any]], max_tokens: int | None, show_progress: bool) -> None:
        """Take batches until the end, or until so many tokens have been seen."""
        device = self._parts.model.get_input_embeddings().weight.device
        for given in tqdm(dataloader, desc="Scoring units", leave=False, disable=None if show_progress else True):
            batch = {key: torch.as_tensor(value, device=device) for key, value in given.items()}
            found = Sequences.of(batch)
            if self._statistics:
                with self._listening(found):
                    self._run(batch)
            if self._leave_one_out is not None:
                self._leave_one_out.take(batch)
            self.tokens += len(found.index)
            self.sequences += int((found.lengths > 0).sum())
            if max_tokens is not None and self.tokens >= max_tokens:
                break

    def _run(self, batch: Mapping[str, Tensor]) -> None:
        if self._loss is None:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            if self._parts.task == "causal_lm":
                inputs["use_cache"] = False
            with torch.no_grad():
                self._parts.decoder(**inputs)
            return
        with torch.enable_grad(), _differentiable_embeddings(self._parts.model):
            output = self._loss(batch)
            output.loss.backward()
        self.labels += int(output.count)
        self.loss_sum += float(output.loss.detach())

    @contextmanager
    def _listening(self, batch: Sequences) -> Iterator[None]:
        """Let every statistic hear one pass, and take what it heard when all is well."""
        handles = []
        try:
            for statistic in self._statistics:
                statistic.begin(batch)
                handles += statistic.attach()
            yield
        finally:
            for handle in handles:
                handle.remove()
        for statistic in self._statistics:
            statistic.end()


@contextmanager
def _differentiable_embeddings(model: nn.Module) -> Iterator[None]:
    """Let a gradient come back to all layers although no weight takes one."""

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()

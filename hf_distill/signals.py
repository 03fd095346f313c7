"""What passes from models to objectives: projections, hidden states, and the one causal shift and mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor


IGNORE_INDEX = -100


class Signal(str, Enum):
    """Something that an objective can need and a teacher can provide."""

    LOGITS = "logits"
    HIDDEN_STATES = "hidden_states"


@dataclass(frozen=True)
class ModelShape:
    """What an objective is told of a model before the first step.

    Args:
        name: For messages: "student" or "teacher", and the architecture.
        num_layers: Depth.
        hidden_size: Width of the hidden states between layers.
        kept_layers: Of a student that was cut from a teacher, the teacher's layers (counted from 0) that it is made
            of; None for every other model.
        cut_from: Depth of the model that it was cut from; None for every other model.
        vocab_size: Width of the logits that its head makes of hidden states; None where it makes none, as a
            classifier, or takes another width than that of the layers.
    """

    name: str
    num_layers: int
    hidden_size: int
    kept_layers: tuple[int, ...] | None = None
    cut_from: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Projection:
    """Logits that are not built yet: `head(hidden)` gives them for any slice of rows.

    Args:
        hidden: What enters the head, `[..., H]`. For a classifier these are the logits themselves.
        head: Maps `[n, H]` to logits `[n, V]`: an `LMHead`, a module, or `identity` where `hidden` is logits already.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    def at(self, index: Tensor) -> Projection:
        """Keep the rows `index` ([N], int64) of the flattened `hidden`."""
        return replace(self, hidden=rows_of(self.hidden, index))


def identity(logits: Tensor) -> Tensor:
    """The head of a model whose output is logits already."""
    return logits


@dataclass(frozen=True)
class Targets:
    """The labelled positions of a batch: the only place where labels are shifted and masked.

    Args:
        index: Positions in the flattened batch whose output is trained, `[N]` int64.
        labels: The label at each of them, `[N]` int64, never -100.
    """

    index: Tensor
    labels: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, *, shift: bool) -> Targets:
        """Find the labelled positions.

        Args:
            labels: `[B, S]` (language models) or `[B]` (classifiers); -100 is ignored.
            shift: True for causal models, where position t is trained on the label at t + 1.
        """
        if shift:
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
        flat = labels.reshape(-1)
        index = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        return cls(index=index, labels=flat[index])

    def __len__(self) -> int:
        return self.labels.numel()


@dataclass(frozen=True)
class Tokens:
    """The positions of a batch whose hidden states are compared.

    Args:
        index: Positions in the flattened batch, `[M]` int64.
        is_first: Which of them are the first token of a sequence, `[M]` bool.
        weights: How much each counts, `[M]`; they add up to the number of labels. None: each counts once.
    """

    index: Tensor
    is_first: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(cls, targets: Targets, batch: Mapping[str, Tensor], *, per_row: bool) -> Tokens:
        """Choose the positions that go with the labels.

        Args:
            targets: The labelled positions, or rows of a classifier.
            batch: `input_ids` `[B, S]`, and `attention_mask` or `position_ids` where there are any.
            per_row: True for classifiers: every real token of a labelled row counts, all of a row together as much as
                one label.
        """
        first = _first_tokens(batch)
        if not per_row:
            return cls(targets.index, first.flatten()[targets.index])
        real = _real_tokens(batch).to(torch.bool)
        labelled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        labelled[targets.index] = True
        kept = real & labelled[:, None]
        index = kept.flatten().nonzero().squeeze(1)
        lengths = kept.sum(-1, keepdim=True).clamp(min=1).expand_as(kept)
        return cls(index, first.flatten()[index], 1 / lengths.flatten()[index].float())

    def sum(self, values: Tensor) -> Tensor:
        """Add up per-token values `[M]`."""
        return values.sum() if self.weights is None else (values * self.weights).sum()


def _real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return mask if mask is not None and mask.dim() == 2 else torch.ones_like(batch["input_ids"])


def _first_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Where sequences begin, `[B, S]` bool; packed rows say it by their positions, padded ones by their mask."""
    mask = batch.get("attention_mask")
    if batch.get("position_ids") is not None and mask is None:
        return batch["position_ids"] == 0
    real = _real_tokens(batch)
    return (real != 0) & (real.cumsum(-1) == 1)


HiddenStates = Mapping[int, Tensor]


@dataclass(frozen=True)
class StudentSignals:
    """What the student gives for one batch, already restricted to the labelled positions.

    Args:
        logits: Projection with hidden `[N, H_s]`.
        labels: `[N]` int64.
        hidden: By layer `[M, H_s]`, at `tokens`; layers count from 1, 0 is the embedding, the last is after the final
            norm (as in transformers' `hidden_states`).
        tokens: The positions of `hidden`; None where no hidden states were asked for.
    """

    logits: Projection
    labels: Tensor
    hidden: HiddenStates = field(default_factory=dict)
    tokens: Tokens | None = None


@dataclass(frozen=True)
class TeacherSignals:
    """What a teacher gives for one batch; fields that were not needed are None or empty.

    Args:
        logits: Projection with hidden `[B, S, H_t]` (language models) or `[B, C]` (classifiers).
        hidden: By layer `[B, S, H_t]`; layers count as in `StudentSignals`.
    """

    logits: Projection | None = None
    hidden: HiddenStates = field(default_factory=dict)

    def at(self, targets: Targets, tokens: Tokens | None = None) -> TeacherSignals:
        """Keep the labelled rows of the logits, and the hidden states of `tokens`."""
        hidden = {layer: rows_of(states, tokens.index) for layer, states in self.hidden.items()} if tokens else {}
        return replace(self, logits=None if self.logits is None else self.logits.at(targets.index), hidden=hidden)


def rows_of(states: Tensor, index: Tensor) -> Tensor:
    """Positions `index` ([M], int64) of states `[..., H]`, flattened to `[M, H]`."""
    return states.flatten(0, -2).index_select(0, index.to(states.device))

"""What passes from models to objectives: projections, hidden states, and the one causal shift and mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor


IGNORE_INDEX = -100


class Signal(str, Enum):
    """Something that an objective can need and a teacher can provide."""

    LOGITS = "logits"


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
        return replace(self, hidden=self.hidden.flatten(0, -2).index_select(0, index.to(self.hidden.device)))


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
class StudentSignals:
    """What the student gives for one batch, already restricted to the labelled positions.

    Args:
        logits: Projection with hidden `[N, H_s]`.
        labels: `[N]` int64.
    """

    logits: Projection
    labels: Tensor


@dataclass(frozen=True)
class TeacherSignals:
    """What a teacher gives for one batch; fields that were not needed are None.

    Args:
        logits: Projection with hidden `[B, S, H_t]` (language models) or `[B, C]` (classifiers).
    """

    logits: Projection | None = None

    def at(self, index: Tensor) -> TeacherSignals:
        """Keep the rows `index` ([N], int64) of every per-position signal."""
        return replace(self, logits=None if self.logits is None else self.logits.at(index))

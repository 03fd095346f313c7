"""Where the columns of a cache come from: a teacher on this machine, and what else gives them for rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_distill.cache.encoding import Columns, Encoding
from hf_distill.cache.rows import Row
from hf_distill.signals import Projection, Signal, TeacherSignals


class Source(Protocol):
    """Gives what is kept of rows."""

    def columns(self, rows: Sequence[Row]) -> Columns:
        """The columns of all kept tokens of the rows, row after row."""

    def shared_tensors(self, row: Row) -> dict[str, Tensor]:
        """What the encoding stores once; any row shows it."""


class SignalsTeacher(Protocol):
    """What of `hf_distill.teachers.Teacher` a source needs."""

    model: nn.Module

    def signals(self, batch: Mapping[str, Any], needs: Collection[Signal]) -> TeacherSignals:
        """What the teacher says of a batch."""


class LocalSource:
    """Runs a teacher.

    Args:
        teacher: Of a causal language model, placed.
        encoding: What to keep of it.
    """

    def __init__(self, teacher: SignalsTeacher, encoding: Encoding) -> None:
        self._teacher = teacher
        self._encoding = encoding

    def columns(self, rows: Sequence[Row]) -> Columns:
        """See `Source`. Rows are padded to the longest, which changes their numbers by no more than rounding.

        Raises:
            ValueError: The teacher gives something else than numbers.
        """
        output = self.run(rows)
        labels = torch.from_numpy(np.concatenate([row.labels for row in rows]).astype(np.int64))
        uniforms = torch.from_numpy(np.concatenate([uniforms_of(row) for row in rows]))
        columns = self._encoding.observe(output, labels, uniforms if self._encoding.samples else None)
        _check_numbers(rows, output.hidden, columns)
        return columns

    def shared_tensors(self, row: Row) -> dict[str, Tensor]:
        """See `Source`."""
        return self._encoding.shared_tensors(self.run([row]))

    def run(self, rows: Sequence[Row]) -> Projection:
        """The teacher's output at the kept positions of rows, row after row."""
        longest = max(len(row.ids) for row in rows)
        ids, mask = (
            torch.zeros(len(rows), longest, dtype=torch.int64),
            torch.zeros(len(rows), longest, dtype=torch.int64),
        )
        kept = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
            mask[number, : len(row.ids)] = 1
            kept[number, : len(row.kept)] = torch.from_numpy(row.kept)
        device = next(self._teacher.model.parameters()).device
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        output = self._teacher.signals(batch, {Signal.LOGITS}).logits
        assert isinstance(output, Projection)
        return output.at(kept.flatten().nonzero().squeeze(1))


def _check_numbers(rows: Sequence[Row], hidden: Tensor, columns: Columns) -> None:
    """Check that hidden states, or logits, `[N, H]` and what was made of them are numbers."""
    broken = (~(hidden < math.inf)).any(1).cpu()  # also nan; the logit of an impossible token is -inf
    for column in columns.values():
        if column.is_floating_point():
            broken |= column.isnan().reshape(len(broken), column[:1].numel()).any(1)
    if broken.any():
        token = int(broken.nonzero()[0])
        ends = np.cumsum([row.kept.sum() for row in rows])
        row = rows[int(np.searchsorted(ends, token, side="right"))]
        position = np.flatnonzero(row.kept)[token - int(ends[ends <= token].max(initial=0))]
        raise ValueError(
            f"The teacher gives nan or inf after token {position} of the {row.description}, and a student would learn "
            "from it. Load it in another precision, e.g. `load_teacher(name, dtype=torch.bfloat16)` where float16 "
            "overflows, check its quantisation, or take the row out of the dataset."
        )


def uniforms_of(row: Row) -> np.ndarray:
    """A number in [0, 1) for each kept token: decided by the row and the position, by no batch, rank or machine."""
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(row.key, "little")))
    return generator.random(len(row.kept))[row.kept]

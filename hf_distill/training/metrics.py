"""Token-weighted sums of what one logging window saw, reduced over ranks when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricWindow:
    """Sums per labelled token, kept on the device so that no step waits for a copy.

    Args:
        names: What is summed. It is the same on every rank, whatever batches a rank saw, so the reduction never hangs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, sums: Mapping[str, Tensor], count: Tensor) -> None:
        """Add the sums of one batch, scalars by name, and its number of labelled tokens.

        A name that this batch does not have (the teacher's, where no teacher ran) keeps its sum and its count.
        """
        dtype = torch.float32 if count.device.type == "mps" else torch.float64
        values = torch.stack(
            [sums[name].to(dtype) if name in sums else count.new_zeros((), dtype=dtype) for name in self.names]
        )
        present = torch.tensor([name in sums for name in self.names], dtype=dtype, device=count.device)
        counts = present * count.to(dtype)
        self._sums = values if self._sums is None else self._sums + values
        self._counts = counts if self._counts is None else self._counts + counts

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the mean per labelled token of everything that was seen on any rank, and start a new window."""
        if self._sums is None or self._counts is None:
            zeros = torch.zeros(len(self.names), dtype=torch.float64, device=accelerator.device)
            self._sums, self._counts = zeros, zeros
        both = accelerator.reduce(torch.stack([self._sums, self._counts]), reduction="sum")
        self.reset()
        sums, counts = both.tolist()
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count > 0}

    def reset(self) -> None:
        """Forget what was added."""
        self._sums = self._counts = None

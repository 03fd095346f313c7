"""Both distributions of a tile from logits over the vocabulary: the softmax in place, and the teacher's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_distill.functional.closed_forms import Tile
from hf_distill.functional.softmax import Softmax


# Gives the buffer of a name, with this many rows and columns.
Buffer = Callable[[str, int, int], Tensor]


def likelihood(side: str, of: Softmax, metrics: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
    """The likelihood over the whole width, and the entropy where asked for, `[n]` by name."""
    values = {f"{side}_nll": -of.log_prob(labels).squeeze(1)}
    if f"{side}_entropy" in metrics:
        values[f"{side}_entropy"] = of.entropy
    return values


def at_temperature_(logits: Tensor, at_one: Softmax | None, temperature: float, buffer: Buffer, name: str) -> Softmax:
    """The distribution of `logits` `[n, V]` at a temperature, in place and in the buffer of a name.

    `at_one` is that at T = 1 over a width that may be greater, whose logits are those; it is taken where it fits.
    """
    if at_one is None or at_one.shape != logits.shape:
        scaled = logits.mul_(1 / temperature) if temperature != 1.0 else logits
        return Softmax(scaled, buffer(name, *logits.shape), products=buffer("products", *logits.shape))
    return at_one if temperature == 1.0 else at_one.at_(temperature, buffer(name, *logits.shape))


def first_max(values: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """`values.max(-1, keepdim=True)` and its first index, `[n, 1]` each, for `[n, V]`.

    By blocks of columns: many times faster than `max` on a CPU, where only amax is vectorised.
    """
    width = values.shape[1]
    whole = width - width % block
    if whole == 0:
        return values.max(-1, keepdim=True)
    best, where = values[:, :whole].unflatten(1, (-1, block)).amax(-1).max(-1, keepdim=True)
    start = where * block
    index = start + values.gather(1, start + torch.arange(block, device=values.device)).argmax(-1, keepdim=True)
    if whole < width:
        rest, rest_where = values[:, whole:].max(-1, keepdim=True)
        index = torch.where(rest > best, whole + rest_where, index)
        best = torch.maximum(best, rest)
    return best, index


def first_max_of_shared(logits: Tensor, shared: int) -> tuple[Tensor, Tensor | None]:
    """The first index of the greatest of the shared logits, `[n]`, and its value `[n, 1]` where all are shared."""
    best, index = first_max(logits[:, :shared])
    return index.squeeze(1), best if logits.shape[1] == shared else None


class DenseBlock:
    """The teacher's side of a block of rows.

    Args:
        logits: `[n, V_t]`, overwritten.
        shared: How many tokens of the vocabulary student and teacher share.
        buffer: Gives the buffer of a name, with this many rows and columns.
    """

    def __init__(self, logits: Tensor, shared: int, buffer: Buffer) -> None:
        self._logits = logits
        self._shared = logits[:, :shared]
        self._buffer = buffer
        self._at_one: Softmax | None = None
        self._top: Tensor | None = None

    def top(self) -> Tensor:
        """The most likely token `[n]`."""
        index, self._top = first_max_of_shared(self._logits, self._shared.shape[1])
        return index

    def metrics(self, names: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """What does not depend on the student, `[n]` by name."""
        if not {"teacher_nll", "teacher_entropy"} & set(names):
            return {}
        probs, products = (self._buffer(name, *self._logits.shape) for name in ("teacher_probs", "products"))
        self._at_one = Softmax(self._logits, probs, self._top, products=products)
        return likelihood("teacher", self._at_one, names, labels)

    def compare(self, student: Softmax, temperature: float) -> Tile:
        """Both distributions at a temperature; the student's is `[n, V]` over the shared vocabulary."""
        teacher = at_temperature_(self._shared, self._at_one, temperature, self._buffer, "p")
        return Tile(student, teacher, spare=lambda name: self._buffer(name, *student.shape))

"""Both distributions of a tile from logits over the vocabulary: the softmax in place, and the teacher's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_distill.functional.closed_forms import Tile


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the softmax and of all sums: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise_(logits: Tensor, probs: Tensor, top: Tensor | None = None) -> None:
    """Turn finite `logits` `[n, V]` into log-probabilities in place and write the probabilities to `probs`.

    A few light passes: half the time of torch.log_softmax and exp on a CPU. `top` is the greatest logit of each row,
    `[n, 1]`, where it is known.
    """
    normalise_shifted_(logits.sub_(logits.amax(-1, keepdim=True) if top is None else top), probs)


def normalise_shifted_(logits: Tensor, probs: Tensor) -> None:
    """As `normalise_`, for logits whose exponentials can be added up as they are."""
    torch.exp(logits, out=probs)
    total = probs.sum(-1, keepdim=True)
    probs.div_(total)
    logits.sub_(total.log_())


def normalise_at_one_(
    side: str, logits: Tensor, probs: Tensor, metrics: Sequence[str], labels: Tensor, top: Tensor | None
) -> dict[str, Tensor]:
    """Normalise over the whole width; returns the likelihood, and the entropy where asked for, `[n]` by name.

    `top` is the greatest logit of each row, where it is known.
    """
    normalise_(logits, probs, top)
    values = {f"{side}_nll": -logits.gather(1, labels).squeeze(1)}
    if f"{side}_entropy" in metrics:
        values[f"{side}_entropy"] = -torch.linalg.vecdot(probs, logits)
    return values


def softmax_(
    logits: Tensor, probs: Tensor | None, temperature: float, buffer: Callable[[int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, in place of `logits` `[n, V]`, and probabilities at a temperature.

    `probs` are those at T = 1 over a width that may be greater, and are taken where they fit, with `logits` then being
    log-probabilities already.
    """
    normalised = probs is not None and probs.shape == logits.shape
    if probs is None or not normalised or temperature != 1.0:
        if temperature != 1.0:
            logits.mul_(1 / temperature)
        probs = buffer(*logits.shape)
        # Log-probabilities over T >= 1 have exponentials that add up to between 1 and V.
        normalise = normalise_shifted_ if normalised and temperature >= 1.0 else normalise_
        normalise(logits, probs)
    return logits, probs


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
        logits: `[n, V_t]`, overwritten by log-probabilities.
        shared: How many tokens of the vocabulary student and teacher share.
        buffer: Gives the buffer of a name, with this many rows and columns.
    """

    def __init__(self, logits: Tensor, shared: int, buffer: Callable[[str, int, int], Tensor]) -> None:
        self._logits = logits
        self._shared = logits[:, :shared]
        self._buffer = buffer
        self._probs: Tensor | None = None
        self._top: Tensor | None = None

    def top(self) -> Tensor:
        """The most likely token `[n]`."""
        index, self._top = first_max_of_shared(self._logits, self._shared.shape[1])
        return index

    def metrics(self, names: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """What does not depend on the student, `[n]` by name."""
        if not {"teacher_nll", "teacher_entropy"} & set(names):
            return {}
        self._probs = self._buffer("teacher_probs", *self._logits.shape)
        return normalise_at_one_("teacher", self._logits, self._probs, names, labels, self._top)

    def compare(self, log_q: Tensor, q: Tensor, temperature: float) -> Tile:
        """Both distributions at a temperature; the student's is `[n, V]` over the shared vocabulary."""
        log_p, p = softmax_(self._shared, self._probs, temperature, partial(self._buffer, "p"))
        return Tile(log_q, q, log_p, p, spare=lambda name: self._buffer(name, *q.shape))

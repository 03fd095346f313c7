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


def normalise_(logits: Tensor, probs: Tensor) -> None:
    """Turn `logits` `[n, V]` into log-probabilities in place and write the probabilities to `probs`.

    Four light passes: half the time of torch.log_softmax and exp on a CPU. Log-probabilities of -inf become the
    smallest finite number, so that 0 * log 0 = 0 holds by itself in everything that follows.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    torch.exp(logits, out=probs)
    total = probs.sum(-1, keepdim=True)
    probs.div_(total)
    logits.sub_(total.log_()).clamp_(min=torch.finfo(logits.dtype).min)


def normalise_at_one_(
    side: str, logits: Tensor, probs: Tensor, metrics: Sequence[str], labels: Tensor
) -> dict[str, Tensor]:
    """Normalise over the whole width; returns the likelihood, and the entropy where asked for, `[n]` by name."""
    normalise_(logits, probs)
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
    if probs is None or temperature != 1.0 or probs.shape != logits.shape:
        if temperature != 1.0:
            logits.mul_(1 / temperature)
        probs = buffer(*logits.shape)
        normalise_(logits, probs)
    return logits, probs


def first_argmax(values: Tensor, block: int = 256) -> Tensor:
    """`values.argmax(-1)` for `[n, V]`, by blocks of columns: many times faster on a CPU, where amax is vectorised."""
    width = values.shape[1]
    whole = width - width % block
    if whole == 0:
        return values.argmax(-1)
    tops = values[:, :whole].unflatten(1, (-1, block)).amax(-1)
    best, where = tops.max(-1)
    start = where * block
    inside = values.gather(1, start[:, None] + torch.arange(block, device=values.device)).argmax(-1)
    if whole == width:
        return start + inside
    rest, rest_where = values[:, whole:].max(-1)
    return torch.where(rest > best, whole + rest_where, start + inside)


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

    def top(self) -> Tensor:
        """The most likely token `[n]`."""
        return first_argmax(self._shared)

    def metrics(self, names: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """What does not depend on the student, `[n]` by name."""
        if not {"teacher_nll", "teacher_entropy"} & set(names):
            return {}
        self._probs = self._buffer("teacher_probs", *self._logits.shape)
        return normalise_at_one_("teacher", self._logits, self._probs, names, labels)

    def compare(self, log_q: Tensor, q: Tensor, temperature: float) -> Tile:
        """Both distributions at a temperature; the student's is `[n, V]` over the shared vocabulary."""
        log_p, p = softmax_(self._shared, self._probs, temperature, partial(self._buffer, "p"))
        return Tile(log_q, q, log_p, p, spare=lambda name: self._buffer(name, *q.shape))

"""What encodings want to know of a teacher's distributions, in a few passes over blocks of its logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.functional.fused import chunk_rows, vocabulary_of
from hf_distill.functional.head import LMHead
from hf_distill.functional.softmax import statistics_dtype
from hf_distill.signals import Projection


# Budget for the products of a chunk of rows: on a CPU the blocks find them in the last cache.
_CPU_CHUNK_BYTES = 24 * 2**20
# Elements of one buffer of a block of rows.
_CPU_BLOCK = 2**20
_DEVICE_BLOCK = 2**24
# Rows of the table that a vocabulary is seen as; its columns are looked into one by one.
_DEPTH = 32
# Stands for the logit of an impossible token, whose probability is 0.
_IMPOSSIBLE = -1e30


@dataclass(frozen=True)
class Spread:
    """The distributions of a block of rows at one temperature.

    Args:
        probs: `[n, V']`; the next spread of the block overwrites them.
        log_total: `logsumexp(logits / T)`, `[n]`.
        entropy: In nats, `[n]`; None where it was not asked for.
    """

    probs: Tensor
    log_total: Tensor
    entropy: Tensor | None

    def take_out_(self, ids: Tensor) -> Tensor:
        """Make the probabilities of ids `[n, K]` 0, and return what the others add up to, `[n]`.

        It is summed: 1 less those of the ids would be rounding where it is small.
        """
        return self.probs.scatter_(1, ids, 0.0).sum(1)


@dataclass(frozen=True)
class Block:
    """A block of rows of a teacher's logits.

    Args:
        part: Which rows.
        logits: `[n, V']`, with impossible tokens behind the vocabulary.
        spare: As `logits`, overwritten.
    """

    part: slice
    logits: Tensor
    spare: Tensor

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest logits `[n, count]`, sorted, and their ids: those of torch.topk, but for equal ones.

        They are in the columns of a table with the greatest maxima: a column without one of the `count` greatest
        maxima has `count` logits above it elsewhere. Only maxima over many logits at once are fast on a CPU.
        """
        tops = self.logits.unflatten(1, (_DEPTH, -1)).amax(1)
        width = tops.shape[1]
        columns = tops.topk(min(count, width), sorted=False).indices
        ids = (columns[:, None] + width * torch.arange(_DEPTH, device=columns.device)[:, None]).flatten(1)
        values, where = self.logits.gather(1, ids).topk(count)
        return values, ids.gather(1, where)

    def spread(self, temperature: float, *, entropy: bool, likeliest: Tensor | None = None) -> Spread:
        """The distributions at a temperature.

        Args:
            temperature: T.
            entropy: Whether it is asked for.
            likeliest: The most likely token of each row, `[n, 1]`, where it is known, which saves two passes.
        """
        scaled = self.logits
        if temperature != 1.0:
            scaled = torch.mul(self.logits, 1 / temperature, out=self.spare)
        probs = torch.softmax(scaled, 1, out=self.spare)  # in half the time of exp on a CPU
        if likeliest is None:
            highest = self.logits.amax(1), probs.amax(1)
        else:
            highest = self.logits.gather(1, likeliest)[:, 0], probs.gather(1, likeliest)[:, 0]
        log_total = highest[0] / temperature - highest[1].log()
        if not entropy:
            return Spread(probs, log_total, None)
        return Spread(probs, log_total, log_total - torch.linalg.vecdot(probs, self.logits) / temperature)


def blocks(output: Projection) -> Iterator[Block]:
    """All rows of a teacher's output, block by block, at least one; the next block overwrites the last.

    A plain head's scale and softcap are applied in the precision of the statistics, as in the fused loss.
    """
    hidden, head = output.hidden, output.head
    plain = head if isinstance(head, LMHead) else None
    budget = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else None
    row_bytes = vocabulary_of(head, hidden) * hidden.element_size()
    rows = chunk_rows(len(hidden), row_bytes, budget, trained_head=False)
    buffers: tuple[Tensor, Tensor] | None = None
    for start in range(0, max(len(hidden), 1), rows):
        chunk = hidden[start : start + rows]
        products = head(chunk) if plain is None else _products(chunk, plain)
        buffers = buffers or _buffers(products)
        size = len(buffers[0])
        for first in range(0, max(len(chunk), 1), size):
            piece = products[first : first + size]
            at = start + first
            yield _block(slice(at, at + len(piece)), piece, plain, buffers)


def _products(hidden: Tensor, head: LMHead) -> Tensor:
    return F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)


def _buffers(products: Tensor) -> tuple[Tensor, Tensor]:
    width = -(-products.shape[1] // _DEPTH) * _DEPTH
    size = _CPU_BLOCK if products.device.type == "cpu" else _DEVICE_BLOCK
    shape = max(size // width, 1), width
    dtype = statistics_dtype(products.dtype)
    return products.new_empty(shape, dtype=dtype), products.new_empty(shape, dtype=dtype)


def _block(part: slice, products: Tensor, head: LMHead | None, buffers: tuple[Tensor, Tensor]) -> Block:
    logits, spare = (buffer[: len(products)] for buffer in buffers)
    inside = logits[:, : products.shape[1]]
    inside.copy_(products)
    logits[:, products.shape[1] :] = _IMPOSSIBLE
    if head is not None:
        head.finish_(inside)
    if head is None or head.bias is not None:  # products of finite weights are finite
        inside.clamp_(min=_IMPOSSIBLE)
    return Block(part, logits, spare)


def log_masses(sums: list[Tensor]) -> Tensor:
    """Logarithms of some masses `[n]`, side by side; those too small for single precision are its smallest number.

    A mass of 0 would make any probability that a student gives there infinitely wrong.
    """
    return torch.stack(sums, 1).float().clamp(min=torch.finfo(torch.float32).tiny).log()


def log_probs_of(values: Tensor, log_total: Tensor) -> Tensor:
    """Log-probabilities of logits `[n, K]` in the precision of a cache; -inf where they are impossible."""
    log_probs = (values - log_total[:, None]).float()
    return log_probs.masked_fill_(values <= _IMPOSSIBLE / 2, -torch.inf)

"""What encodings want to know of a teacher's distributions, in a few passes over its logits.

A vocabulary is seen as a table of 32 rows. What is read of all logits are the greatest of each column and, at each
temperature, its mass: the most likely tokens, draws and what is left beside them need no more than the logits of a few
columns. So only that much is done tile by tile, in the processor's caches, and all else for many rows at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from hf_distill.cache.draw import draw
from hf_distill.cache.tiles import DEPTH, IMPOSSIBLE, OUTSIDE, Spread, Tiles, finished_
from hf_distill.functional.fused import chunk_rows, vocabulary_of
from hf_distill.functional.head import LMHead
from hf_distill.signals import Projection


# Budget for the products of a block of rows.
_CPU_BLOCK_BYTES = 24 * 2**20


@dataclass(frozen=True)
class Block:
    """A block of rows of a teacher's logits.

    Args:
        part: Which rows.
        products: What the head made of them, `[n, V]`.
        head: What makes logits of these; None where they are.
        tops: The greatest logit of each column of the table, `[n, W]`.
        spreads: By temperature.
    """

    part: slice
    products: Tensor
    head: LMHead | None
    tops: Tensor
    spreads: dict[float, Spread]

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of some ids `[n, K]`; those of ids behind the vocabulary are below all."""
        width = self.products.shape[1]
        outside = None if self.tops.shape[1] * DEPTH == width else ids >= width
        products = self.products.gather(1, ids if outside is None else ids.clamp(max=width - 1))
        logits = finished_(products.to(self.tops.dtype), self.head)
        return logits if outside is None else logits.masked_fill_(outside, OUTSIDE)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest logits `[n, count]`, sorted, and their ids: those of torch.topk, but for equal ones.

        They are in the columns with the greatest maxima: a column without one of the `count` greatest maxima has
        `count` logits above it elsewhere.
        """
        columns = self.tops.topk(min(count, self.tops.shape[1]), sorted=False).indices
        ids = self._ids(columns).flatten(1)
        values, where = self.logits(ids).topk(count)
        return values, ids.gather(1, where)

    def take_out_(self, ids: Tensor) -> list[Tensor]:
        """Make ids `[n, K]` impossible, and return what all others add up to at each temperature, `[n]`.

        It is summed: 1 less those of the ids would be rounding where it is small.
        """
        rows = torch.arange(len(ids), device=ids.device)
        self.products[rows[:, None], ids] = -torch.inf  # scatter_ is slow in 16 bits on a CPU
        columns = ids % self.tops.shape[1]
        logits = self._column_logits(columns)
        for spread in self.spreads.values():
            spread.masses.scatter_(1, columns, spread.probs(logits).sum(2))
        return [spread.masses.sum(1) for spread in self.spreads.values()]

    def draw(self, uniforms: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Draw tokens in proportion to the sum of their probabilities at all temperatures; see `draw.draw`."""

        def inside(columns: Tensor) -> Tensor:
            logits = self._column_logits(columns)
            return reduce(torch.add, [spread.probs(logits) for spread in spreads])

        spreads = self.spreads.values()
        return draw(reduce(torch.add, [spread.masses for spread in spreads]), inside, uniforms, draws)

    def _ids(self, columns: Tensor) -> Tensor:
        """The ids in some columns `[n, C]` of the table, `[n, C, 32]`."""
        return columns[:, :, None] + self.tops.shape[1] * torch.arange(DEPTH, device=columns.device)

    def _column_logits(self, columns: Tensor) -> Tensor:
        return self.logits(self._ids(columns).flatten(1)).unflatten(1, (-1, DEPTH))


def blocks(output: Projection, temperatures: Sequence[float], entropies: Collection[float]) -> Iterator[Block]:
    """All rows of a teacher's output, block by block, at least one; each is overwritten by the next.

    A plain head's scale and softcap are applied in the precision of the statistics, as in the fused loss.

    Args:
        output: What enters the teacher's head, and the head.
        temperatures: Of the spreads.
        entropies: Those of them at which the entropy is asked for.
    """
    hidden, head = output.hidden, output.head
    plain = head if isinstance(head, LMHead) else None
    budget = _CPU_BLOCK_BYTES if hidden.device.type == "cpu" else None
    vocab_size = vocabulary_of(head, hidden)
    rows = chunk_rows(len(hidden), vocab_size * hidden.element_size(), budget, trained_head=False)
    buffer = None if plain is None else plain.weight.new_empty(rows, vocab_size)
    tiles: Tiles | None = None
    for start in range(0, max(len(hidden), 1), rows):
        chunk = hidden[start : start + rows]
        if plain is None or buffer is None:
            products = _own(head(chunk), chunk)
        else:
            products = plain.project_into(chunk.to(plain.weight.dtype), buffer[: len(chunk)])
        tiles = tiles or Tiles(products, plain, temperatures, entropies)
        yield Block(slice(start, start + len(chunk)), products, plain, *tiles(products))


def _own(products: Tensor, hidden: Tensor) -> Tensor:
    """Products that may be overwritten: a head that gives back what it was given must not lead to the teacher's."""
    shared = products.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
    return products.clone() if shared else products


def log_masses(sums: list[Tensor]) -> Tensor:
    """Logarithms of some masses `[n]`, side by side; those too small for single precision are its smallest number.

    A mass of 0 would make any probability that a student gives there infinitely wrong.
    """
    return torch.stack(sums, 1).float().clamp(min=torch.finfo(torch.float32).tiny).log()


def log_probs_of(values: Tensor, log_total: Tensor) -> Tensor:
    """Log-probabilities of logits `[n, K]` in the precision of a cache; -inf where they are impossible."""
    log_probs = (values - log_total[:, None]).float()
    return log_probs.masked_fill_(values <= IMPOSSIBLE / 2, -torch.inf)

"""What encodings want to know of a teacher's distributions, in a few passes over its logits.

A vocabulary is seen as a table of 32 rows. What is read of all logits are the greatest of each column and, at each
temperature, its mass: the most likely tokens, draws and what is left beside them need no more than the logits of a few
columns. So only that much is done tile by tile, in the processor's caches, and all else for many rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.cache.draw import draw
from hf_distill.functional.fused import chunk_rows, vocabulary_of
from hf_distill.functional.head import LMHead
from hf_distill.functional.softmax import row_dots, statistics_dtype
from hf_distill.signals import Projection


# Budget for the products of a block of rows.
_CPU_BLOCK_BYTES = 24 * 2**20
# Elements of one of the two buffers of a tile.
_CPU_TILE = 2**19
_DEVICE_TILE = 2**24
# Rows of the table that a vocabulary is seen as.
_DEPTH = 32
# Stands for the logit of an impossible token, whose probability is 0.
_IMPOSSIBLE = -1e30
# Stands behind the vocabulary, where its table is not full: below all others, so that it is never among the greatest.
_OUTSIDE = -2e30


@dataclass(frozen=True)
class Spread:
    """The distributions of a block of rows at one temperature.

    Args:
        temperature: T.
        masses: What the probabilities of each column of the table add up to, `[n, W]`.
        log_total: `logsumexp(logits / T)`, `[n]`.
        entropy: In nats, `[n]`; None where it was not asked for.
    """

    temperature: float
    masses: Tensor
    log_total: Tensor
    entropy: Tensor | None

    def probs(self, logits: Tensor) -> Tensor:
        """The probabilities of some tokens by their logits, `[n, ...]`."""
        log_total = self.log_total.view(-1, *[1] * (logits.dim() - 1))
        return (logits / self.temperature - log_total).exp_()


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
        outside = None if self.tops.shape[1] * _DEPTH == width else ids >= width
        products = self.products.gather(1, ids if outside is None else ids.clamp(max=width - 1))
        logits = _finished_(products.to(self.tops.dtype), self.head)
        return logits if outside is None else logits.masked_fill_(outside, _OUTSIDE)

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
            spread.masses.scatter_(1, columns, spread.probs(logits).sum(1))
        return [spread.masses.sum(1) for spread in self.spreads.values()]

    def draw(self, uniforms: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Draw tokens in proportion to the sum of their probabilities at all temperatures; see `draw.draw`."""

        def inside(columns: Tensor) -> Tensor:
            logits = self._column_logits(columns)
            return reduce(torch.add, [spread.probs(logits) for spread in spreads])

        spreads = self.spreads.values()
        return draw(reduce(torch.add, [spread.masses for spread in spreads]), inside, uniforms, draws)

    def _ids(self, columns: Tensor) -> Tensor:
        """The ids in some columns `[n, C]` of the table, `[n, 32, C]`."""
        first = self.tops.shape[1] * torch.arange(_DEPTH, device=columns.device)
        return columns[:, None] + first[:, None]

    def _column_logits(self, columns: Tensor) -> Tensor:
        return self.logits(self._ids(columns).flatten(1)).unflatten(1, (_DEPTH, -1))


def blocks(output: Projection, temperatures: Sequence[float], entropies: Collection[float]) -> Iterator[Block]:
    """All rows of a teacher's output, block by block, at least one.

    A plain head's scale and softcap are applied in the precision of the statistics, as in the fused loss.

    Args:
        output: What enters the teacher's head, and the head.
        temperatures: Of the spreads.
        entropies: Those of them at which the entropy is asked for.
    """
    hidden, head = output.hidden, output.head
    plain = head if isinstance(head, LMHead) else None
    budget = _CPU_BLOCK_BYTES if hidden.device.type == "cpu" else None
    row_bytes = vocabulary_of(head, hidden) * hidden.element_size()
    rows = chunk_rows(len(hidden), row_bytes, budget, trained_head=False)
    tiles: _Tiles | None = None
    for start in range(0, max(len(hidden), 1), rows):
        chunk = hidden[start : start + rows]
        products = _products(chunk, plain) if plain is not None else _own(head(chunk), chunk)
        tiles = tiles or _Tiles(products, plain, temperatures, entropies)
        yield Block(slice(start, start + len(chunk)), products, plain, *tiles(products))


class _Tiles:
    """Reads all logits of a block, a few rows at a time.

    Args:
        products: Of any block.
        head: What makes logits of them; None where they are.
        temperatures: Of the spreads.
        entropies: Those of them at which the entropy is asked for.
    """

    def __init__(
        self, products: Tensor, head: LMHead | None, temperatures: Sequence[float], entropies: Collection[float]
    ) -> None:
        self._head, self._temperatures, self._entropies = head, temperatures, entropies
        # Products of finite weights are finite.
        self._finite = head is not None and head.bias is None
        self._columns = -(-products.shape[1] // _DEPTH)
        width = self._columns * _DEPTH
        size = _CPU_TILE if products.device.type == "cpu" else _DEVICE_TILE
        shape, dtype = (max(size // width, 1), width), statistics_dtype(products.dtype)
        self._logits = products.new_full(shape, _OUTSIDE, dtype=dtype)
        self._spare = torch.empty_like(self._logits)

    def __call__(self, products: Tensor) -> tuple[Tensor, dict[float, Spread]]:
        """The greatest logits of the columns of the table, and the spreads."""
        tops = self._logits.new_empty(len(products), self._columns)
        masses = {temperature: torch.empty_like(tops) for temperature in self._temperatures}
        means = {temperature: tops.new_empty(len(products)) for temperature in self._entropies}
        size = len(self._logits)
        for first in range(0, len(products), size):
            piece = products[first : first + size]
            logits, part = self._logits[: len(piece)], slice(first, first + len(piece))
            _finished_(logits[:, : piece.shape[1]].copy_(piece), self._head, finite=self._finite)
            torch.amax(logits.unflatten(1, (_DEPTH, -1)), 1, out=tops[part])
            for temperature in self._temperatures:
                weights = _weights(logits, tops[part], temperature, self._spare[: len(piece)])
                torch.sum(weights.unflatten(1, (_DEPTH, -1)), 1, out=masses[temperature][part])
                if temperature in means:
                    means[temperature][part] = row_dots(weights, logits, weights)
        return tops, {t: _spread(t, tops, masses[t], means.get(t)) for t in self._temperatures}


def _weights(logits: Tensor, tops: Tensor, temperature: float, out: Tensor) -> Tensor:
    """`exp(logits / T)`, the greatest of a row being 1: by exp2, which is fast on a CPU, too."""
    scale = math.log2(math.e) / temperature
    return torch.add(tops.amax(1, keepdim=True).mul_(-scale), logits, alpha=scale, out=out).exp2_()


def _spread(temperature: float, tops: Tensor, masses: Tensor, means: Tensor | None) -> Spread:
    """What masses and mean logits are when the greatest weight is not 1 but its probability."""
    totals = masses.sum(1, keepdim=True)
    log_total = tops.amax(1) / temperature + totals[:, 0].log()
    entropy = None if means is None else log_total - means / totals[:, 0] / temperature
    return Spread(temperature, masses.div_(totals), log_total, entropy)


def _products(hidden: Tensor, head: LMHead) -> Tensor:
    return F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)


def _own(products: Tensor, hidden: Tensor) -> Tensor:
    """Products that may be overwritten: a head that gives back what it was given must not lead to the teacher's."""
    shared = products.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
    return products.clone() if shared else products


def _finished_(products: Tensor, head: LMHead | None, *, finite: bool = False) -> Tensor:
    """Logits of products `[n, ...]`, in place, those of impossible tokens finite."""
    if finite or head is None or head.softcap is None:
        if head is not None:
            head.finish_(products)
        return products if finite else products.clamp_(min=_IMPOSSIBLE)
    impossible = products == -torch.inf  # which a softcap would make possible
    head.finish_(products)
    return products.masked_fill_(impossible, _IMPOSSIBLE)


def log_masses(sums: list[Tensor]) -> Tensor:
    """Logarithms of some masses `[n]`, side by side; those too small for single precision are its smallest number.

    A mass of 0 would make any probability that a student gives there infinitely wrong.
    """
    return torch.stack(sums, 1).float().clamp(min=torch.finfo(torch.float32).tiny).log()


def log_probs_of(values: Tensor, log_total: Tensor) -> Tensor:
    """Log-probabilities of logits `[n, K]` in the precision of a cache; -inf where they are impossible."""
    log_probs = (values - log_total[:, None]).float()
    return log_probs.masked_fill_(values <= _IMPOSSIBLE / 2, -torch.inf)

"""Systematic sampling: one uniform number decides all draws of a token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache import compiled


# So far above the smallest number of single precision that a column with this mass has a weight above 0.
LEAST_MASS = 2.0**-100


def draw(masses: Tensor, inside: Callable[[Tensor], Tensor], uniforms: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Draw tokens in proportion to their weights: at (u + j) / draws of the distribution function, j = 0, 1, ...

    With p the normalised weights, a token is drawn `draws * p` times on average over u, exactly, and always less than
    once more or less often than that. Independent draws have the same mean and vary more.

    The vocabulary is a table, in whose columns the tokens are W apart: first a column is found, then the place in it.

    Args:
        masses: What the weights of each column add up to, `[n, W]`; one below `LEAST_MASS` counts as 0. Nothing is
            drawn of a row without any.
        inside: Gives the weights in columns `[n, draws]`, from the first row of the table to the last,
            `[n, draws, D]`; they may be off from those that were added up by rounding.
        uniforms: `[n]` float64, u in [0, 1).
        draws: How many in each row.

    Returns:
        The tokens that were drawn, `[n, draws]` int64, each once, and -1 in the slots left over; and how often.
    """
    ends = masses.where(masses >= LEAST_MASS, 0.0).cumsum(1, dtype=torch.float64)
    total = ends[:, -1:].contiguous()
    steps = torch.arange(draws, device=masses.device)
    points = _below((uniforms[:, None] + steps) / draws * total, total)
    width = ends.shape[1]
    column = torch.searchsorted(ends, points, right=True).clamp_(max=width - 1)
    start = ends.gather(1, (column - 1).clamp_(min=0)).masked_fill_(column == 0, 0.0)
    share = ((points - start) / (ends.gather(1, column) - start)).clamp_(0.0, 1.0)
    within = inside(column).cumsum(2, dtype=torch.float64)
    most = within[:, :, -1]
    row = torch.searchsorted(within, _below(share * most, most)[:, :, None], right=True)[:, :, 0]
    return _count(row * width + column, total > 0)


def _below(points: Tensor, end: Tensor) -> Tensor:
    """Points of a distribution function; rounding must not lead to its end, behind the last token with a weight."""
    return torch.minimum(points, torch.nextafter(end, torch.zeros_like(end)))


def _count(ids: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Put equal neighbours of `[n, D]` into one slot, with their number."""
    changes = torch.ones_like(ids, dtype=torch.bool)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = changes.cumsum(1) - 1
    counts = torch.zeros_like(ids).scatter_add_(1, slot, drawn.expand_as(ids).long())
    return torch.full_like(ids, -1).scatter_(1, slot, ids).where(counts > 0, -1), counts


def pack_counts(counts: np.ndarray, draws: int) -> np.ndarray:
    """Counts `[N, K]` that add up to `draws`, or to 0, in as many bits: a 1 is the last draw of its slot."""
    ends = np.cumsum(counts, axis=1)
    bits: np.ndarray = np.zeros((len(counts), draws), dtype=np.uint8)
    row, slot = np.nonzero(counts)
    bits[row, ends[row, slot] - 1] = 1
    return np.packbits(bits, axis=1, bitorder="little")


def read_counts(packed: np.ndarray, numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What `pack_counts` packed, of some tokens, `[M, K]` float32.

    Args:
        packed: Of all tokens of a shard.
        numbers: Of the M tokens.
        ids: `[M, K]`, K being the number of draws, -1 in the slots that were not drawn, which come last.
    """
    if (loops := compiled.loops()) is not None:
        counts: np.ndarray = np.empty(ids.shape, dtype=np.float32)
        loops.read_counts(packed, numbers, ids, counts)
        return counts
    counts = np.ones(ids.shape, dtype=np.float32)
    several = np.flatnonzero(ids[:, -1] < 0)  # of all others each was drawn once
    drawn: np.ndarray = np.greater_equal(ids.take(several, 0), 0)
    bits = np.unpackbits(packed.take(numbers.take(several), 0), axis=1, count=ids.shape[1], bitorder="little")
    ends = np.flatnonzero(bits[drawn[:, 0]])  # the others were not drawn for; these end with a 1
    known: np.ndarray = np.zeros(drawn.shape, dtype=np.float32)
    known[drawn] = np.diff(ends, prepend=-1)
    counts[several] = known
    return counts

"""Sets of ids of a vocabulary, about 8 bits an id: Elias-Fano coding with buckets as wide as their ids are rare.

Elias-Fano coding (Elias 1974, Fano 1971) cuts the vocabulary into buckets of 2^w ids. An id is its place in its
bucket, w bits, and the buckets of a sorted set are written in unary: a 0 for each step to the next bucket, a 1 for
each id. With buckets of one width an id costs 2 + log2(V / k) bits. But a few ids of a language are in most sets, and
most are in next to none: an id that is in a share f of the sets costs 2^-w bits of steps in every set and w more where
it occurs, which is least for w = log2(1 / f), rounded down. So each id has a width of its own, known to the whole
shard, and the vocabulary is sorted by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_distill.cache import compiled
from hf_distill.cache.encoding import Arrays
from hf_distill.cache.ragged import RaggedReader, pack_ragged


# Widths fill half a byte, and 7 + MAX_WIDTH bits are found in a window of 4 bytes.
WIDTH_BITS = 4
MAX_WIDTH = 2**WIDTH_BITS - 1
_WINDOW = 4
# Sets that are coded at a time: what is made of them on the way stays in the processor's caches.
_PACKED_AT_ONCE = 4096
_IDS_READ_AT_ONCE = 2**17


def pack_sets(ids: np.ndarray, vocab_size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Code a set of ids for each token.

    Args:
        ids: `[N, K]`, distinct within a row, and -1 in unused slots.
        vocab_size: Ids are smaller than this.

    Returns:
        The arrays, and the slots in the order in which they will be read, `[N, K]`: unused ones last.
    """
    order = np.empty(ids.shape, dtype=np.min_scalar_type(ids.shape[1]))
    slots, slot_bits = np.arange(ids.shape[1]), ids.shape[1].bit_length()
    shares = np.bincount(ids[ids >= 0].ravel(), minlength=vocab_size)
    widths = _widths(shares, len(ids))
    buckets = _Buckets.of(widths)
    unary: list[tuple[np.ndarray, np.ndarray]] = []
    low: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(ids), _PACKED_AT_ONCE):
        part = slice(start, start + _PACKED_AT_ONCE)
        # Numbers that hold their slots are sorted in a fifth of the time of a stable argsort.
        keys = buckets.ranks[ids[part]].astype(np.int64) << slot_bits | slots
        keys.sort(axis=1)
        order[part] = keys & (1 << slot_bits) - 1
        for packed, piece in zip((unary, low), _pack_sorted(keys >> slot_bits, buckets), strict=True):
            packed.append(piece)
    arrays = {"widths": _pack_halves(widths)}
    for name, pieces in (("unary", unary), ("low", low)):
        data = np.concatenate([np.empty(0, np.uint8), *(piece[0] for piece in pieces)])
        lengths = np.concatenate([np.empty(0, np.int64), *(piece[1] for piece in pieces)])
        arrays |= {f"{name}.{key}": array for key, array in pack_ragged(data, lengths).items()}
    return arrays, order


class SetReader:
    """Reads what `pack_sets` made.

    Args:
        arrays: Its arrays.
        vocab_size: As it was.
        slots: K.
    """

    def __init__(self, arrays: Arrays, vocab_size: int, slots: int) -> None:
        self._buckets = _Buckets.of(_unpack_halves(arrays["widths"], vocab_size))
        self._unary, self._low = (
            RaggedReader({key.removeprefix(name): array for key, array in arrays.items() if key.startswith(name)})
            for name in ("unary.", "low.")
        )
        self._slots = slots
        self._rows = max(_IDS_READ_AT_ONCE // slots, 1)
        self._places = np.arange(self._rows * slots)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """The sets of some tokens.

        Args:
            numbers: Of the tokens, `[M]` int64, in any order.

        Returns:
            Ids `[M, K]` int64, -1 in unused slots, which come last.
        """
        ids: np.ndarray = np.empty((len(numbers), self._slots), dtype=np.int64)
        if (loops := compiled.loops()) is not None:
            spans = *self._unary.spans(numbers), *self._low.spans(numbers)
            loops.read_sets(*spans, self._buckets.entries, self._buckets.ids, ids)
            return ids
        unary, unary_bounds = self._unary(numbers)
        low, low_bounds = self._low(numbers)
        low = np.append(low, np.zeros(_WINDOW, np.uint8))
        for start in range(0, len(numbers), self._rows):
            stop = min(start + self._rows, len(numbers))
            bounds = unary_bounds[start : stop + 1], low_bounds[start : stop + 1]
            self._read(unary, low, *bounds, ids[start:stop])
        return ids

    def _read(
        self, unary: np.ndarray, low: np.ndarray, unary_bounds: np.ndarray, low_bounds: np.ndarray, ids: np.ndarray
    ) -> None:
        """Read a few tokens into `ids`; bounds say where the bytes of each begin and end."""
        unary = unary[unary_bounds[0] : unary_bounds[-1]]
        ones = np.flatnonzero(np.unpackbits(unary, bitorder="little").view(bool))
        begin = (unary_bounds[:-1] - unary_bounds[0]) * 8
        full = len(ones) == ids.size
        first = self._places[: ids.size : self._slots] if full else np.searchsorted(ones, begin)
        counts: Any = self._slots if full else np.diff(first, append=len(ones))
        # A 1 stands behind the steps and the earlier ids of its set.
        bucket = ones
        bucket -= self._places[: len(ones)]
        bucket -= np.repeat(begin - first, counts)

        size = low_bounds[-1] - low_bounds[0] + 1
        windows: np.ndarray = np.ndarray(size, "<i4", low, low_bounds[0], (1,)).copy()
        ends: np.ndarray = np.zeros(len(ones) + 1, dtype=np.int32)
        entry: np.ndarray = self._buckets.entries.take(bucket)
        width = entry & MAX_WIDTH
        np.cumsum(width, out=ends[1:])
        at = ends[:-1]
        at += np.repeat(((low_bounds[:-1] - low_bounds[0]) * 8 - ends[first]).astype(np.int32), counts)
        rank: np.ndarray = windows.take(at >> 3)
        at &= 7
        rank >>= at
        rank &= (1 << width) - 1
        entry >>= WIDTH_BITS
        rank += entry
        if not full:
            unused = np.arange(self._slots, dtype=np.int32) >= counts.astype(np.int32)[:, None]
            found, rank = rank, np.zeros(ids.shape, dtype=np.int32)
            rank[~unused] = found
        self._buckets.ids.take(rank.reshape(ids.shape), out=ids, mode="clip")  # "raise" would buffer
        if not full:
            np.copyto(ids, -1, where=unused)


def part(ids: np.ndarray, chosen: np.ndarray, numbers: np.ndarray, head: int) -> np.ndarray:
    """Bring some ids of each set behind the others.

    Args:
        ids: `[M, K]`, -1 in unused slots, which come last; overwritten.
        chosen: Of each token of a shard a bit for each slot, `[N, B]` uint8: 1 for those that are brought behind.
        numbers: Of the M tokens.
        head: The slots in front of them.

    Returns:
        `[M, K]`: up to `head` ids, and behind these slots the chosen ones, both with -1 in unused slots at their ends.
    """
    if (loops := compiled.loops()) is not None:
        loops.part(ids, chosen, numbers, head)
        return ids
    bits = np.unpackbits(chosen.take(numbers, 0), axis=1, count=ids.shape[1], bitorder="little")
    is_chosen = bits.view(bool)
    sides = [(~is_chosen & (ids >= 0), head), (is_chosen, ids.shape[1] - head)]
    return np.concatenate([_aligned(ids, found, slots) for found, slots in sides], axis=1)


def _aligned(ids: np.ndarray, found: np.ndarray, slots: int) -> np.ndarray:
    """Those of the ids `[M, K]` that were found, in the first of some slots, with -1 in the others, `[M, slots]`."""
    values: np.ndarray = ids.reshape(-1)[np.flatnonzero(found)]
    if len(values) == len(ids) * slots:
        return values.reshape(len(ids), slots)
    used = np.arange(slots) < found.sum(1)[:, None]
    aligned: np.ndarray = np.full(used.shape, -1, dtype=ids.dtype)
    aligned.reshape(-1)[np.flatnonzero(used)] = values
    return aligned


def _widths(counts: np.ndarray, sets: int) -> np.ndarray:
    """The width of each id that occurs in `counts` of the sets: log2(sets / count), rounded down."""
    width: np.ndarray = np.zeros(len(counts), dtype=np.uint8)
    for bits in range(1, MAX_WIDTH + 1):
        width += (counts.astype(np.int64) << bits) <= sets
    return width


@dataclass(frozen=True)
class _Buckets:
    """The vocabulary sorted by width, and cut into buckets.

    Args:
        ids: The id of each rank, `[V]`.
        ranks: The rank of each id, `[V + 1]`; the last is that of -1, above all others.
        of_rank: The bucket of each rank, `[V]`.
        entries: The first rank and, in the last `WIDTH_BITS`, the width of each bucket: one look into a table.
    """

    ids: np.ndarray
    ranks: np.ndarray
    of_rank: np.ndarray
    entries: np.ndarray

    @classmethod
    def of(cls, widths: np.ndarray) -> _Buckets:
        ids = np.argsort(widths, kind="stable")
        ranks: np.ndarray = np.empty(len(ids) + 1, dtype=np.int32)
        ranks[ids] = np.arange(len(ids))
        ranks[-1] = len(ids)
        bases, of_bucket, base = [], [], 0
        for width, count in enumerate(np.bincount(widths)):
            bases.append(np.arange(base, base + count, 1 << width))
            of_bucket.append(np.full(len(bases[-1]), width))
            base += count
        first, width = (np.concatenate(arrays).astype(np.int32) for arrays in (bases, of_bucket))
        of_rank: np.ndarray = np.repeat(np.arange(len(first), dtype=np.int32), np.diff(first, append=len(ids)))
        return cls(ids, ranks, of_rank, first << WIDTH_BITS | width)


def _pack_sorted(ranks: np.ndarray, buckets: _Buckets) -> list[tuple[np.ndarray, np.ndarray]]:
    """The bytes, and how many of each row, of the steps and of the places of sorted ranks `[n, K]`."""
    if (loops := compiled.loops()) is not None:
        unary, low, lengths = loops.pack_sets(ranks, buckets.of_rank, buckets.entries)
        return [(unary, lengths[0]), (low, lengths[1])]
    used = ranks < len(buckets.ids)
    row, slot = np.nonzero(used)
    rank = ranks[used]
    bucket = buckets.of_rank[rank]
    entry = buckets.entries[bucket]
    width = (entry & MAX_WIDTH).astype(np.int64)
    ones = _pack_words(np.ones_like(rank), bucket + slot, row, np.ones_like(rank), len(ranks))
    before = np.cumsum(width) - width
    counts = used.sum(1)
    first = np.cumsum(counts) - counts
    at = before - np.repeat(np.append(before, 0)[first], counts)
    return [ones, _pack_words(rank - (entry >> WIDTH_BITS), at, row, width, len(ranks))]


def _pack_words(
    words: np.ndarray, at: np.ndarray, row: np.ndarray, bits: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Write numbers of some bits at bits `at` of their rows, which fill whole bytes; they do not overlap."""
    ends: np.ndarray = np.zeros(rows, dtype=np.int64)
    np.maximum.at(ends, row, at + bits)
    lengths: np.ndarray = (ends + 7) // 8
    begin = np.cumsum(lengths) - lengths
    at = at + begin[row] * 8
    shifted = words << (at & 7)
    size = int(lengths.sum()) + 4
    data = np.zeros(size)
    for byte in range(4):
        data += np.bincount((at >> 3) + byte, weights=(shifted >> (8 * byte)) & 255, minlength=size)
    return data[:-4].astype(np.uint8), lengths


def _pack_halves(values: np.ndarray) -> np.ndarray:
    """Numbers below 16, two in a byte."""
    even: np.ndarray = np.append(values, np.zeros(len(values) % 2, dtype=np.uint8))
    return even[::2] | (even[1::2] << 4)


def _unpack_halves(packed: np.ndarray, count: int) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]

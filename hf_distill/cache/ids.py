"""Sets of ids of a vocabulary, about 8 bits an id: Elias-Fano coding with buckets as wide as their ids are rare.

Elias-Fano coding (Elias 1974, Fano 1971) cuts the vocabulary into buckets of 2^w ids. An id is its place in its
bucket, w bits, and the buckets of a sorted set are written in unary: a 0 for each step to the next bucket, a 1 for
each id. With buckets of one width an id costs 2 + log2(V / k) bits. But a few ids of a language are in most sets, and
most are in next to none: an id that is in a share f of the sets costs 2^-w bits of steps in every set and w more where
it occurs, which is least for w = log2(1 / f), rounded down. So each id has a width of its own, known to the whole
shard, and the vocabulary is sorted by it. The bits of a payload, such as the code of a log-probability, follow those
of each id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_distill.cache.encoding import Arrays
from hf_distill.cache.ragged import RaggedReader, pack_ragged


# Widths fill half a byte, and 7 + _MAX_WIDTH + MAX_PAYLOAD_BITS bits are found in a window of 32.
_MAX_WIDTH = 15
MAX_PAYLOAD_BITS = 10
# Sets that are coded at a time: what is made of them on the way stays in the processor's caches.
_PACKED_AT_ONCE = 4096
_IDS_READ_AT_ONCE = 2**15
_ALL = np.uint32(2**32 - 1)


def pack_sets(
    ids: np.ndarray, vocab_size: int, payload: np.ndarray | None = None, payload_bits: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Code a set of ids for each token.

    Args:
        ids: `[N, K]`, distinct within a row, and -1 in unused slots.
        vocab_size: Ids are smaller than this.
        payload: `[N, K]`, a number of `payload_bits` bits for each id.
        payload_bits: At most `MAX_PAYLOAD_BITS`.

    Returns:
        The arrays, and the slots in the order in which they will be read, `[N, K]`: unused ones last.
    """
    order = np.empty(ids.shape, dtype=np.min_scalar_type(ids.shape[1]))
    shares = np.bincount(ids[ids >= 0].ravel(), minlength=vocab_size)
    widths = _widths(shares, len(ids))
    buckets = _Buckets.of(widths)
    unary: list[tuple[np.ndarray, np.ndarray]] = []
    low: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(ids), _PACKED_AT_ONCE):
        part = slice(start, start + _PACKED_AT_ONCE)
        ranks = buckets.ranks[ids[part]]
        own = np.argsort(ranks, axis=1, kind="stable")
        order[part] = own
        ranks = np.take_along_axis(ranks, own, 1)
        codes = None if payload is None else np.take_along_axis(payload[part], own, 1)
        for packed, piece in zip((unary, low), _pack_sorted(ranks, codes, payload_bits, buckets), strict=True):
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
        payload_bits: As they were.
    """

    def __init__(self, arrays: Arrays, vocab_size: int, slots: int, payload_bits: int = 0) -> None:
        self._buckets = _Buckets.of(_unpack_halves(arrays["widths"], vocab_size))
        self._unary, self._low = (
            RaggedReader({key.removeprefix(name): array for key, array in arrays.items() if key.startswith(name)})
            for name in ("unary.", "low.")
        )
        self._slots = slots
        self._payload_bits = payload_bits

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sets of some tokens.

        Args:
            numbers: Of the tokens, `[M]` int64, in any order.

        Returns:
            Ids `[M, K]` int32, -1 in unused slots, which come last; and the payload `[M, K]` int32, 0 there.
        """
        ids: np.ndarray = np.full((len(numbers), self._slots), -1, dtype=np.int32)
        payload: np.ndarray = np.zeros(ids.shape, dtype=np.int32)
        rows = max(_IDS_READ_AT_ONCE // self._slots, 1)
        for start in range(0, len(numbers), rows):
            part = slice(start, start + rows)
            self._read(numbers[part], ids[part], payload[part])
        return ids, payload

    def _read(self, numbers: np.ndarray, ids: np.ndarray, payload: np.ndarray) -> None:
        data, begin = self._unary(numbers)
        ones = np.flatnonzero(np.unpackbits(data, bitorder="little").view(bool))
        begin *= 8
        full = len(ones) == ids.size
        first = np.arange(0, ids.size, self._slots) if full else np.searchsorted(ones, begin)
        counts: Any = self._slots if full else np.diff(first, append=len(ones))
        # A 1 stands behind the steps and the earlier ids of its set.
        bucket = ones - np.arange(len(ones))
        bucket -= np.repeat(begin - first, counts)
        width: np.ndarray = self._buckets.widths.take(bucket)

        data, begin = self._low(numbers)
        padded: np.ndarray = np.append(data, np.zeros(4, np.uint8))
        windows: np.ndarray = np.ndarray(len(data) + 1, "<u4", padded, strides=(1,)).astype("<i8")
        ends: np.ndarray = np.zeros(len(ones) + 1, dtype=np.int64)
        np.cumsum(width + self._payload_bits, out=ends[1:])
        at = ends[:-1]
        at += np.repeat(begin * 8 - ends[first], counts)
        words: np.ndarray = windows.take(at >> 3)
        at &= 7
        words >>= at
        rank = words & ~(-1 << width)
        rank += self._buckets.bases.take(bucket)
        words >>= width
        words &= (1 << self._payload_bits) - 1
        found: np.ndarray = self._buckets.ids.take(rank)
        if full:
            ids[:], payload[:] = found.reshape(ids.shape), words.reshape(ids.shape)
        else:
            used = np.arange(self._slots) < counts[:, None]
            ids[used], payload[used] = found, words


def _widths(counts: np.ndarray, sets: int) -> np.ndarray:
    """The width of each id that occurs in `counts` of the sets: log2(sets / count), rounded down."""
    width: np.ndarray = np.zeros(len(counts), dtype=np.uint8)
    for bits in range(1, _MAX_WIDTH + 1):
        width += (counts.astype(np.int64) << bits) <= sets
    return width


@dataclass(frozen=True)
class _Buckets:
    """The vocabulary sorted by width, and cut into buckets.

    Args:
        ids: The id of each rank, `[V]`.
        ranks: The rank of each id, `[V + 1]`; the last is that of -1, above all others.
        bases: First rank of each bucket.
        widths: Bits of a place in each bucket.
    """

    ids: np.ndarray
    ranks: np.ndarray
    bases: np.ndarray
    widths: np.ndarray

    @classmethod
    def of(cls, widths: np.ndarray) -> _Buckets:
        ids = np.argsort(widths, kind="stable").astype(np.int32)
        ranks: np.ndarray = np.empty(len(ids) + 1, dtype=np.int32)
        ranks[ids] = np.arange(len(ids))
        ranks[-1] = len(ids)
        bases, of_bucket, base = [], [], 0
        for width, count in enumerate(np.bincount(widths)):
            bases.append(np.arange(base, base + count, 1 << width))
            of_bucket.append(np.full(len(bases[-1]), width))
            base += count
        return cls(ids, ranks, np.concatenate(bases), np.concatenate(of_bucket))


def _pack_sorted(
    ranks: np.ndarray, codes: np.ndarray | None, payload_bits: int, buckets: _Buckets
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The bytes, and how many of each row, of the steps and of the places of sorted ranks `[n, K]`."""
    used = ranks < len(buckets.ids)
    row, slot = np.nonzero(used)
    rank = ranks[used].astype(np.int64)
    bucket = np.searchsorted(buckets.bases, rank, side="right") - 1
    width = buckets.widths[bucket].astype(np.int64)
    word = rank - buckets.bases[bucket]
    if codes is not None:
        word |= codes[used].astype(np.int64) << width
    ones = _pack_words(np.ones_like(word), bucket + slot, row, np.ones_like(word), len(ranks))
    bits = width + payload_bits
    before = np.cumsum(bits) - bits
    counts = used.sum(1)
    first = np.cumsum(counts) - counts
    places = _pack_words(word, before - np.repeat(np.append(before, 0)[first], counts), row, bits, len(ranks))
    return [ones, places]


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

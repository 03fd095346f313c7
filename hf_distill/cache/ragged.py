"""Rows of bytes of unequal lengths, one after another, each of which can be found by its number."""

from __future__ import annotations

import numpy as np

from hf_distill.cache.encoding import Arrays


# Rows between two stored offsets: the lengths of so many are added up to find a row.
_GROUP = 64


def pack_ragged(data: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of rows of bytes: padded to one length where that takes no more room, else with their lengths.

    Args:
        data: All bytes, uint8.
        lengths: How many of them each row has, `[N]`.
    """
    longest = int(lengths.max(initial=0))
    small = lengths.astype(np.min_scalar_type(longest))
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[::_GROUP]
    if len(lengths) * longest <= data.nbytes + small.nbytes + starts.nbytes:
        padded: np.ndarray = np.zeros((len(lengths), longest), dtype=np.uint8)
        padded[np.arange(longest) < lengths[:, None]] = data
        return {"data": padded}
    return {"data": data, "lengths": small, "starts": starts}


class RaggedReader:
    """Finds rows in what `pack_ragged` made."""

    def __init__(self, arrays: Arrays) -> None:
        self._data = arrays["data"]
        self._lengths = arrays.get("lengths")
        self._starts = arrays.get("starts")

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of some rows.

        Args:
            numbers: Which rows, `[M]` int64, in any order.

        Returns:
            Bytes that hold all of the rows, and where in them each begins, `[M]` int64.
        """
        if self._lengths is None or self._starts is None:
            return self._data[numbers].reshape(-1), np.arange(len(numbers)) * self._data.shape[1]
        begin, length = self._spans(numbers)
        if len(numbers) and (np.diff(numbers) == 1).all():
            return self._data[begin[0] : begin[-1] + length[-1]], begin - begin[0]
        out = np.cumsum(length) - length
        return self._data[np.repeat(begin - out, length) + np.arange(length.sum())], out

    def _spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows begin, and their lengths."""
        assert self._lengths is not None
        assert self._starts is not None
        group: np.ndarray = numbers // _GROUP
        changes = np.diff(group, prepend=-1) != 0  # tokens of a row are neighbours
        groups, which = group[changes], np.cumsum(changes) - 1
        members = groups[:, None] * _GROUP + np.arange(_GROUP)
        lengths = self._lengths[np.minimum(members, len(self._lengths) - 1)].astype(np.int64)
        before = np.cumsum(lengths, axis=1) - lengths + self._starts[groups, None]
        inside: np.ndarray = numbers % _GROUP
        return before[which, inside], lengths[which, inside]

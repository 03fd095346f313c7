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

    def spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All bytes, and where in them those of some rows begin and end, `[2, M]` int64.

        Args:
            numbers: Which rows, `[M]` int64, in any order.
        """
        if self._lengths is None:
            width = self._data.shape[1]
            return self._data.reshape(-1), np.stack([numbers * width, (numbers + 1) * width])
        bounds: np.ndarray = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(self._lengths.take(numbers), out=bounds[1:])
        # Tokens of a row are neighbours: only the first has to be found.
        first = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1] + 1)[: len(numbers)])
        shifts: np.ndarray = np.repeat(
            self._begin(numbers[first]) - bounds[first], np.diff(first, append=len(numbers))
        )
        return self._data, np.stack([bounds[:-1] + shifts, bounds[1:] + shifts])

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of some rows, one after another, and where each begins, and the end, `[M + 1]` int64.

        Rows that were padded have their padding.
        """
        if self._lengths is None:
            return self._data.take(numbers, 0).reshape(-1), np.arange(len(numbers) + 1) * self._data.shape[1]
        data, (begin, end) = self.spans(numbers)
        first = np.flatnonzero(np.append(True, begin[1:] != end[:-1])[: len(numbers)])  # is copied with the next ones
        last: np.ndarray = np.append(first[1:], len(numbers))[: len(first)] - 1
        pieces = [data[start:stop] for start, stop in zip(begin[first], end[last], strict=True)]
        return np.concatenate([data[:0], *pieces]), np.cumsum(np.append(0, end - begin))

    def _begin(self, numbers: np.ndarray) -> np.ndarray:
        """Where some rows begin in all of the bytes."""
        assert self._lengths is not None
        assert self._starts is not None
        group: np.ndarray = numbers // _GROUP
        earlier = np.arange(_GROUP) < (numbers % _GROUP)[:, None]
        members = np.minimum(group[:, None] * _GROUP + np.arange(_GROUP), len(self._lengths) - 1)
        return self._starts[group] + np.where(earlier, self._lengths[members], 0).sum(1, dtype=np.int64)

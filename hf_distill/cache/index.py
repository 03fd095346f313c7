"""Finds the rows of a cache by their keys: sorted arrays, of 24 bytes a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_distill.cache.rows import KEY_BYTES


class RowIndex:
    """Where the rows of all shards are. Rows are numbered through, shard after shard.

    Args:
        keys: Of each shard `[R, 16]` uint8.

    Raises:
        ValueError: Two rows have the same key.
    """

    def __init__(self, keys: Sequence[np.ndarray]) -> None:
        self.starts = np.cumsum([0, *map(len, keys)])
        # numpy compares byte strings whole but for zeros at their end, which keys of one length cannot differ by.
        names = np.ascontiguousarray(np.concatenate(keys)).view(f"S{KEY_BYTES}").ravel()
        self._order = np.argsort(names)
        self._sorted = names[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            rows = self._order[twice[0] : twice[0] + 2]
            places = " and ".join(f"row {row} of shard {shard}" for shard, row in zip(*self.locate(rows), strict=True))
            raise ValueError(f"The cache holds a row twice, {places}; build it again.")

    def __len__(self) -> int:
        return len(self._order)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """The numbers of the rows with these keys, `[N]` int64; -1 where there is none."""
        wanted = np.array(keys, dtype=self._sorted.dtype)
        place = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        return np.where(self._sorted[place] == wanted, self._order[place], -1)

    def locate(self, numbers: np.ndarray | np.integer) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each row, and its number there."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        return np.asarray(shards), numbers - self.starts[shards]

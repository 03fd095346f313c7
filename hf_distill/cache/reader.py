"""Reads a cache: finds rows by what they are, and decodes the tokens of several of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from hf_distill.cache.encoding import Columns, Decoder
from hf_distill.cache.index import RowIndex
from hf_distill.cache.manifest import SHARED, Manifest
from hf_distill.cache.registry import encoding_from_config
from hf_distill.cache.rows import Row, unpack_ids
from hf_distill.cache.shard import digest_of, map_shard
from hf_distill.cache.writer import ENCODED
from hf_distill.functional.sparse import SparseLogits
from hf_distill.signals import Projection


# Shards whose decoders are kept. What they have in memory is small, and a batch of shuffled rows touches many.
OPEN_SHARDS = 64


@dataclass(frozen=True)
class OpenShard:
    """A shard whose tokens can be decoded.

    Args:
        decode: Columns of tokens by number.
        starts: Where the ids of each row begin in `ids`, and the end, `[R + 1]`.
        ids: Of all rows, one after another, as `pack_ids` has them.
        kept: Of all rows, one after another, bool; a row has one less than ids. None where all are kept.
        tokens: The number of the first kept token of each row, `[R]`.
    """

    decode: Decoder
    starts: np.ndarray
    ids: np.ndarray
    kept: np.ndarray | None
    tokens: np.ndarray

    def row(self, number: int) -> Row:
        """A row as it was written."""
        start, stop = self.starts[number : number + 2]
        return Row(unpack_ids(self.ids[start:stop]), self.kept_of(number))

    def kept_of(self, number: int) -> np.ndarray:
        """Which positions of a row were kept, `[L - 1]` bool."""
        start, stop = self.starts[number : number + 2] - (number, number + 1)
        return np.ones(stop - start, dtype=bool) if self.kept is None else self.kept[start:stop]


class CacheReader:
    """A cache on disk, of which only the index of its rows is in memory: 24 bytes for each.

    Args:
        path: The folder that `build_cache` made.

    Raises:
        ValueError: It is no whole cache: it is being built, or a file is missing or is not what was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.encoding = encoding_from_config(self.manifest.encoding)
        if self.manifest.shared is not None:
            self.encoding.attach(self._shared())
        self._index = RowIndex([map_shard(self.path, shard)["keys"] for shard in self.manifest.shards])
        self._opened = lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self._index)

    def rows(self) -> Iterator[Row]:
        """All rows, in the order in which they were written."""
        return map(self.row, range(len(self)))

    def row(self, number: int) -> Row:
        """A row by its number in the order in which they were written."""
        shard, place = self._index.locate(np.array(number))
        return self._opened(int(shard)).row(int(place))

    def find(self, rows: Sequence[Row]) -> np.ndarray:
        """The numbers of rows, by their ids alone, `[N]` int64; -1 where one is not in the cache."""
        return self._index.find([row.key for row in rows])

    def targets(self, rows: Sequence[Row]) -> SparseLogits | Projection:
        """What the teacher gave at the `kept` positions of rows, row after row, on the CPU.

        Args:
            rows: `kept` says which positions are read, of those that were kept in the cache.

        Raises:
            ValueError: A row is not in the cache, or one of its positions was not kept.
        """
        shards, numbers = self._index.locate(self._found(rows))
        order = np.argsort(shards, kind="stable")
        parts = [self._decode(rows, numbers, order[shards[order] == shard], shard) for shard in np.unique(shards)]
        if not parts:
            parts = [self._opened(0).decode(np.empty(0, dtype=np.int64))]
        columns: Columns = parts[0]
        if len(parts) > 1:
            counts = np.array([row.kept.sum() for row in rows])
            starts = np.cumsum(counts) - counts
            places = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in order])
            back = torch.from_numpy(np.argsort(places))
            columns = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
        labels = np.concatenate([np.empty(0, dtype=np.int32), *(row.labels for row in rows)])
        return self.encoding.targets(columns, torch.from_numpy(labels.astype(np.int64)))

    def _found(self, rows: Sequence[Row]) -> np.ndarray:
        """The numbers of rows, all of which must be there."""
        found = self.find(rows)
        if (found < 0).any():
            row = rows[int(np.flatnonzero(found < 0)[0])]
            raise ValueError(
                f"The cache {self.path} has no {row.description}. Rows are found by all of their ids: check that "
                "the dataset, the tokenizer, its chat template, `max_length` and the packing are those that the cache "
                "was built with (`packing_strategy='wrapped'` cuts documents; build on `trainer.train_dataset`, as "
                "the trainer has prepared it). Rows that are only evaluated must be in the cache, too: build it on "
                "both datasets, or set `eval_strategy='no'`."
            )
        return found

    def _decode(self, rows: Sequence[Row], numbers: np.ndarray, chosen: np.ndarray, shard: int) -> Columns:
        """The columns of the wanted tokens of those rows that are in one shard."""
        opened = self._opened(int(shard))
        tokens = []
        for i in chosen:
            wanted, first = rows[i].kept, opened.tokens[numbers[i]]
            if opened.kept is None:
                tokens.append(first + np.flatnonzero(wanted))
                continue
            kept = opened.kept_of(numbers[i])
            if (wanted & ~kept).any():
                position = int(np.flatnonzero(wanted & ~kept)[0])
                raise ValueError(
                    f"The cache {self.path} has the {rows[i].description}, but not what the teacher says after its "
                    f"token {position}: only positions with a label were kept. Train on the labels that the cache was "
                    "built with (completions, assistant turns or everything), or build it without them."
                )
            tokens.append(first + np.flatnonzero(wanted[kept]))
        return opened.decode(np.concatenate(tokens))

    def _shared(self) -> dict[str, Tensor]:
        """What is stored once."""
        path = self.path / SHARED
        if not path.exists() or digest_of(content := path.read_bytes()) != self.manifest.shared:
            raise ValueError(f"{path} is missing or damaged; copy the cache again, or build it again.")
        return safetensors.torch.load(content)

    def _open(self, number: int) -> OpenShard:
        arrays = map_shard(self.path, self.manifest.shards[number])
        lengths: np.ndarray = arrays["lengths"].astype(np.int64)
        starts = np.cumsum([0, *lengths])
        positions = starts - np.arange(len(starts))
        kept: np.ndarray | None = None
        if "kept" in arrays:
            kept = np.unpackbits(arrays["kept"], count=positions[-1]).astype(bool)
        before = positions if kept is None else np.concatenate([[0], np.cumsum(kept)])[positions]
        encoded = {name.removeprefix(ENCODED): array for name, array in arrays.items() if name.startswith(ENCODED)}
        return OpenShard(self.encoding.open(encoded), starts, arrays["ids"], kept, before[:-1])

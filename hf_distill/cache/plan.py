"""Which rows go into which shard and batch: decided from the dataset alone, before the teacher runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_distill.cache.rows import KEY_BYTES, Row, rows_of


@dataclass(frozen=True)
class Plan:
    """The rows of a dataset, each once, in shards.

    Args:
        dataset: Examples by number.
        places: Of each row its example, and which of its sequences it is, `[R, 2]` int64.
        lengths: Tokens of each row, `[R]` int64.
        counts: Kept tokens of each row, `[R]` int64.
        fingerprint: Digest of all rows and of what of them is kept.
        starts: The first row of each shard, and the end.
        batch_tokens: Tokens of a batch, padding included, but for rows that are longer alone.
        again: By row, where else it stands with other labels: what any of them keeps is kept.
    """

    dataset: Sequence[Any]
    places: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    fingerprint: str
    starts: np.ndarray
    batch_tokens: int
    again: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows(self, shard: int) -> list[Row]:
        """The rows of a shard, in the order in which they are stored."""
        return [self._row(number) for number in range(self.starts[shard], self.starts[shard + 1])]

    def batches(self, shard: int) -> list[np.ndarray]:
        """Which rows of a shard the teacher reads together: those of about one length."""
        lengths = self.lengths[self.starts[shard] : self.starts[shard + 1]]
        order = np.argsort(lengths, kind="stable")
        batches, start = [], 0
        for stop in range(1, len(order) + 1):
            if stop == len(order) or (stop + 1 - start) * lengths[order[stop]] > self.batch_tokens:
                batches.append(order[start:stop])
                start = stop
        return batches

    def _row(self, number: int) -> Row:
        row = self._read(*self.places[number])
        for place in self.again.get(number, ()):
            row = replace(row, kept=row.kept | self._read(*place).kept)
        return row

    def _read(self, example: int, piece: int) -> Row:
        return list(rows_of(self.dataset[int(example)]))[piece]


def plan_rows(dataset: Sequence[Any], shard_tokens: int, batch_tokens: int) -> Plan:
    """Read a dataset once and decide where its rows go.

    Rows of which nothing is kept are left out, and so are those that come a second time.

    Args:
        dataset: Of tokenised examples; see `rows_of`.
        shard_tokens: A shard ends with the row that brings its kept tokens to this.
        batch_tokens: Tokens of a batch of the teacher, padding included.

    Raises:
        ValueError: It has no length, no row with a label, or an example is refused by `rows_of`.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}, which can only be streamed; the rows of a cache are counted "
            "before the teacher runs: save it to disk first, for example with `Dataset.from_generator`."
        )
    for name, value in (("shard_tokens", shard_tokens), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; expected a whole number >= 1.")
    keys, places, lengths, counts, kept = [], [], [], [], []
    for example in range(len(dataset)):
        for piece, row in enumerate(rows_of(dataset[example])):
            if row.kept.any():
                keys.append(row.key)
                places.append((example, piece))
                lengths.append(len(row.ids))
                counts.append(int(row.kept.sum()))
                kept.append(hashlib.blake2b(np.packbits(row.kept).tobytes(), digest_size=8).digest())
    if not keys:
        raise ValueError("`dataset` has no row with a label after its first token, so there is nothing to keep.")
    first, again = _unique(keys, kept)
    numbers = {int(old): new for new, old in enumerate(first)}
    plan = Plan(
        dataset,
        np.array(places)[first],
        np.array(lengths)[first],
        np.array(counts)[first],
        "",
        np.array([0, len(first)]),
        batch_tokens,
        {numbers[old]: [places[other] for other in others] for old, others in again.items()},
    )
    for number in plan.again:
        plan.counts[number] = plan._row(number).kept.sum()
    fingerprint = hashlib.blake2b(digest_size=KEY_BYTES)
    for number, old in enumerate(first):
        fingerprint.update(keys[old])
        fingerprint.update(np.packbits(plan._row(number).kept).tobytes() if number in plan.again else kept[old])
    return replace(plan, fingerprint=fingerprint.hexdigest(), starts=_shards(plan.counts, shard_tokens))


def _unique(keys: Sequence[bytes], kept: Sequence[bytes]) -> tuple[np.ndarray, dict[int, list[int]]]:
    """The first of all equal rows, in order; and where there are others, with other labels, those."""
    names = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}").view([("a", "<u8"), ("b", "<u8")])
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    again: dict[int, list[int]] = {}
    for number, group in enumerate(inverse):
        if (origin := int(first[group])) != number and kept[origin] != kept[number]:
            again.setdefault(origin, []).append(number)
    return np.sort(first), again


def _shards(counts: np.ndarray, shard_tokens: int) -> np.ndarray:
    """The first row of each shard, and the end."""
    starts, total = [0], 0
    for number, count in enumerate(counts, start=1):
        total += count
        if total >= shard_tokens or number == len(counts):
            starts.append(number)
            total = 0
    return np.array(starts)

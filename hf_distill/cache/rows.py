"""Rows of a cache: the token ids of one sequence, found again by what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


KEY_BYTES = 16
# First tokens of a row that a message shows.
SHOWN_TOKENS = 8
# Masks of tokens that a trainer learns from, by the names that TRL gives to them; 0 is not learned from.
MASKS = ("completion_mask", "assistant_masks")


def row_key(ids: np.ndarray) -> bytes:
    """The name of a sequence of token ids: 16 bytes that depend on nothing else (BLAKE2b of 32-bit ids)."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=KEY_BYTES).digest()


def pack_ids(ids: np.ndarray) -> np.ndarray:
    """Token ids `[L]` in as many bytes each as the greatest needs, but 2 at least: `[L, B]` uint8."""
    size = max((int(ids.max(initial=0)).bit_length() + 7) // 8, 2)
    return ids.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :size]


def unpack_ids(packed: np.ndarray) -> np.ndarray:
    """What `pack_ids` packed, `[L]` int32."""
    padded = np.pad(packed, ((0, 0), (0, 4 - packed.shape[1])))
    return padded.view("<u4").reshape(-1).astype(np.int32)


@dataclass(frozen=True)
class Row:
    """One sequence: of a packed row of a dataset, one of its documents.

    Args:
        ids: Its tokens `[L]` int32, without padding.
        kept: `[L - 1]` bool: the positions whose next-token distribution is kept, those with a label at the next one.
    """

    ids: np.ndarray
    kept: np.ndarray

    @property
    def key(self) -> bytes:
        """See `row_key`."""
        return row_key(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """The tokens that followed the kept positions, `[kept.sum()]` int32."""
        return self.ids[1:][self.kept]

    @property
    def description(self) -> str:
        """What a message calls it."""
        first = ", ".join(map(str, self.ids[:SHOWN_TOKENS]))
        more = ", ..." if len(self.ids) > SHOWN_TOKENS else ""
        return f"row [{first}{more}] of {len(self.ids)} tokens (key {self.key.hex()})"


def rows_of(example: Mapping[str, Any]) -> Iterator[Row]:
    """The sequences of a row of a tokenised dataset, as a trainer would read it.

    Args:
        example: `input_ids` `[S]`, and where there are any `attention_mask` (0 is padding), `labels` (-100 is not
            learned from), TRL's `completion_mask` and `assistant_masks`, and `seq_lengths` or `position_ids` of a
            packed row.

    Raises:
        ValueError: There are no `input_ids`, or something has another length.
    """
    if "input_ids" not in example:
        raise ValueError(
            f"`dataset` has the columns {sorted(example)} and no `input_ids`; give a tokenised dataset, for example "
            "`trainer.train_dataset` of the KDSFTTrainer that will read the cache."
        )
    ids = np.asarray(example["input_ids"], dtype=np.int32)
    learned: np.ndarray = np.ones(len(ids), dtype=bool)
    if example.get("labels") is not None:
        learned &= _like(ids, "labels", example["labels"]) != -100
    for name in MASKS:
        if example.get(name) is not None:
            learned &= _like(ids, name, example[name]) != 0
    real: np.ndarray = np.ones(len(ids), dtype=bool)
    if example.get("attention_mask") is not None:
        real = _like(ids, "attention_mask", example["attention_mask"]) != 0
    bounds = _bounds(example, ids)
    for start, stop in pairwise(bounds):
        own = real[start:stop]
        yield Row(ids[start:stop][own], learned[start:stop][own][1:])


def _bounds(example: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Where the documents of a row begin, and its end."""
    if example.get("seq_lengths") is not None:
        bounds = np.cumsum([0, *example["seq_lengths"]])
        if bounds[-1] != len(ids):
            raise ValueError(f"`seq_lengths` adds up to {bounds[-1]}, and `input_ids` has {len(ids)} tokens.")
        return bounds
    if example.get("position_ids") is not None and example.get("attention_mask") is None:
        starts = np.flatnonzero(_like(ids, "position_ids", example["position_ids"]) == 0)
        return np.unique([0, *starts, len(ids)])
    return np.array([0, len(ids)])


def _like(ids: np.ndarray, name: str, values: Any) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != ids.shape:
        raise ValueError(f"`{name}` has the shape {list(values.shape)}, and `input_ids` {list(ids.shape)}.")
    return values

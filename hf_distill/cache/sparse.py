"""Encodings that keep a few ids of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache.base import LogitsEncoding, at_least
from hf_distill.cache.encoding import Arrays, Columns
from hf_distill.cache.ids import SetReader, pack_sets
from hf_distill.cache.observe import Block, log_masses, log_probs_of
from hf_distill.cache.values import (
    MAX_BITS,
    normaliser,
    pack_codes,
    pack_scalars,
    quantise,
    read_log_probs,
    read_scalars,
    weights_of,
)
from hf_distill.functional.sparse import SparseLogits


@dataclass(kw_only=True)
class TopK(LogitsEncoding):
    """The most likely ids, and the mass of all others as one bucket.

    Args:
        k: How many ids.
        bits: Of a log-probability.

    Raises:
        ValueError: `k` is not in [1, vocab_size], or `bits` not in [2, 10].
    """

    name: ClassVar[str] = "topk"

    k: int = 50
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head(self.k, self.bits, self.vocab_size)

    @property
    def entropies(self) -> tuple[float, ...]:
        """See `LogitsEncoding`."""
        return (1.0,)

    def look(self, block: Block, labels: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """See `LogitsEncoding`."""
        values, ids = block.top(self.k)
        spread = block.spreads[1.0]
        assert spread.entropy is not None
        log_probs = log_probs_of(values, spread.log_total)
        return {
            "ids": known_ids(ids, log_probs),
            "log_probs": log_probs,
            "label_log_probs": label_log_probs(block, labels),
            "entropies": spread.entropy.float()[:, None],
            "log_rests": log_masses(block.take_out_(ids)),
        }

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        codes, steps = quantise(columns["log_probs"], self.bits)
        arrays, order = pack_sets(columns["ids"].numpy(), self.vocab_size)
        codes = pack_codes(np.take_along_axis(codes, order, 1), self.bits)
        return {**arrays, "codes": codes, "steps": steps, **pack_scalars(columns)}

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        reader = SetReader(arrays, self.vocab_size, self.k)

        def read(numbers: np.ndarray) -> Columns:
            ids = reader(numbers)
            log_probs = read_log_probs(arrays, numbers, self.bits, ids)
            return {"ids": torch.from_numpy(ids), "log_probs": log_probs, **read_scalars(arrays, numbers)}

        return read

    def targets(self, columns: Columns, labels: Tensor) -> SparseLogits:
        """See `Encoding`."""
        depths = columns["log_probs"]  # below the greatest of the token
        rests = dict(zip(self.temperatures, columns["log_rests"].unbind(1), strict=True))
        levels = {t: normaliser(weights_of(depths, t).sum(1), rest) for t, rest in rests.items()}
        at_one = levels.pop(1.0)
        return SparseLogits(
            ids=columns["ids"],
            log_probs=depths.sub_(at_one[:, None]),
            masses=None,
            log_normalisers={t: level - at_one / t for t, level in levels.items()},
            entropies={1.0: columns["entropies"][:, 0]},
            labels=labels,
            label_log_probs=columns["label_log_probs"],
            vocab_size=self.vocab_size,
            log_rests=rests,
        )


def check_head(k: int, bits: int, vocab_size: int) -> None:
    """Check the options of an exact head.

    Raises:
        ValueError: `k` is not in [1, vocab_size], or `bits` not in [2, 10].
    """
    at_least("k", k, 1, vocab_size, f", the size of the vocabulary being {vocab_size}")
    at_least("bits", bits, 2, MAX_BITS)


def known_ids(ids: Tensor, log_probs: Tensor) -> Tensor:
    """Ids as they are kept: -1 where a token is impossible or a slot unused."""
    return ids.masked_fill(log_probs == -torch.inf, -1).int()


def label_log_probs(block: Block, labels: Tensor) -> Tensor:
    """The log-probability of the label of each row, of which none may have been taken out."""
    return log_probs_of(block.logits(labels[:, None]), block.spreads[1.0].log_total)[:, 0]

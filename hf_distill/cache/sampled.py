"""Encodings that draw tokens, so that distillation from them is right on average (arXiv 2503.16870)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.cache.base import LogitsEncoding, at_least
from hf_distill.cache.draw import pack_counts, read_counts
from hf_distill.cache.encoding import Arrays, Columns
from hf_distill.cache.ids import SetReader, pack_sets, part
from hf_distill.cache.observe import Block, log_masses, log_probs_of
from hf_distill.cache.sparse import check_head, known_ids, label_log_probs
from hf_distill.cache.values import (
    normaliser,
    pack_codes,
    pack_scalars,
    quantise,
    read_log_probs,
    read_scalars,
    weights_of,
)
from hf_distill.functional.sparse import SparseLogits


# Of what lies beyond an exact head, this share at least is left for the tokens that were not drawn: log-probabilities
# in few bits may add up to more.
_LEAST_SHARE = 2**-10
# Keeps a division of masses that are too small for single precision from being 0 / 0.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(kw_only=True)
class Sampled(LogitsEncoding):
    """Tokens drawn from the teacher's distribution, and how often: random sampling KD (arXiv 2503.16870).

    Args:
        draws: How many for each token.

    Raises:
        ValueError: `draws` is below 1, or a temperature is not 1.
    """

    name: ClassVar[str] = "sampled"
    samples: ClassVar[bool] = True

    draws: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("draws", self.draws, 1)
        if self.temperatures != (1.0,):
            raise ValueError(
                f"The encoding 'sampled' keeps how often tokens were drawn at T = 1, got temperatures="
                f"{list(self.temperatures)}; use 'topk_tail' or 'topk', which can be read at any temperature that is "
                "declared, or 'hidden' or 'dense', which can at all."
            )

    def look(self, block: Block, labels: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """See `LogitsEncoding`."""
        assert uniforms is not None
        entropy = block.spreads[1.0].entropy
        assert entropy is not None
        ids, counts = block.draw(uniforms, self.draws)
        return {
            "ids": ids.int(),
            "counts": counts.int(),
            "label_log_probs": label_log_probs(block, labels),
            "entropies": entropy.float()[:, None],
        }

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        arrays, order = pack_sets(columns["ids"].numpy(), self.vocab_size)
        counts = np.take_along_axis(columns["counts"].numpy(), order, 1)
        return {**arrays, "counts": pack_counts(counts, self.draws), **pack_scalars(columns)}

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        reader = SetReader(arrays, self.vocab_size, self.draws)

        def read(numbers: np.ndarray) -> Columns:
            ids = reader(numbers)
            counts = read_counts(arrays["counts"], numbers, ids)
            return {
                "ids": torch.from_numpy(ids),
                "counts": torch.from_numpy(counts),
                **read_scalars(arrays, numbers),
            }

        return read

    def targets(self, columns: Columns, labels: Tensor) -> SparseLogits:
        """See `Encoding`."""
        used = int((columns["counts"] > 0).sum(1).max()) if len(labels) else 1  # most slots are empty in most batches
        return SparseLogits(
            ids=columns["ids"][:, :used],
            log_probs=None,
            masses=columns["counts"][:, :used] / self.draws,
            log_normalisers={},
            entropies={1.0: columns["entropies"][:, 0]},
            labels=labels,
            label_log_probs=columns["label_log_probs"],
            vocab_size=self.vocab_size,
            knows_top=False,
        )


@dataclass(kw_only=True)
class TopKTail(LogitsEncoding):
    """The most likely ids exactly, and tokens drawn from all others: right on average, at any declared temperature.

    The others are drawn in proportion to the mean of their probabilities at all declared temperatures. Drawn at T = 1
    alone, the unlikely ones that make up much of the distribution at T = 2 would come rarely, with enormous weights.

    Args:
        k: How many ids are exact.
        draws: How many tokens are drawn from the others.
        bits: Of a log-probability.

    Raises:
        ValueError: `k` is not in [1, vocab_size], `draws` is below 1, or `bits` not in [2, 10].
    """

    name: ClassVar[str] = "topk_tail"
    samples: ClassVar[bool] = True

    k: int = 16
    draws: int = 8
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head(self.k, self.bits, self.vocab_size)
        at_least("draws", self.draws, 1)

    def look(self, block: Block, labels: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """See `LogitsEncoding`."""
        assert uniforms is not None
        values, ids = block.top(self.k)
        of_labels = label_log_probs(block, labels)
        rests = block.take_out_(ids)
        tail, counts = block.draw(uniforms, self.draws)
        values = torch.cat([values, block.logits(tail.clamp(min=0))], 1)
        log_probs = log_probs_of(values, block.spreads[1.0].log_total)
        log_probs[:, self.k :].masked_fill_(tail < 0, -math.inf)
        entropies = [spread.entropy for spread in block.spreads.values() if spread.entropy is not None]
        return {
            "ids": known_ids(torch.cat([ids, tail], 1), log_probs),
            "log_probs": log_probs,
            "counts": F.pad(counts, (self.k, 0)).int(),
            "label_log_probs": of_labels,
            "entropies": torch.stack(entropies, 1).float(),
            "log_rests": log_masses(rests),
        }

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        codes, steps = quantise(columns["log_probs"], self.bits)
        arrays, order = pack_sets(columns["ids"].numpy(), self.vocab_size)
        is_drawn = np.take_along_axis(columns["counts"].numpy(), order, 1) > 0
        # Head and tail are one set; all else has the head first, and both in the order of the set.
        parted = np.take_along_axis(order, np.argsort(order >= self.k, axis=1, kind="stable"), 1)
        codes, counts = (np.take_along_axis(values, parted, 1) for values in (codes, columns["counts"].numpy()))
        packed = {
            "codes": pack_codes(codes, self.bits),
            "drawn": np.packbits(is_drawn, axis=1, bitorder="little"),
            "counts": pack_counts(counts[:, self.k :], self.draws),
        }
        return {**arrays, **packed, "steps": steps, **pack_scalars(columns)}

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        reader = SetReader(arrays, self.vocab_size, self.k + self.draws)

        def read(numbers: np.ndarray) -> Columns:
            ids = part(reader(numbers), arrays["drawn"], numbers, self.k)
            counts = read_counts(arrays["counts"], numbers, ids[:, self.k :])
            log_probs = read_log_probs(arrays, numbers, self.bits, ids)
            return {
                "ids": torch.from_numpy(ids),
                "log_probs": log_probs,
                "counts": torch.from_numpy(counts),
                **read_scalars(arrays, numbers),
            }

        return read

    def targets(self, columns: Columns, labels: Tensor) -> SparseLogits:
        """See `Encoding`."""
        depths, counts = columns["log_probs"], columns["counts"]  # of the greatest, which is in the head, 0
        normalisers, left, probs, rests = {}, {}, [], []
        for temperature, log_rest in zip(self.temperatures, columns["log_rests"].unbind(1), strict=True):
            masses = weights_of(depths, temperature)
            # No draw is likelier than any of the head, so that both sums are as precise as their terms.
            level = normaliser(masses[:, : self.k].sum(1), log_rest)
            probs.append(masses.mul_((-level).exp_()[:, None]))
            rests.append(log_rest.exp())
            normalisers[temperature] = level
            beside = 1 - masses[:, self.k :].sum(1) / rests[-1]
            left[temperature] = log_rest + beside.clamp_(min=_LEAST_SHARE).log_()
        at_one, masses = normalisers.pop(1.0), probs[0]
        # A draw stands for p at T = 1 over what it was drawn in proportion to.
        if len(probs) > 1:
            counts.mul_((masses / sum(probs).clamp_(min=_TINY))[:, self.k :])
        torch.mul(counts, (sum(rests) / self.draws)[:, None], out=masses[:, self.k :])
        return SparseLogits(
            ids=columns["ids"],
            log_probs=depths.sub_(at_one[:, None]),
            masses=masses,
            log_normalisers={t: level - at_one / t for t, level in normalisers.items()},
            entropies=dict(zip(self.temperatures, columns["entropies"].unbind(1), strict=True)),
            labels=labels,
            label_log_probs=columns["label_log_probs"],
            vocab_size=self.vocab_size,
            log_rests=left,
        )

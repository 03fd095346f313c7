"""Encodings that draw tokens, so that distillation from them is right on average (arXiv 2503.16870)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache.base import LogitsEncoding, at_least
from hf_distill.cache.draw import draw, pack_counts, unpack_counts
from hf_distill.cache.encoding import Arrays, Columns
from hf_distill.cache.ids import SetReader, pack_sets
from hf_distill.cache.observe import Block, log_probs_of
from hf_distill.cache.sparse import check_head, known_ids, label_log_probs, read_log_probs
from hf_distill.cache.values import normaliser, pack_scalars, quantise, read_scalars
from hf_distill.functional.sparse import SparseLogits


# Of what lies beyond an exact head, this share at least is left for the tokens that were not drawn: log-probabilities
# in few bits may add up to more.
_LEAST_SHARE = 2**-10


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
        spread = block.spread(1.0, entropy=True)
        assert spread.entropy is not None
        ids, counts = draw(spread.probs, uniforms, self.draws)
        return {
            "ids": ids.int(),
            "counts": counts.int(),
            "label_log_probs": label_log_probs(block, labels, spread),
            "entropies": spread.entropy.float()[:, None],
        }

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        arrays, order = pack_sets(columns["ids"].numpy(), self.vocab_size)
        counts = np.take_along_axis(columns["counts"].numpy(), order, 1)
        return {**arrays, "counts": pack_counts(counts), **pack_scalars(columns)}

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        reader = SetReader(arrays, self.vocab_size, self.draws)

        def read(numbers: np.ndarray) -> Columns:
            ids, _ = reader(numbers)
            counts = unpack_counts(arrays["counts"][numbers], self.draws)
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
            ids=columns["ids"][:, :used].long(),
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
        entropies, rests = [], []
        columns: dict[str, Tensor] = {}
        for temperature in self.temperatures:
            spread = block.spread(temperature, entropy=True)
            entropies.append(spread.entropy)
            rests.append(spread.take_out_(ids))
            if temperature == 1.0:
                tail_ids, tail_counts = draw(spread.probs, uniforms, self.draws)
                tail = block.logits.gather(1, tail_ids.clamp(min=0))
                log_probs = log_probs_of(values, spread.log_total)
                columns = {
                    "ids": known_ids(ids, log_probs),
                    "log_probs": log_probs,
                    "tail_ids": tail_ids.int(),
                    "tail_log_probs": log_probs_of(tail, spread.log_total).masked_fill_(tail_ids < 0, -math.inf),
                    "tail_counts": tail_counts.int(),
                    "label_log_probs": label_log_probs(block, labels, spread),
                }
        return columns | {
            "entropies": torch.stack(entropies, 1).float(),
            "log_rests": torch.stack(rests, 1).log().float(),
        }

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        codes, steps = quantise(torch.cat([columns["log_probs"], columns["tail_log_probs"]], 1), self.bits)
        head, _ = pack_sets(columns["ids"].numpy(), self.vocab_size, codes[:, : self.k], self.bits)
        tail, order = pack_sets(columns["tail_ids"].numpy(), self.vocab_size, codes[:, self.k :], self.bits)
        counts = np.take_along_axis(columns["tail_counts"].numpy(), order, 1)
        return {
            **{f"head.{name}": array for name, array in head.items()},
            **{f"tail.{name}": array for name, array in tail.items()},
            "steps": steps,
            "counts": pack_counts(counts),
            **pack_scalars(columns),
        }

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        head, tail = (
            SetReader(
                {name.removeprefix(part): array for name, array in arrays.items() if name.startswith(part)},
                self.vocab_size,
                slots,
                self.bits,
            )
            for part, slots in (("head.", self.k), ("tail.", self.draws))
        )

        def read(numbers: np.ndarray) -> Columns:
            steps = arrays["steps"][numbers]
            (ids, codes), (tail_ids, tail_codes) = head(numbers), tail(numbers)
            log_probs = read_log_probs(codes, steps, ids)
            scalars = read_scalars(arrays, numbers)
            level = normaliser(log_probs, scalars["log_rests"][:, 0])[:, None]
            return {
                "ids": torch.from_numpy(ids),
                "log_probs": log_probs - level,
                "tail_ids": torch.from_numpy(tail_ids),
                "tail_log_probs": read_log_probs(tail_codes, steps, tail_ids) - level,
                "tail_counts": torch.from_numpy(unpack_counts(arrays["counts"][numbers], self.draws)),
                **scalars,
            }

        return read

    def targets(self, columns: Columns, labels: Tensor) -> SparseLogits:
        """See `Encoding`."""
        head, tail = columns["log_probs"], columns["tail_log_probs"]
        rests = dict(zip(self.temperatures, columns["log_rests"].unbind(1), strict=True))
        normalisers = {t: normaliser(head, rests[t], t) for t in self.temperatures}
        tail_masses = columns["tail_counts"] * (rests[1.0].exp() / self.draws)[:, None]
        return SparseLogits(
            ids=torch.cat([columns["ids"], columns["tail_ids"]], 1).long(),
            log_probs=torch.cat([head, tail], 1),
            masses=torch.cat([head.exp(), tail_masses], 1),
            log_normalisers={t: normaliser for t, normaliser in normalisers.items() if t != 1.0},
            entropies=dict(zip(self.temperatures, columns["entropies"].unbind(1), strict=True)),
            labels=labels,
            label_log_probs=columns["label_log_probs"],
            vocab_size=self.vocab_size,
            log_rests={t: _beyond(tail / t - normalisers[t][:, None], rests[t]) for t in self.temperatures},
        )


def _beyond(tail: Tensor, log_rest: Tensor) -> Tensor:
    """The logarithm of the mass that is left of a rest, `[n]`, beside tokens that were drawn from it, `[n, M]`."""
    share = (tail.logsumexp(1) - log_rest).exp().nan_to_num(0.0)
    return log_rest + (1 - share).clamp(min=_LEAST_SHARE).log()

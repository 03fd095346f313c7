"""Distributions of which somebody else kept the most likely tokens, on their way into a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from hf_distill.cache.encoding import Columns, Encoding
from hf_distill.cache.sparse import TopK


# What log-probabilities in fp32 cannot tell from no mass at all.
NO_REST = 2.0**-24


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens of N distributions.

    Args:
        ids: `[N, k]` int64.
        log_probs: Of the ids, `[N, k]` float64; -inf for none.
        labels: The tokens that followed, `[N]` int64.
        label_log_probs: Of these, `[N]` float64.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    labels: np.ndarray
    label_log_probs: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """The probability of the ids, `[N]`."""
        return np.exp(self.log_probs).sum(1)

    @property
    def has_label(self) -> np.ndarray:
        """Whether the token that followed is among the ids, `[N]` bool."""
        return (self.ids == self.labels[:, None]).any(1)


def join(parts: Sequence[TopTokens]) -> TopTokens:
    """Several, one after another."""
    names = [entry.name for entry in fields(TopTokens)]
    return TopTokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def topk_columns(top: TopTokens, vocab_size: int) -> Columns:
    """The columns of the encoding `topk` at temperature 1.

    The entropy is that of the ids and the rest together, a lower bound: how the rest is spread is not known. Ids that
    have more than all of the mass, by rounding or worse, are brought to 1.
    """
    excess = np.log(np.maximum(top.mass, 1))
    top = replace(
        top,
        log_probs=top.log_probs - excess[:, None],
        label_log_probs=top.label_log_probs - np.where(top.has_label, excess, 0),
    )
    order = np.argsort(-top.log_probs, axis=1, kind="stable")  # unused slots come last
    log_probs = np.take_along_axis(top.log_probs, order, axis=1)
    ids = np.take_along_axis(top.ids, order, axis=1)
    # The others have some probability, if less than is known of it.
    rests = np.maximum(1 - top.mass, NO_REST) if ids.shape[1] < vocab_size else np.zeros(len(ids))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rests = np.log(rests)
        outcomes = np.concatenate([log_probs, log_rests[:, None]], axis=1)
        terms = np.exp(outcomes) * outcomes
    return {
        "ids": torch.from_numpy(np.where(log_probs > -math.inf, ids, -1)).int(),
        "log_probs": torch.from_numpy(log_probs).float(),
        "label_log_probs": torch.from_numpy(top.label_log_probs).float(),
        "entropies": torch.from_numpy(-np.nansum(terms, axis=1)).float()[:, None],
        "log_rests": torch.from_numpy(log_rests).float()[:, None],
    }


def topk_of(encoding: Encoding, source: str) -> TopK:
    """The encoding, if it is `topk` at temperature 1.

    Args:
        encoding: Any.
        source: Who keeps the most likely tokens only, for the message.

    Raises:
        ValueError: It is another one, or is to be read at other temperatures.
    """
    if not isinstance(encoding, TopK):
        raise ValueError(
            f"`encoding` is {encoding.name!r}, and {source} gives the most likely tokens only; use encoding='topk'."
        )
    if others := [temperature for temperature in encoding.temperatures if temperature != 1.0]:
        raise ValueError(
            f"`temperatures` holds {others}, and {source} gives log-probabilities at 1: bringing them to another "
            "temperature takes the sum over the whole vocabulary. Use temperatures=(1.0,), or load the teacher here."
        )
    return encoding

"""Distributions of which somebody else kept the most likely tokens, on their way into a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


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

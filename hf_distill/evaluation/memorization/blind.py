"""A baseline that reads the rows and never the model: what tells members from non-members besides the training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


FOLDS = 5
SMOOTHING = 1.0
# Of log-lengths: rows of one length have none.
LEAST_DEVIATION = 0.05


def blind_scores(
    members: Sequence[Sequence[int]], non_members: Sequence[Sequence[int]], vocab_size: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Score rows by a naive Bayes classifier of their tokens and their length, trained on the other folds.

    Where it beats a guess, the two sets were drawn differently, and an attack that beats a guess as well may have seen
    that alone (Das et al., Blind Baselines Beat Membership Inference Attacks, arXiv 2406.16201).

    Args:
        members: Token ids of each row.
        non_members: The same.
        vocab_size: Ids are below it.
        seed: Of the folds.

    Returns:
        `[m]` and `[n]`: the rank of each row in its fold, in (0, 1), which can be compared between folds where the
        odds of differently trained classifiers cannot.
    """
    rows = [*members, *non_members]
    is_member = np.arange(len(rows)) < len(members)
    present = [np.unique(np.asarray(row, dtype=np.int64)) for row in rows]
    lengths = np.array([math.log(len(row)) for row in rows])
    generator = np.random.default_rng(seed)
    fold = np.empty(len(rows), dtype=np.int64)
    for side in (is_member, ~is_member):
        fold[generator.permutation(np.flatnonzero(side))] = np.arange(side.sum()) % FOLDS
    scores = np.empty(len(rows))
    for held_out in range(FOLDS):
        inside = np.flatnonzero(fold == held_out)
        sides = [np.flatnonzero((fold != held_out) & side) for side in (is_member, ~is_member)]
        tokens = _token_odds(*([present[i] for i in side] for side in sides), vocab_size)
        odds = np.array([tokens[present[i]].sum() for i in inside])
        scores[inside] = _ranks(odds + _length_odds(*(lengths[side] for side in sides), lengths[inside]))
    return scores[is_member], scores[~is_member]


def _token_odds(members: list[np.ndarray], non_members: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """Log-odds `[V]` of a member for a row that holds a token."""
    logs = []
    for side in (members, non_members):
        counts = np.bincount(np.concatenate(side), minlength=vocab_size) + SMOOTHING
        logs.append(np.log(counts / counts.sum()))
    return logs[0] - logs[1]


def _length_odds(members: np.ndarray, non_members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Log-odds of a member for rows of some log-lengths, from a normal distribution of each side."""
    logs = []
    for side in (members, non_members):
        deviation = max(side.std(), LEAST_DEVIATION)
        logs.append(-0.5 * ((lengths - side.mean()) / deviation) ** 2 - math.log(deviation))
    return logs[0] - logs[1]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1), ties sharing their mean."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return middle[index] / (len(values) + 1)

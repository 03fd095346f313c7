"""A baseline that reads the rows and never the model: what tells members from non-members besides the training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


SMOOTHING = 1.0
# Of log-lengths: rows of one length have none.
LEAST_DEVIATION = 0.05


def blind_scores(
    members: Sequence[Sequence[int]], non_members: Sequence[Sequence[int]], vocab_size: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Score half of the rows by naive Bayes on which tokens they hold and how long they are, learned from the others.

    Where it beats a guess, the two sets were drawn differently, and an attack that beats a guess as well may have seen
    that alone (Das et al., Blind Baselines Beat Membership Inference Attacks, arXiv 2406.16201). Two halves, and not
    folds: scores of folds depend on one another, and a bootstrap over them is too sure.

    Args:
        members: Token ids of each row.
        non_members: The same.
        vocab_size: Ids are below it.
        seed: Of the halves.

    Returns:
        Log-odds of being a member, of about half of the members and half of the non-members.
    """
    generator = np.random.default_rng(seed)
    learned, held_out = [], []
    for side in (members, non_members):
        order = generator.permutation(len(side))
        rows = [np.asarray(side[i], dtype=np.int64) for i in order]
        learned.append(rows[: len(rows) // 2])
        held_out.append(rows[len(rows) // 2 :])
    tokens = _token_odds(learned[0], learned[1], vocab_size)
    lengths = [_log_lengths(side) for side in learned]
    scores = [
        np.array([tokens[np.unique(row)].sum() for row in side])
        + _length_odds(lengths[0], lengths[1], _log_lengths(side))
        for side in held_out
    ]
    return scores[0], scores[1]


def _token_odds(members: list[np.ndarray], non_members: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """What a token `[V]` adds to the log-odds of a member in a row that holds it, over one that does not."""
    logits = []
    for side in (members, non_members):
        holding = np.bincount(np.concatenate([np.unique(row) for row in side]), minlength=vocab_size)
        logits.append(np.log(holding + SMOOTHING) - np.log(len(side) - holding + SMOOTHING))
    return logits[0] - logits[1]


def _log_lengths(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([math.log(len(row)) for row in rows])


def _length_odds(members: np.ndarray, non_members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Log-odds of a member for rows of some log-lengths, from a normal distribution of each side."""
    logs = []
    for side in (members, non_members):
        deviation = max(side.std(), LEAST_DEVIATION)
        logs.append(-0.5 * ((lengths - side.mean()) / deviation) ** 2 - math.log(deviation))
    return logs[0] - logs[1]

"""How well scores tell members from non-members: AUC and true positive rate, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hf_distill.evaluation.bootstrap import RESAMPLES, interval
from hf_distill.evaluation.memorization.report import Attack


# Carlini et al., arXiv 2112.03570: an attack matters where it raises few false alarms.
FALSE_POSITIVE_RATE = 0.01
# With fewer non-members no threshold has a rate that is above 0 and at most the one asked for.
LEAST_NON_MEMBERS = round(1 / FALSE_POSITIVE_RATE)


def separate(name: str, members: np.ndarray, non_members: np.ndarray, seed: int = 0) -> Attack:
    """Judge scores that are meant to be higher for members.

    The AUC is not flipped: below 0.5 the attack is wrong more often than a guess, which is no success.

    Args:
        name: Of the attack.
        members: `[m]` scores.
        non_members: `[n]` scores.
        seed: Of the resampling, which draws members and non-members apart.

    Returns:
        AUC, and from 100 non-members on the true positive rate at 1 % false positives; with 95 % intervals.
    """
    values, index = np.unique(np.concatenate([members, non_members]), return_inverse=True)
    sides = index[: len(members)], index[len(members) :]
    counts = [np.bincount(side, minlength=len(values)) for side in sides]
    known = len(non_members) >= LEAST_NON_MEMBERS
    statistics: list[Callable[[np.ndarray, np.ndarray], float]] = [auc, true_positive_rate] if known else [auc]
    generator = np.random.default_rng(seed)
    replicates = np.empty((RESAMPLES, len(statistics)))
    for i in range(RESAMPLES):
        draws = [
            np.bincount(side[generator.integers(len(side), size=len(side))], minlength=len(values)) for side in sides
        ]
        replicates[i] = [statistic(*draws) for statistic in statistics]
    (auc_low, auc_high), *rest = (interval(column) for column in replicates.T)
    tpr_low, tpr_high = rest[0] if rest else (None, None)
    rate = float(true_positive_rate(*counts)) if known else None
    return Attack(name, float(auc(*counts)), auc_low, auc_high, rate, tpr_low, tpr_high)


def auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """The probability that a member scores higher than a non-member, ties counting half.

    Args:
        members: `[K]`, how many members have each score, from the lowest to the highest.
        non_members: `[K]`, the same of non-members.
    """
    below = np.cumsum(non_members) - non_members / 2
    return (members * below).sum() / (members.sum() * non_members.sum())


def true_positive_rate(members: np.ndarray, non_members: np.ndarray, rate: float = FALSE_POSITIVE_RATE) -> float:
    """The share of members above the lowest threshold that at most `rate` of the non-members are above.

    Args:
        members: `[K]`, how many members have each score, from the lowest to the highest.
        non_members: `[K]`, the same of non-members.
        rate: Of false positives.
    """
    above = non_members.sum() - np.cumsum(non_members)  # above each score
    lowest = int(np.argmax(above <= rate * non_members.sum()))
    return members[lowest + 1 :].sum() / members.sum()


def threshold(non_members: np.ndarray, rate: float = FALSE_POSITIVE_RATE) -> float:
    """The lowest score that at most `rate` of the non-members are above."""
    return float(np.sort(non_members)[::-1][int(rate * len(non_members))])

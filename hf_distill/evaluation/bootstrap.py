"""Retention of one value against another, and its paired bootstrap interval over items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 2000
CONFIDENCE = 0.95
# Counted draws per block of resamples: 32 MB of float64.
BLOCK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over rows, which is None where there is none, as for a single row."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ItemScores:
    """What one model got on each item (a document, a row): the mean is the sum of numerators over that of weights.

    Args:
        numerator: `[n]` float64, for example the summed negative log-likelihood of a document, or `[n, k]` where the
            metric is a function of k means.
        weight: `[n]` float64, > 0, for example its number of labelled tokens.
    """

    numerator: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    def mean(self) -> np.ndarray | float:
        """The weighted mean over items, one number or `[k]`; NaN or infinite where the model's outputs are."""
        if self.numerator.ndim == 1:
            # Python adds in the order of the items, as the libraries do whose figures are compared to the last digit.
            return sum(self.numerator.tolist()) / sum(self.weight.tolist())
        return self.numerator.sum(axis=0) / self.weight.sum()


def retention(
    student: np.ndarray | float, teacher: np.ndarray | float, *, higher_is_better: bool, chance: float = 0.0
) -> np.ndarray:
    """How much of the teacher's value the student keeps, elementwise.

    Args:
        student: Values of the student, any shape.
        teacher: Values of the teacher, same shape.
        higher_is_better: Decides between (student - chance) / (teacher - chance) and teacher / student.
        chance: The value of a guess; used only where higher is better.

    Returns:
        Retention in the shape of the values, 1.0 where the student equals the teacher; NaN where it is not defined: a
        teacher no better than chance, or a lower-is-better value of 0.
    """
    student, teacher = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    gained, available = (student - chance, teacher - chance) if higher_is_better else (teacher, student)
    above = (available > 0) & (teacher > (chance if higher_is_better else 0.0))
    defined = above & np.isfinite(gained) & np.isfinite(available)
    return np.divide(gained, available, out=np.full(np.shape(gained), np.nan), where=defined)


def resampled_means(scores: Sequence[ItemScores], *, resamples: int = RESAMPLES, seed: int = 0) -> list[np.ndarray]:
    """Draw items with replacement and take the mean of every model on each draw.

    All models see the same draws (paired), and so do benchmarks with the same number of items, which is what makes
    the interval of a mean over benchmarks on the same dataset right (Efron and Tibshirani, 1993, chapter 8).

    Args:
        scores: One per model, all of n items.
        resamples: Number of draws R.
        seed: Of a generator of its own; no global random state moves.

    Returns:
        One array per model, `[R]`, or `[R, k]` where the numerators are `[n, k]`.
    """
    generator = np.random.default_rng(seed)
    items = len(scores[0])
    blocks: list[list[np.ndarray]] = [[] for _ in scores]
    for start in range(0, resamples, step := max(1, BLOCK // items)):
        draw = generator.integers(items, size=(min(step, resamples - start), items))
        # How often each item was drawn: the sums over a draw are then one product.
        draw += items * np.arange(len(draw))[:, None]
        counts = np.bincount(draw.ravel(), minlength=draw.size).reshape(draw.shape).astype(np.float64)
        for means, score in zip(blocks, scores, strict=True):
            sums, weights = counts @ score.numerator, counts @ score.weight
            means.append(sums / weights.reshape(-1, *[1] * (sums.ndim - 1)))
    return [np.concatenate(means) for means in blocks]


def interval(replicates: np.ndarray) -> tuple[float | None, float | None]:
    """The central 95 % of bootstrap replicates `[R]`; (None, None) where one of them is not defined."""
    if not np.isfinite(replicates).all():
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)

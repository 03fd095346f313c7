"""Benchmarks of classifiers: accuracy and macro F1, with the chance level that retention is counted from."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_distill.evaluation.benchmarks import DatasetBenchmark
from hf_distill.evaluation.bootstrap import ItemScores
from hf_distill.evaluation.rows import CLASSIFICATION
from hf_distill.evaluation.scoring import Lineup


if TYPE_CHECKING:
    from datasets import Dataset

# So many times the chance level for always giving the same answer is worth a warning.
UNEVEN = 1.5


class ClassificationAccuracy(DatasetBenchmark):
    """The share of rows whose most likely class is the label, as the shipped `accuracy` metric defines it.

    Args:
        dataset: Rows as those of every `DatasetBenchmark`.
        chance: The value that a guess reaches; one over the number of classes if None. Where one class is frequent,
            its share is what a student that has learned nothing reaches.
        **kwargs: Arguments of `DatasetBenchmark`.

    Raises:
        ValueError: `chance` is not from 0 to below 1; see also `DatasetBenchmark`.
    """

    metric = "accuracy"
    higher_is_better = True
    tasks = frozenset({CLASSIFICATION})
    statistic = "correct"

    def __init__(self, dataset: Dataset, *, chance: float | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self._chance = check_chance(chance)

    def check(self, lineup: Lineup) -> None:
        """Check the labels too, and warn where one class is so frequent that the chance level says little."""
        super().check(lineup)
        constant = self._constant_answer(lineup)
        if constant == 1:
            warnings.warn(f"All labels of {self.name!r} are one class; add rows of the others.", stacklevel=4)
        elif self._chance is None and constant > UNEVEN * self.chance(lineup):
            warnings.warn(
                f"A model that always answers the most frequent class reaches {constant:.3g} on {self.name!r}, far "
                f"above the chance level of {self.chance(lineup):.3g}, so it would seem to keep much of the teacher; "
                f"count from there: `{type(self).__name__}(dataset, chance={constant:.3g})`.",
                stacklevel=4,
            )

    def chance(self, lineup: Lineup) -> float:
        """One over the number of classes, unless another value was given."""
        return 1.0 / lineup.classes() if self._chance is None else self._chance

    def _constant_answer(self, lineup: Lineup) -> float:
        """What the most frequent class reaches where it is always answered."""
        return float(self._label_shares(lineup).max())

    def _label_shares(self, lineup: Lineup) -> np.ndarray:
        """How frequent each class is, `[C]`."""
        return np.bincount(self._labels(lineup), minlength=lineup.classes()) / len(self._labels(lineup))

    def _labels(self, lineup: Lineup) -> np.ndarray:
        return np.array([row["labels"] for row in lineup.rows(self.dataset, self.max_length)])


class ClassificationF1(ClassificationAccuracy):
    """The mean of the F1 of every class that is a label or an answer, as the shipped `f1` metric defines it (macro).

    Its chance level is what answers drawn evenly from the classes reach: for C classes of shares p the mean of
    2 p / (C p + 1), one over the number of classes where they are equally frequent.
    """

    metric = "f1"

    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """Per row and class: both label and answer, and how often it is either."""
        gold = np.eye(lineup.classes())[self._labels(lineup)]
        passes = lineup.row_sums(self.dataset, self.max_length, self.batch_size)
        scores = {}
        for role, rows in passes.items():
            answers = np.eye(lineup.classes())[rows.answers]
            # A model whose outputs are not numbers has answered nothing.
            answers[np.isnan(rows.sums["nll"])] = np.nan
            scores[role] = ItemScores(np.concatenate([gold * answers, gold + answers], axis=1), rows.count)
        return scores

    def value(self, mean: np.ndarray | float) -> np.ndarray | float:
        """The macro F1 from the means per class."""
        hits, either = np.split(np.asarray(mean), 2, axis=-1)
        with np.errstate(invalid="ignore"):
            f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either != 0)
        return f1.sum(axis=-1) / (either != 0).sum(axis=-1)

    def chance(self, lineup: Lineup) -> float:
        """What answers drawn evenly from the classes reach, unless another value was given."""
        if self._chance is not None:
            return self._chance
        shares = self._label_shares(lineup)
        return float(np.mean(2 * shares / (len(shares) * shares + 1)))

    def _constant_answer(self, lineup: Lineup) -> float:
        shares = self._label_shares(lineup)
        return float(2 * shares.max() / (1 + shares.max()) / np.count_nonzero(shares))


def check_chance(chance: float | None) -> float | None:
    """Check a chance level that a caller gave.

    Raises:
        ValueError: It is not from 0 to below 1.
    """
    if chance is not None and not 0 <= chance < 1:
        raise ValueError(f"`chance` is {chance}; expected the value of a guess, for example `chance=0.25`.")
    return chance

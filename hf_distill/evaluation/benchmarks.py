"""What retention is measured on: a metric, its items, and what each model gets on each item."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hf_distill.evaluation.bootstrap import ItemScores
from hf_distill.evaluation.rows import CLASSIFICATION, check_dataset
from hf_distill.evaluation.scoring import Lineup


if TYPE_CHECKING:
    from datasets import Dataset

LANGUAGE_MODELS = frozenset({"causal_lm", "masked_lm"})
ALL_TASKS = LANGUAGE_MODELS | {CLASSIFICATION}


class Benchmark(ABC):
    """A metric on a set of items.

    A new benchmark says what it measures (`metric`, `higher_is_better`, `tasks`, `chance`) and gives every model's
    sums per item; the value, the retention and its interval follow from them. It never trains on its items, and
    keeps nothing of them once it has been measured.

    Args:
        name: How reports call it.
        license: Licence of the items, for reports and cards.
    """

    metric: str
    higher_is_better: bool
    tasks: ClassVar[frozenset[str]]

    def __init__(self, name: str | None = None, license: str | None = None) -> None:
        self.name = name or self.metric
        self.license = license

    def check(self, lineup: Lineup) -> None:
        """Check the items against the models before any of them runs.

        Raises:
            ValueError: The models' task is not one that this benchmark measures.
        """
        if lineup.task not in self.tasks:
            raise ValueError(
                f"{type(self).__name__} measures {' and '.join(sorted(self.tasks))} models, but the models' task is "
                f"{lineup.task}; pass a benchmark of that task instead."
            )

    @abstractmethod
    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """Give every role's sums per item; item i is the same for all roles."""

    def chance(self, lineup: Lineup) -> float:
        """The value that a guess reaches; retention counts what lies above it. Asked for after `score`."""
        return 0.0

    def value(self, mean: np.ndarray | float) -> np.ndarray | float:
        """The metric, from the weighted means over items: a number, `[R]`, `[k]` or `[R, k]`; see `ItemScores`."""
        return mean


class DatasetBenchmark(Benchmark):
    """A metric read from one pass of the models over a dataset; benchmarks on the same dataset share the pass.

    Args:
        dataset: Rows of `text`, or of `input_ids` with optional `labels` (-100 is not scored), `attention_mask`,
            `token_type_ids`, `completion_mask` and `assistant_masks`; classifiers need `label` or `labels`.
        max_length: Longer rows are cut. None leaves `input_ids` whole and cuts text at what the tokenizer allows.
        batch_size: Rows per forward pass.
        name: How reports call it; the metric's name when not given.
        license: Licence of the rows.

    Raises:
        ValueError: The dataset is empty, packed, or has no usable column; `max_length` or `batch_size` is below 1.
    """

    statistic: ClassVar[str]

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        name: str | None = None,
        license: str | None = None,
    ) -> None:
        super().__init__(name, license)
        check_dataset(dataset)
        check_positive(max_length=max_length, batch_size=batch_size)
        self.dataset = dataset
        self.max_length = max_length
        self.batch_size = batch_size

    def check(self, lineup: Lineup) -> None:
        """Check task, tokenizer, columns and labels.

        Raises:
            ValueError: One of them does not fit the models.
        """
        super().check(lineup)
        if lineup.task == CLASSIFICATION:
            lineup.classes()
        lineup.rows(self.dataset, self.max_length)

    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """Read this metric's sums per row."""
        passes = lineup.row_sums(self.dataset, self.max_length, self.batch_size)
        return {role: ItemScores(rows.sums[self.statistic], rows.count) for role, rows in passes.items()}


class Perplexity(DatasetBenchmark):
    """exp of the mean negative log-likelihood per labelled token, over each model's full vocabulary."""

    metric = "perplexity"
    higher_is_better = False
    tasks = LANGUAGE_MODELS
    statistic = "nll"

    def value(self, mean: np.ndarray | float) -> np.ndarray | float:
        """Exp of the mean; infinite where it overflows."""
        with np.errstate(over="ignore"):
            return np.exp(mean)


class KLDivergence(DatasetBenchmark):
    """Mean KL(teacher || student) at temperature 1 per labelled position, in nats.

    It has no retention: the teacher's own value is 0. Where vocabularies are padded to different sizes, the shared
    part counts.
    """

    metric = "kl"
    higher_is_better = False
    tasks = ALL_TASKS
    statistic = "kl"


class Top1Agreement(DatasetBenchmark):
    """The share of labelled positions where student and teacher rank the same token (or class) first."""

    metric = "top1_agreement"
    higher_is_better = True
    tasks = ALL_TASKS
    statistic = "agreement"


class ExpectedCalibrationError(DatasetBenchmark):
    """How far confidence is from accuracy: the mean over labelled positions of |accuracy - confidence| in 15 bins.

    The bins are of equal width in the probability of the token (or class) that is ranked first (Guo et al., 2017,
    arXiv:1706.04599). On few positions it is biased upwards, in every bootstrap draw again: give it some thousands.
    """

    metric = "ece"
    higher_is_better = False
    tasks = ALL_TASKS

    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """Read the gaps per row and bin."""
        passes = lineup.row_sums(self.dataset, self.max_length, self.batch_size)
        return {role: ItemScores(rows.gaps, rows.count) for role, rows in passes.items()}

    def value(self, mean: np.ndarray | float) -> np.ndarray | float:
        """The gaps of the bins without their signs, added up."""
        return np.abs(mean).sum(axis=-1)


def check_positive(**numbers: int | None) -> None:
    """Check sizes that a caller gave.

    Raises:
        ValueError: One is below 1.
    """
    for argument, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{argument}` is {number}; expected at least 1, for example `{argument}=8`.")

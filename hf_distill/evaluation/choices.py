"""Multiple choice by likelihood, on rows that the user has: no harness, no Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_distill.evaluation.benchmarks import Benchmark, check_positive
from hf_distill.evaluation.bootstrap import ItemScores
from hf_distill.evaluation.scoring import Lineup
from hf_distill.signals import IGNORE_INDEX


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = {"context", "choices", "answer"}


class MultipleChoice(Benchmark):
    """The share of items whose right choice is the likeliest continuation, per token, of the context.

    As lm-eval's `acc_norm`, with tokens in place of characters. Context and choice are tokenized apart: begin choices
    with the space that separates them.

    Args:
        dataset: Rows of `context` (text), `choices` (texts, equally many in all rows) and `answer` (an index).
        batch_size: Continuations per forward pass.
        name: How reports call it.
        license: Licence of the rows.

    Raises:
        ValueError: A column is missing, rows have unequal numbers of choices, or an answer is not among them.
    """

    metric = "accuracy"
    higher_is_better = True
    tasks = frozenset({"causal_lm"})

    def __init__(
        self, dataset: Dataset, *, batch_size: int = 8, name: str = "multiple_choice", license: str | None = None
    ) -> None:
        super().__init__(name, license)
        check_positive(batch_size=batch_size)
        if not set(dataset.column_names) >= COLUMNS:
            raise ValueError(f"`dataset` has the columns {dataset.column_names}; expected {sorted(COLUMNS)}.")
        counts = {len(choices) for choices in dataset["choices"]}
        if len(counts) != 1 or min(counts) < 2:
            raise ValueError(f"`choices` has {sorted(counts)} entries a row; expected one number, at least 2.")
        self.count = counts.pop()
        self.answers = np.array(dataset["answer"])
        if self.answers.min() < 0 or self.answers.max() >= self.count:
            raise ValueError(f"`answer` goes to {self.answers.max()}; expected 0 to {self.count - 1}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self._rows: Dataset | None = None

    def check(self, lineup: Lineup) -> None:
        """Check the task, and that there is a tokenizer.

        Raises:
            ValueError: One of them does not fit.
        """
        super().check(lineup)
        if lineup.tokenizer is None:
            raise ValueError(f"{type(self).__name__} reads texts; pass `tokenizer=` to `evaluate_retention`.")
        self._rows = self._tokenized(lineup.tokenizer)
        lineup.rows(self._rows, None)

    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """1 where the likeliest choice is the answer."""
        assert self._rows is not None  # `check` comes first
        passes = lineup.row_sums(self._rows, None, self.batch_size)
        return {role: self._correct(rows.sums["nll"] / rows.count) for role, rows in passes.items()}

    def chance(self, lineup: Lineup) -> float:
        """One over the number of choices."""
        return 1.0 / self.count

    def _correct(self, nll: np.ndarray) -> ItemScores:
        found = nll.reshape(-1, self.count).argmin(axis=1) == self.answers
        return ItemScores(found.astype(np.float64), np.ones(len(found)))

    def _tokenized(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """One row for each choice, with labels on the choice alone."""
        from datasets import Dataset

        rows = []
        for item in self.dataset:
            context = tokenizer(item["context"])["input_ids"]
            for choice in item["choices"]:
                ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
                rows.append({"input_ids": context + ids, "labels": [IGNORE_INDEX] * len(context) + ids})
        return Dataset.from_list(rows)

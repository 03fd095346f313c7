"""The share of texts that equal their reference, as a metric of the `evaluate` library."""

# `evaluate` scans this file for imports with a regular expression: one per line, at the top level.
import datasets
import evaluate
import numpy as np

from hf_distill.evaluation.text_scores import exact_match


class ExactMatch(evaluate.Metric):
    """Exact match but for white space around. The same definition as `hf_distill.evaluation.ExactMatch`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of texts that equal their reference but for white space around, from 0 to 1.",
            citation="",
            inputs_description="predictions, references: texts, one per item.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"exact_match": float(np.mean([*map(exact_match, predictions, references)]))}

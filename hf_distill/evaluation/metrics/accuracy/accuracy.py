"""The share of predictions that equal their reference, as a metric of the `evaluate` library."""

# `evaluate` scans this file for imports with a regular expression: one per line, at the top level.
import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Accuracy of class ids. The same definition as `hf_distill.evaluation.ClassificationAccuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference, from 0 to 1.",
            citation="",
            inputs_description="predictions, references: class ids, one per item.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}

"""The mean of the F1 of all classes, as a metric of the `evaluate` library."""

# `evaluate` scans this file for imports with a regular expression: one per line, at the top level.
import datasets
import evaluate
import numpy as np


class F1(evaluate.Metric):
    """Macro F1 of class ids. The same definition as `hf_distill.evaluation.ClassificationF1`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1, averaged over the classes that are a prediction or a reference, from 0 to 1.",
            citation="",
            inputs_description="predictions, references: class ids, one per item.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        answers, labels = np.array(predictions), np.array(references)
        classes = np.union1d(answers, labels)
        answered, is_label = answers == classes[:, None], labels == classes[:, None]
        scores = 2 * (answered & is_label).sum(1) / (answered.sum(1) + is_label.sum(1))
        return {"f1": float(scores.mean())}

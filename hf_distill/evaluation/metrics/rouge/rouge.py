"""ROUGE of generated texts, as a metric of the `evaluate` library."""

# `evaluate` scans this file for imports with a regular expression: one per line, at the top level.
import datasets
import evaluate
import numpy as np

from hf_distill.evaluation.text_scores import ROUGE_KINDS, rouge


class Rouge(evaluate.Metric):
    """ROUGE F-measures. The same definition as `hf_distill.evaluation.Rouge`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2 and ROUGE-L, F-measures averaged over items, from 0 to 1.",
            citation="Lin, 2004, https://aclanthology.org/W04-1013",
            inputs_description="predictions, references: texts, one per item.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [*zip(predictions, references, strict=True)]
        return {kind: float(np.mean([rouge(*pair, kind) for pair in pairs])) for kind in ROUGE_KINDS}

"""How much of its teacher a student keeps, measured on the same items with intervals."""

from hf_distill.evaluation.benchmarks import (
    Benchmark,
    ExpectedCalibrationError,
    KLDivergence,
    Perplexity,
    Top1Agreement,
)
from hf_distill.evaluation.classification import ClassificationAccuracy, ClassificationF1
from hf_distill.evaluation.footprint import Footprint
from hf_distill.evaluation.generation import ExactMatch, GenerationBenchmark, Rouge
from hf_distill.evaluation.harness import LMEvalTask
from hf_distill.evaluation.metrics import load_metric
from hf_distill.evaluation.report import RetentionReport, RetentionRow
from hf_distill.evaluation.retention import evaluate_retention
from hf_distill.evaluation.speed import tokens_per_second


__all__ = [
    "Benchmark",
    "ClassificationAccuracy",
    "ClassificationF1",
    "ExactMatch",
    "ExpectedCalibrationError",
    "Footprint",
    "GenerationBenchmark",
    "KLDivergence",
    "LMEvalTask",
    "Perplexity",
    "RetentionReport",
    "RetentionRow",
    "Rouge",
    "Top1Agreement",
    "evaluate_retention",
    "load_metric",
    "tokens_per_second",
]

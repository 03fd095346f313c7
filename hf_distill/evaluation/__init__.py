"""How much of its teacher a student keeps, measured on the same items with intervals."""

from hf_distill.evaluation.benchmarks import (
    Benchmark,
    ClassificationAccuracy,
    KLDivergence,
    Perplexity,
    Top1Agreement,
)
from hf_distill.evaluation.metrics import load_metric
from hf_distill.evaluation.retention import RetentionReport, RetentionRow, evaluate_retention
from hf_distill.evaluation.speed import tokens_per_second


__all__ = [
    "Benchmark",
    "ClassificationAccuracy",
    "KLDivergence",
    "Perplexity",
    "RetentionReport",
    "RetentionRow",
    "Top1Agreement",
    "evaluate_retention",
    "load_metric",
    "tokens_per_second",
]

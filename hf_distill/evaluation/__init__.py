"""How much of its teacher a student keeps, why it does not keep more, and what it gives away of its data."""

from hf_distill.evaluation.benchmarks import (
    Benchmark,
    ExpectedCalibrationError,
    KLDivergence,
    Perplexity,
    Top1Agreement,
)
from hf_distill.evaluation.choices import MultipleChoice
from hf_distill.evaluation.classification import ClassificationAccuracy, ClassificationF1
from hf_distill.evaluation.diagnostics import Diagnosis, diagnose, logged_shares
from hf_distill.evaluation.footprint import Footprint
from hf_distill.evaluation.generation import ExactMatch, GenerationBenchmark, Rouge
from hf_distill.evaluation.harness import LMEvalTask
from hf_distill.evaluation.memorization import MemorizationReport, audit_memorization
from hf_distill.evaluation.metrics import load_metric
from hf_distill.evaluation.report import RetentionReport, RetentionRow
from hf_distill.evaluation.retention import compare_retention, evaluate_retention
from hf_distill.evaluation.speed import tokens_per_second


__all__ = [
    "Benchmark",
    "ClassificationAccuracy",
    "ClassificationF1",
    "Diagnosis",
    "ExactMatch",
    "ExpectedCalibrationError",
    "Footprint",
    "GenerationBenchmark",
    "KLDivergence",
    "LMEvalTask",
    "MemorizationReport",
    "MultipleChoice",
    "Perplexity",
    "RetentionReport",
    "RetentionRow",
    "Rouge",
    "Top1Agreement",
    "audit_memorization",
    "compare_retention",
    "diagnose",
    "evaluate_retention",
    "load_metric",
    "logged_shares",
    "tokens_per_second",
]

"""How much of its teacher a student keeps, why it does not keep more, and what it gives away of its data."""

from hf_distill.evaluation.benchmarks import (
    Benchmark,
    ClassificationAccuracy,
    KLDivergence,
    Perplexity,
    Top1Agreement,
)
from hf_distill.evaluation.diagnostics import Diagnosis, diagnose, logged_shares
from hf_distill.evaluation.memorization import MemorizationReport, audit_memorization
from hf_distill.evaluation.metrics import load_metric
from hf_distill.evaluation.retention import RetentionReport, RetentionRow, evaluate_retention
from hf_distill.evaluation.speed import tokens_per_second


__all__ = [
    "Benchmark",
    "ClassificationAccuracy",
    "Diagnosis",
    "KLDivergence",
    "MemorizationReport",
    "Perplexity",
    "RetentionReport",
    "RetentionRow",
    "Top1Agreement",
    "audit_memorization",
    "diagnose",
    "evaluate_retention",
    "load_metric",
    "logged_shares",
    "tokens_per_second",
]

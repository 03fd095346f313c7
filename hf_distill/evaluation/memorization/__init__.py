"""What a model gives away of the rows that it was trained on."""

from hf_distill.evaluation.memorization.audit import audit_memorization
from hf_distill.evaluation.memorization.report import MemorizationReport


__all__ = ["MemorizationReport", "audit_memorization"]

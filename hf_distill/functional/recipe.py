"""What a loss consists of: its terms, their temperature, and what is measured beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.functional.divergences import check_temperature
from hf_distill.functional.registry import BoundDivergence, resolve_divergence, unknown_name


METRICS = ("student_nll", "teacher_nll", "top1_agreement", "kl", "student_entropy", "teacher_entropy")
# Those of the student alone.
STUDENT_METRICS = frozenset({"student_nll", "student_entropy"})
# Metrics that only one term can tell: the entropy of the distribution that the term moves the student to.
TERM_METRICS = {"target_entropy": "taid"}

Terms = Mapping[str, float | tuple[float, Mapping[str, Any]]]


@dataclass(frozen=True)
class Term:
    """One term of the loss; `divergence` is None for cross-entropy."""

    name: str
    weight: float
    divergence: BoundDivergence | None


@dataclass(frozen=True)
class Recipe:
    """What to compute from a tile of logits; `terms` and then `metrics` are the rows of its result."""

    terms: tuple[Term, ...]
    temperature: float
    metrics: tuple[str, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term or metric looks at the teacher."""
        return bool(self.divergences or self.teacher_metrics)

    @property
    def divergences(self) -> tuple[BoundDivergence, ...]:
        """Those of all terms."""
        return tuple(term.divergence for term in self.terms if term.divergence)

    @property
    def teacher_metrics(self) -> tuple[str, ...]:
        """The metrics that look at the teacher."""
        return tuple(name for name in self.metrics if name not in STUDENT_METRICS)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows of the result; a term and a metric may share a name."""
        return tuple(term.name for term in self.terms) + self.metrics


def resolve_recipe(terms: Terms, temperature: float, metrics: Sequence[str]) -> Recipe:
    """Check the terms, the temperature and the metrics of a loss before any tensor is touched.

    Raises:
        ValueError: For unknown names (with near ones), negative or all-zero weights, or a temperature <= 0.
    """
    check_temperature(temperature)
    resolved = []
    for name, value in terms.items():
        weight, kwargs = value if isinstance(value, tuple) else (value, {})
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"The weight of the term {name!r} must be a finite number >= 0, got {weight}.")
        if name == "ce" and kwargs:
            raise ValueError(f"The term 'ce' takes no keyword arguments, got {dict(kwargs)}.")
        resolved.append(Term(name, float(weight), None if name == "ce" else resolve_divergence(name, kwargs)))
    if not any(term.weight for term in resolved):
        raise ValueError(
            f"At least one term must have a positive weight, got {dict(terms)}. Set e.g. terms={{'forward_kl': 1.0}}."
        )
    for name in metrics:
        if name not in METRICS and TERM_METRICS.get(name) not in terms:
            raise unknown_name("metric", name, METRICS)
    return Recipe(tuple(resolved), float(temperature), tuple(metrics))

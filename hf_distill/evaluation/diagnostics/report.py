"""What a diagnosis holds, and how it is written and printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_distill.evaluation.bootstrap import Estimate
from hf_distill.evaluation.json_file import load_json, write_json
from hf_distill.evaluation.tables import format_cell, format_share, markdown_table


@dataclass(frozen=True)
class Finding:
    """A failure mode that was found.

    Args:
        name: `tokenizer_mismatch`, `template_mismatch`, `teacher_worse`, `capacity_gap`, `temperature_too_high` or
            `unbalanced_weights`.
        summary: What is wrong, in a sentence.
        evidence: The numbers that say so.
        remedy: What to do.
    """

    name: str
    summary: str
    evidence: Mapping[str, float | int | str]
    remedy: str


@dataclass(frozen=True)
class ModelStatistics:
    """One model on the scored tokens.

    Args:
        parameters: How many it has; None for a teacher that does not say.
        nll: Mean negative log-likelihood of the labels, in nats.
        accuracy: Share of labels that are its first choice.
        entropy: Mean entropy of its distributions, in nats.
        confidence: Mean probability of its first choice.
        ece: Expected calibration error of its first choice, from 0 to 1.
    """

    parameters: int | None
    nll: float
    accuracy: float
    entropy: float
    confidence: float
    ece: float


@dataclass(frozen=True)
class Slice:
    """Some of the scored tokens.

    Args:
        label: Which.
        tokens: How many.
        kl: Estimate KL(teacher || student) in nats.
        agreement: Share with one first choice.
        student_nll: Mean negative log-likelihood of the labels under the student, in nats.
        teacher_nll: The same under the teacher.
    """

    label: str
    tokens: int
    kl: float
    agreement: float
    student_nll: float
    teacher_nll: float


@dataclass(frozen=True)
class Measurements:
    """What was measured over the scored tokens of a dataset.

    Args:
        rows: How many rows have some.
        tokens: How many there are.
        student: The student's own statistics.
        teacher: The teacher's.
        kl: KL(teacher || student) at temperature 1, in nats.
        agreement: Share of tokens where both have one first choice.
        nll_difference: The teacher's negative log-likelihood less the student's: above 0 where the teacher is worse.
        information_kept: 1 - KL / KL of the teacher's mean distribution: 1 for a student that is the teacher, 0 for
            one that does not look at the context. None where the teacher does not look at it either.
        label_correlation: Pearson correlation over tokens of both models' log-probabilities of the label.
        logit_correlation: Mean over tokens of the correlation of both models' logits over the vocabulary.
        by_position: Tokens by their number among the scored ones of their row.
        by_teacher_entropy: Tokens in quarters, from where the teacher is sure to where it is not.
        gradient_shares: Norm of the gradient of each weighted term as shares of their sum; empty where no recipe is
            known.
        cka: CKA of layer i of the student (0: embedding) with layer j of the teacher; None where it was not measured.
    """

    rows: int
    tokens: int
    student: ModelStatistics
    teacher: ModelStatistics
    kl: Estimate
    agreement: Estimate
    nll_difference: Estimate
    information_kept: float | None
    label_correlation: float | None
    logit_correlation: float
    by_position: tuple[Slice, ...]
    by_teacher_entropy: tuple[Slice, ...]
    gradient_shares: Mapping[str, float] = field(default_factory=dict)
    cka: tuple[tuple[float | None, ...], ...] | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a student and its teacher, and what was measured of them.

    Args:
        findings: The failure modes that were found, the one that spoils the others first.
        measured: None where the tokenizers disagree: no number compares the models then.
    """

    findings: tuple[Finding, ...]
    measured: Measurements | None

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """The diagnosis that `to_dict` described."""
        findings = tuple(Finding(**finding) for finding in data["findings"])
        return cls(findings, None if data["measured"] is None else _measurements(data["measured"]))

    def save(self, path: str | Path) -> None:
        """Write JSON; an interrupted write leaves an older file whole."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Diagnosis:
        """Read what `save` wrote."""
        return load_json(path, "a diagnosis", cls.from_dict)

    def to_markdown(self) -> str:
        """The findings with evidence and remedy, then the tables."""
        parts = [_finding(finding) for finding in self.findings] or ["No failure mode was found."]
        if self.measured is not None:
            parts += _tables(self.measured)
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.to_markdown()


def _measurements(data: Mapping[str, Any]) -> Measurements:
    nested = {
        **{name: ModelStatistics(**data[name]) for name in ("student", "teacher")},
        **{name: Estimate(**data[name]) for name in ("kl", "agreement", "nll_difference")},
        **{name: tuple(Slice(**part) for part in data[name]) for name in ("by_position", "by_teacher_entropy")},
    }
    cka = None if data["cka"] is None else tuple(map(tuple, data["cka"]))
    return Measurements(**{**data, **nested, "cka": cka})


def _finding(finding: Finding) -> str:
    evidence = "; ".join(f"{name} {format_cell(value)}" for name, value in finding.evidence.items())
    return f"**{finding.name}**: {finding.summary}\n\n- Evidence: {evidence}.\n- Remedy: {finding.remedy}"


def _tables(measured: Measurements) -> list[str]:
    models = [
        (role, model.parameters, model.nll, format_share(model.accuracy), model.entropy, model.confidence, model.ece)
        for role, model in (("student", measured.student), ("teacher", measured.teacher))
    ]
    head = ["tokens", "KL", "agreement", "student NLL", "teacher NLL"]
    parts = [
        f"{measured.tokens:,} tokens of {measured.rows:,} rows.",
        markdown_table(["model", "parameters", "NLL", "accuracy", "entropy", "confidence", "ECE"], models),
        markdown_table(["of both", "value", "95 % interval"], list(_pair(measured))),
        markdown_table(["position", *head], [_slice(part) for part in measured.by_position]),
        markdown_table(["teacher entropy", *head], [_slice(part) for part in measured.by_teacher_entropy]),
    ]
    if measured.gradient_shares:
        shares = [(name, format_share(share)) for name, share in measured.gradient_shares.items()]
        parts.append(markdown_table(["term", "share of gradient"], shares))
    if measured.cka is not None:
        layers = [_most_alike(i, row) for i, row in enumerate(measured.cka)]
        parts.append(markdown_table(["layer of the student", "most alike of the teacher", "CKA"], layers))
    return parts


def _pair(measured: Measurements) -> list[tuple[object, ...]]:
    means = {
        "KL(teacher, student)": measured.kl,
        "top-1 agreement": measured.agreement,
        "teacher NLL - student NLL": measured.nll_difference,
    }
    rows: list[tuple[object, ...]] = [
        (name, mean.value, "" if mean.low is None else f"{format_cell(mean.low)} to {format_cell(mean.high)}")
        for name, mean in means.items()
    ]
    rows += [
        ("information kept", measured.information_kept, ""),
        ("correlation of label log-probabilities", measured.label_correlation, ""),
        ("correlation of logits", measured.logit_correlation, ""),
    ]
    return rows


def _slice(part: Slice) -> tuple[object, ...]:
    return part.label, part.tokens, part.kl, format_share(part.agreement), part.student_nll, part.teacher_nll


def _most_alike(layer: int, row: tuple[float | None, ...]) -> tuple[object, ...]:
    """A line of the whole map, which is in the file."""
    known = {j: value for j, value in enumerate(row) if value is not None}
    best = max(known, key=known.__getitem__, default=None)
    return layer, best, None if best is None else known[best]

"""What a compression did and what is left after every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_distill.cards import Table
from hf_distill.evaluation import Footprint, RetentionReport
from hf_distill.evaluation.json_file import load_json, write_json
from hf_distill.evaluation.scoring import STUDENT, TEACHER
from hf_distill.evaluation.tables import format_interval, format_share, markdown_table
from hf_distill.pipelines.arguments import DISTIL, PRUNE, QUANTIZE


KEPT = "Retention: the mean over the benchmarks that have one, with its 95 % interval, against the first row."
COST = (
    "Size: the weight files. tokens/s: forward passes over 4 rows of up to 128 tokens, by turns on the machine that "
    "made the models."
)
WORDS = {PRUNE: "pruned", DISTIL: "distilled", QUANTIZE: "quantised"}
SIZES = ("parameters (M)", "size (MB)", "tokens/s")


@dataclass(frozen=True)
class StageRow:
    """A model of the pipeline. What was not measured is None.

    Args:
        name: "teacher", "adapted teacher", or the stage: "1-P".
        parameters: A tied head once, quantised ones as one each.
        weight_bytes: Bytes of the weight files; None for a teacher on the Hub.
        tokens_per_second: Read in forward passes.
        report: Retention against the teacher.
        facts: What the stage said of itself: what was cut, trained, rounded.
    """

    name: str
    parameters: int
    weight_bytes: int | None
    tokens_per_second: float
    report: RetentionReport | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        fields = {name: getattr(self, name) for name in ("name", "parameters", "weight_bytes", "tokens_per_second")}
        report = None if self.report is None else self.report.to_dict()
        return fields | {"report": report, "facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageRow:
        """The row that `to_dict` described."""
        report = None if data["report"] is None else RetentionReport.from_dict(data["report"])
        return cls(**{**data, "report": report})


@dataclass(frozen=True)
class CompressReport:
    """All models of a pipeline, the teacher first.

    Args:
        order: Of the steps.
        rows: One for each model.
        final: Name of the last stage's folder.
    """

    order: str
    rows: tuple[StageRow, ...]
    final: str

    @property
    def report(self) -> RetentionReport | None:
        """Retention of the last model."""
        return self.rows[-1].report

    def table(self) -> Table:
        """Perplexity and the other benchmarks, retention, size and speed after every stage."""
        measured, cost = self.measured(), self.cost()
        rows = [[*kept, *size[1:]] for kept, size in zip(measured.rows, cost.rows, strict=True)]
        return Table([*measured.columns, *SIZES], rows, f"{COST} {KEPT}")

    def measured(self) -> Table:
        """Perplexity and the other benchmarks, and retention, after every stage."""
        names = [row.benchmark for row in self.report.rows] if self.report else []
        return Table(["model", *names, "retention", "95 % interval"], [_measured(row) for row in self.rows], KEPT)

    def cost(self) -> Table:
        """Size and speed after every stage."""
        return Table(["model", *SIZES], [_cost(row) for row in self.rows], COST)

    def beside_stages(self) -> RetentionReport | None:
        """Retention of the last model, beside that of the stages before it, with their sizes; None if not measured.

        A stage that only trained the teacher is none that the student went through, and is left out.
        """
        if self.report is None:
            return None
        teacher, *before, last = self.rows
        stages = {stage_title(row.name): row for row in before if row.name[:1].isdigit()}
        values: dict[str, dict[str, float | None]] = {
            title: {entry.benchmark: entry.student for entry in row.report.rows} if row.report else {}
            for title, row in stages.items()
        }
        rows = [
            replace(
                entry, baseline=None, baselines={name: found.get(entry.benchmark) for name, found in values.items()}
            )
            for entry in self.report.rows
        ]
        footprints = [
            Footprint(name, row.parameters, row.weight_bytes, row.tokens_per_second, None, None, None)
            for name, row in {TEACHER: teacher, STUDENT: last, **stages}.items()
            if row.weight_bytes is not None
        ]
        return replace(self.report, rows=tuple(rows), footprints=tuple(footprints))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return asdict(self) | {"rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressReport:
        """The report that `to_dict` described."""
        return cls(data["order"], tuple(StageRow.from_dict(row) for row in data["rows"]), data["final"])

    def save(self, path: str | Path) -> None:
        """Write JSON; an interrupted write leaves an older file whole."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> CompressReport:
        """Read what `save` wrote."""
        return load_json(path, "the report of a compression", cls.from_dict)

    def __str__(self) -> str:
        table = self.table()
        return f"{markdown_table(table.columns, table.rows)}\n\n{table.caption}"


def stage_title(name: str) -> str:
    """A stage in words: "1-P" is "1-P (pruned)"."""
    return f"{name} ({WORDS[name.split('-')[-1]]})"


def _measured(row: StageRow) -> list[object]:
    report = row.report
    if report is None:
        return [row.name, None, None]
    bounds = format_interval(report.mean_ci_low, report.mean_ci_high)
    return [row.name, *(entry.student for entry in report.rows), format_share(report.mean_retention), bounds]


def _cost(row: StageRow) -> list[object]:
    size = None if row.weight_bytes is None else row.weight_bytes / 1e6
    return [row.name, row.parameters / 1e6, size, round(row.tokens_per_second)]

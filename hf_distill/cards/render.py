"""From facts to a card: metadata for the Hub and the text of the template."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_distill.cards.check import check_card, without_paths
from hf_distill.cards.data import DistillationCard, Table, display_name, is_hub_id
from hf_distill.evaluation import Footprint, RetentionReport, RetentionRow
from hf_distill.evaluation.scoring import STUDENT, TEACHER
from hf_distill.evaluation.tables import format_cell, format_interval, format_share, markdown_table


PIPELINES = {
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    "sequence_classification": "text-classification",
}
TAGS = ("distillation", "knowledge-distillation", "hf_distill")
# Identifiers that the Hub accepts as `license`; another name is declared as "other" with `license_name`.
HUB_LICENSES = frozenset(
    {
        *(
            "afl-3.0",
            "agpl-3.0",
            "apache-2.0",
            "bsd-2-clause",
            "bsd-3-clause",
            "gpl-2.0",
            "gpl-3.0",
            "lgpl-3.0",
            "mit",
        ),
        *(
            "cc",
            "cc0-1.0",
            "cc-by-3.0",
            "cc-by-4.0",
            "cc-by-nc-4.0",
            "cc-by-nc-sa-4.0",
            "cc-by-sa-3.0",
            "cc-by-sa-4.0",
        ),
        *(
            "mpl-2.0",
            "odc-by",
            "openrail",
            "openrail++",
            "bigcode-openrail-m",
            "bigscience-bloom-rail-1.0",
            "unlicense",
        ),
        *("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "other", "unknown"),
    }
)


def render_card(data: DistillationCard) -> str:
    """Render the card of a distilled model, ready to be written as `README.md`.

    Sections with nothing to say are left out, and absolute paths are cut down to their last part.

    Raises:
        ValueError: A given text holds a missing value or a placeholder, see `check_card`.

    Example:
        ```python
        card = DistillationCard(name="student", teacher="org/teacher", report=report)
        Path("student/README.md").write_text(render_card(card), encoding="utf-8")
        ```
    """
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    source = importlib.resources.files("hf_distill.model_cards").joinpath("template.md").read_text(encoding="utf-8")
    text = environment.from_string(source).render(
        card=data,
        metadata=card_metadata(data).to_yaml(),
        headline=_headline(data.report),
        beside=_beside(data.report),
        teacher=data.teacher and display_name(data.teacher),
        base_model=data.base_model and display_name(data.base_model),
        pipeline=PIPELINES[data.task],
        losses=_losses(data),
        run=_run(data),
        data=_datasets(data),
        licenses=_licenses(data),
        comparison=_table(data.comparison),
        measurements=_table(data.measurements) or (data.report and data.report.footprint_markdown()),
    )
    text = without_paths(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")
    check_card(text)
    return text


def card_metadata(data: DistillationCard) -> ModelCardData:
    """The YAML block: what the Hub indexes, and a `distillation` block of our own."""
    base_model = data.base_model if is_hub_id(data.base_model) else None
    relation = None if base_model is None else ("adapter" if data.adapter else "finetune")
    results = _eval_results(data)
    license_id = None if data.license is None else data.license.lower()
    known = license_id is None or license_id in HUB_LICENSES
    return ModelCardData(
        language=data.language,
        license=license_id if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.]+", "-", str(license_id)).strip("-"),
        library_name="peft" if data.adapter else "transformers",
        pipeline_tag=PIPELINES[data.task],
        tags=[*TAGS, *data.tags],
        base_model=base_model,
        base_model_relation=relation,
        datasets=[item.name for item in data.datasets if is_hub_id(item.name)] or None,
        model_name=data.name if results else None,
        eval_results=results or None,
        distillation=_distillation(data) or None,
    )


def _distillation(data: DistillationCard) -> dict[str, Any]:
    """The recipe and the retention for programs to read."""
    losses = [{"name": loss.name, "weight": loss.weight, **loss.settings} for loss in data.losses]
    block: dict[str, Any] = {
        "teacher": data.teacher and (data.teacher if is_hub_id(data.teacher) else display_name(data.teacher)),
        "teacher_quantization": data.teacher_quantization,
        "losses": losses or None,
        "tokens": data.tokens,
        "steps": data.steps,
        "seed": data.seed,
    }
    if data.report is not None and data.report.mean_retention is not None:
        block["mean_retention"] = data.report.mean_retention
        if data.report.mean_ci_low is not None:
            block["mean_retention_interval"] = [data.report.mean_ci_low, data.report.mean_ci_high]
    return {key: value for key, value in block.items() if value is not None}


def _eval_results(data: DistillationCard) -> list[EvalResult]:
    """The student's value and its retention on every benchmark, for `model-index`."""
    results = []
    for row in data.report.rows if data.report else ():
        dataset = row.benchmark if row.benchmark != row.metric else data.evaluation_data or "held-out data"
        for metric, name, value in (
            (row.metric, None, row.student),
            ("retention", f"{row.metric}, kept of the teacher", row.retention),
        ):
            if value is not None:
                result = EvalResult(
                    task_type=PIPELINES[data.task],
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
                    dataset_name=dataset,
                    metric_type=metric,
                    metric_name=name,
                    metric_value=value,
                )
                results.append(result)
    return results


def _headline(report: RetentionReport | None) -> str | None:
    if report is None or report.mean_retention is None:
        return None
    rows = _kept(report)
    items = sorted({row.n for row in rows})
    count = f"{items[0]:,} items" if len(items) == 1 else f"{items[0]:,} to {items[-1]:,} items each"
    bounds = format_interval(report.mean_ci_low, report.mean_ci_high)
    interval = f", 95 % interval {bounds}" if bounds else ""
    what = rows[0].metric.replace("_", " ") if len(rows) == 1 else f"mean of {len(rows)} benchmarks"
    return f"Keeps {format_share(report.mean_retention)} of its teacher ({what}{interval}, {count})."


def _beside(report: RetentionReport | None) -> str | None:
    """What a reader weighs the headline against: the models beside it, and what the student saves."""
    if report is None or report.mean_retention is None:
        return None
    others = {name: report.mean_retention_of(name) for name in report.baselines}
    said = [f"{name} {format_share(kept)}" for name, kept in others.items() if kept is not None]
    sentences = [f"On the same items: {', '.join(said)}."] if said else []
    sizes = {item.model: item for item in report.footprints}
    if {TEACHER, STUDENT} <= sizes.keys():
        teacher, student = sizes[TEACHER], sizes[STUDENT]
        size = format_share(student.weight_bytes / teacher.weight_bytes)
        sentences.append(f"Its weights take {size} of the teacher's megabytes{_faster(teacher, student)}.")
    return " ".join(sentences) or None


def _faster(teacher: Footprint, student: Footprint) -> str:
    if not teacher.tokens_per_second or student.tokens_per_second is None:
        return ""
    speed = student.tokens_per_second / teacher.tokens_per_second
    return f", and it reads {speed:.2f} times as many tokens per second"


def _kept(report: RetentionReport) -> list[RetentionRow]:
    """The rows that the mean retention is a mean of."""
    return [row for row in report.rows if row.retention is not None]


def _losses(data: DistillationCard) -> str | None:
    rows = [
        (
            loss.name,
            loss.weight,
            ", ".join(f"{key}={format_cell(value)}" for key, value in loss.settings.items()),
            loss.paper and f"[arXiv:{loss.paper}](https://arxiv.org/abs/{loss.paper})",
        )
        for loss in data.losses
    ]
    return markdown_table(["loss", "weight", "settings", "source"], rows) if rows else None


def _run(data: DistillationCard) -> str | None:
    facts: dict[str, object] = {
        "teacher quantization": data.teacher_quantization,
        "training tokens" if data.task != "sequence_classification" else "training rows": data.tokens,
        "optimizer steps": data.steps,
        "seed": data.seed,
        **data.hyperparameters,
    }
    rows = [(name, value) for name, value in facts.items() if format_cell(value)]
    return markdown_table(["setting", "value"], rows) if rows else None


def _datasets(data: DistillationCard) -> str | None:
    rows = [(_dataset_name(item.name), item.description, item.license) for item in data.datasets]
    return markdown_table(["data", "description", "licence"], rows) if rows else None


def _dataset_name(name: str) -> str:
    return f"[{name}](https://huggingface.co/datasets/{name})" if is_hub_id(name) else display_name(name)


def _licenses(data: DistillationCard) -> str | None:
    """Licences of student and teacher; one that is not known is said to be unknown."""
    if data.teacher is None and data.license is None and data.teacher_license is None:
        return None
    rows = [("student", data.license or "unknown"), ("teacher", data.teacher_license or "unknown")]
    return markdown_table(["model", "licence"], rows)


def _table(table: Table | None) -> str | None:
    if table is None or not table.rows:
        return None
    text = markdown_table(table.columns, table.rows)
    return f"{text}\n\n{table.caption}" if table.caption else text


def write_card(card: DistillationCard, folder: str | Path) -> Path:
    """Render a card to `folder/README.md`, and keep what it says in `folder/card.json`.

    An interrupted write leaves an older card whole.
    """
    # What stands in the file is what is rendered: rendering it again gives the same text.
    card = DistillationCard.from_dict(card.to_dict())
    text = render_card(card)
    path = Path(folder) / "README.md"
    card.save(folder)
    unfinished = path.with_name(f".README.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path


def regenerate_card(folder: str | Path) -> Path:
    """Render the card of a folder, and draw its plots, again from its `card.json`.

    Raises:
        ValueError: The file holds something else than the data of a card.
        FileNotFoundError: There is none.
    """
    card = DistillationCard.load(folder)
    return write_card(replace(card, plots=draw_plots(card.report, folder) or card.plots), folder)


def draw_plots(report: RetentionReport | None, folder: str | Path) -> list[str]:
    """Draw a report's plots beside its card, where there is a report and matplotlib; the names of the images."""
    if report is None or importlib.util.find_spec("matplotlib") is None:
        return []
    return [path.name for path in report.plot(folder) if path.suffix == ".png"]

"""The facts that a card is rendered from."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_distill.evaluation import RetentionReport


LIBRARIES = ("hf-distill", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "torch")


@dataclass(frozen=True)
class Loss:
    """One term of the training loss.

    Args:
        name: For example `forward_kl` or `cross-entropy`.
        weight: Its factor, or its schedule in words.
        settings: For example `{"temperature": 2.0}`.
        paper: arXiv id of its source.
    """

    name: str
    weight: float | str
    settings: Mapping[str, object] = field(default_factory=dict)
    paper: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Data that the student was trained on.

    Args:
        name: A Hub id or a description.
        license: Its licence, where known.
        description: Size, selection, split.
    """

    name: str
    license: str | None = None
    description: str | None = None


@dataclass(frozen=True)
class Table:
    """A measured table.

    Args:
        columns: Headings.
        rows: One value per heading; None and NaN give an empty cell, a column with nothing in it is left out.
        caption: What the columns mean.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str | None = None


@dataclass(frozen=True)
class DistillationCard:
    """Everything that the card of a distilled model can say. What is not given is not written.

    Args:
        name: The model's own name.
        teacher: A Hub id, a folder (only its name is written) or a description, where it is known.
        task: `causal_lm`, `masked_lm` or `sequence_classification`.
        repo_id: Where the model is on the Hub: gives the lines that load it.
        base_model: The checkpoint that the student was initialised from: a Hub id or a folder.
        student: How the student was made from it, for example "15 of its 30 layers".
        adapter: Whether only a PEFT adapter is published.
        language: ISO 639 code of the data.
        license: The student's licence.
        teacher_license: The teacher's licence.
        teacher_quantization: `nf4` or `int8`.
        losses: Terms of the loss.
        datasets: Training data.
        tokens: Labelled tokens (or rows, for classifiers) seen in training.
        steps: Optimizer steps.
        seed: Of the run.
        hyperparameters: Others worth knowing: learning rate, batch size.
        report: Retention against the teacher.
        baseline: What the report's baseline column is.
        plots: Files with plots of the report, beside the card.
        evaluation_data: Name of the held-out data.
        comparison: A table that compares runs.
        measurements: A table of sizes and speeds; that of the report if None.
        commands: Command lines that reproduce the run.
        versions: Library versions, see `installed_versions`.
        notes: Sentences on limits that are special to this model.
        tags: Further tags for the Hub.
    """

    name: str
    teacher: str | None = None
    task: str = "causal_lm"
    repo_id: str | None = None
    base_model: str | None = None
    student: str | None = None
    adapter: bool = False
    language: str | None = None
    license: str | None = None
    teacher_license: str | None = None
    teacher_quantization: str | None = None
    losses: Sequence[Loss] = ()
    datasets: Sequence[Dataset] = ()
    tokens: int | None = None
    steps: int | None = None
    seed: int | None = None
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    report: RetentionReport | None = None
    baseline: str | None = None
    plots: Sequence[str] = ()
    evaluation_data: str | None = None
    comparison: Table | None = None
    measurements: Table | None = None
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tags: Sequence[str] = ()


def is_hub_id(name: str | None) -> bool:
    """Tell a Hub id, `organisation/name`, from a path or a description.

    A folder that exists here is a path. A name without an organisation is taken for a folder too, so the few old ids
    of that form are written in full: `openai-community/gpt2`.
    """
    if not name or "/" not in name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def display_name(name: str) -> str:
    """A link for a Hub id, the folder's name for a path, and a description as it is."""
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    is_path = os.path.exists(name) or (" " not in name and re.search(r"[\\/]", name))
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if is_path else name


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that a distilled model depends on."""
    present = {item.name.lower() for item in importlib.metadata.distributions() if item.name}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in present}

"""The facts that a card is rendered from."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_distill.cards.check import without_paths
from hf_distill.evaluation import RetentionReport
from hf_distill.evaluation.json_file import load_json, write_json


CARD_DATA = "card.json"
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
        baseline: What the report's other columns are, to stand behind "Compared with".
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

    def to_dict(self) -> dict[str, Any]:
        """What is known, as JSON-ready values that describe no machine; `from_dict` gives the same card."""
        named = replace(
            self,
            teacher=_public_name(self.teacher),
            base_model=_public_name(self.base_model),
            datasets=[replace(item, name=_public_name(item.name)) for item in self.datasets],
            report=None,
        )
        facts = _plain(asdict(named)) | {"report": self.report and self.report.to_dict()}
        return {name: value for name, value in facts.items() if value or (value == 0 and value is not False)}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> DistillationCard:
        """The card that `to_dict` described.

        Raises:
            ValueError: It holds what no card says.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(facts) - known):
            raise ValueError(f"The data of a card hold {unknown}; expected some of {sorted(known)}.")
        values = dict(facts)
        for name, kind in {"losses": Loss, "datasets": Dataset}.items():
            values[name] = [kind(**item) for item in values.get(name, ())]
        for name in ("comparison", "measurements"):
            values[name] = Table(**values[name]) if name in values else None
        values["report"] = RetentionReport.from_dict(values["report"]) if "report" in values else None
        return cls(**values)

    def save(self, folder: str | Path) -> None:
        """Write `card.json`: what the card in this folder is rendered from."""
        write_json(self.to_dict(), Path(folder) / CARD_DATA)

    @classmethod
    def load(cls, folder: str | Path) -> DistillationCard:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds something else.
            FileNotFoundError: There is none.
        """
        return load_json(Path(folder) / CARD_DATA, "the data of a card", cls.from_dict)


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


def _public_name(name: str | None) -> Any:
    """A Hub id as it is, of a path its last part."""
    return name if name is None or is_hub_id(name) else display_name(name)


def _plain(value: Any) -> Any:
    """Values that JSON has, without absolute paths; None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # of numpy or torch
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else without_paths(str(value))


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that a distilled model depends on."""
    present = {item.name.lower() for item in importlib.metadata.distributions() if item.name}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in present}

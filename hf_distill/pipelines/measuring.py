"""What is left of a teacher after every stage: measured once, and kept beside the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.evaluation import Benchmark, MultipleChoice, evaluate_retention, tokens_per_second
from hf_distill.evaluation.benchmarks import DatasetBenchmark
from hf_distill.evaluation.footprint import sample_ids
from hf_distill.evaluation.json_file import read_json, write_json
from hf_distill.evaluation.scoring import preserved_state
from hf_distill.pipelines.checks import load_config
from hf_distill.pipelines.report import StageRow
from hf_distill.pipelines.stage import digest
from hf_distill.pipelines.steps import load_stage
from hf_distill.skeletons import skeleton


TEACHER, ADAPTED = "teacher", "adapted teacher"
MEASURED = "measured.json"
WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Made:
    """A model of a pipeline.

    Args:
        folder: Where it is, or its name.
        key: What it was made of.
        facts: What its stage said.
    """

    folder: str
    key: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def measure_all(
    models: Mapping[str, Made],
    benchmarks: Sequence[Benchmark],
    tokenizer: PreTrainedTokenizerBase | None,
    root: Path,
    model_kwargs: Mapping[str, Any],
) -> list[StageRow]:
    """Measure every model against the teacher, the first of them, one at a time.

    What was measured by the same benchmarks before is read again.

    Args:
        models: By name, the teacher first.
        benchmarks: What is measured.
        tokenizer: For benchmarks of text.
        root: Folder of the pipeline.
        model_kwargs: For `from_pretrained`.
    """
    asked = [_identity(benchmark) for benchmark in benchmarks]
    teacher: PreTrainedModel | None = None
    rows = []
    for name, made in models.items():
        path = (root if name == TEACHER else Path(made.folder)) / MEASURED
        key = digest([made.key, models[TEACHER].key, asked])
        found = read_json(path, "what was measured of a model") if path.is_file() else {}
        if found.get("key") == key:
            rows.append(StageRow.from_dict(found["row"]))
            continue
        if teacher is None:
            teacher = load_stage(models[TEACHER].folder, **model_kwargs)
        model = teacher if name == TEACHER else load_stage(made.folder, **model_kwargs)
        with preserved_state([model]):
            speed = tokens_per_second(model, sample_ids(model))
        report = None
        if benchmarks:
            report = evaluate_retention(model, teacher, benchmarks, tokenizer, measure_footprints=False)
        row = StageRow(name, _parameters(made.folder), _weight_bytes(made.folder), speed, report, made.facts)
        write_json({"key": key, "row": row.to_dict()}, path)
        rows.append(row)
    return rows


def _identity(benchmark: Benchmark) -> list[str]:
    """Tells benchmarks that measure something else."""
    known = [type(benchmark).__name__, benchmark.name, benchmark.metric]
    if isinstance(benchmark, DatasetBenchmark | MultipleChoice):
        return [*known, str(getattr(benchmark, "max_length", None)), digest(benchmark.dataset.to_list())]
    plain = {name: value for name, value in vars(benchmark).items() if isinstance(value, str | int | float | dict)}
    return [*known, str(sorted(plain.items()))]


def _parameters(folder: str) -> int:
    """Parameters of a model by its config, as if it were not quantised."""
    return sum(parameter.numel() for parameter in skeleton(load_config(folder)).parameters())


def _weight_bytes(folder: str) -> int | None:
    """Bytes of the weight files of a folder; None for a model on the Hub."""
    path = Path(folder)
    if not path.is_dir():
        return None
    return sum(file.stat().st_size for pattern in WEIGHTS for file in path.glob(pattern))

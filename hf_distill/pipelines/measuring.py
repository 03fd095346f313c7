"""What is left of a teacher after every stage: measured once, and kept beside the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_distill.evaluation import Benchmark, MultipleChoice, RetentionReport, compare_retention
from hf_distill.evaluation.benchmarks import DatasetBenchmark
from hf_distill.evaluation.footprint import speeds_by_turns
from hf_distill.evaluation.json_file import read_json, write_json
from hf_distill.evaluation.scoring import preserved_state
from hf_distill.pipelines.checks import load_config
from hf_distill.pipelines.report import StageRow
from hf_distill.pipelines.stage import digest
from hf_distill.pipelines.steps import load_stage
from hf_distill.skeletons import skeleton


TEACHER, ADAPTED = "teacher", "adapted teacher"
OWN_NAME = "the teacher itself"  # as a student of its own
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
    """Measure every model against the teacher, the first of them, in one pass over the items.

    What was measured by the same benchmarks before is read again. Speeds are measured by turns, and so all of them
    again where a model is new: those of two hours do not compare.

    Args:
        models: By name, the teacher first.
        benchmarks: What is measured.
        tokenizer: For benchmarks of text.
        root: Folder of the pipeline.
        model_kwargs: For `from_pretrained`.
    """
    asked = [_identity(benchmark) for benchmark in benchmarks]
    keys = {name: digest([made.key, models[TEACHER].key, asked]) for name, made in models.items()}
    paths = {name: (root if name == TEACHER else Path(made.folder)) / MEASURED for name, made in models.items()}
    rows = {name: row for name in models if (row := _known(paths[name], keys[name])) is not None}
    missing = [name for name in models if name not in rows]
    if not missing:
        return [rows[name] for name in models]
    # Together they take less memory than training did; those that are known are there for their speeds.
    loaded = {name: load_stage(made.folder, **model_kwargs) for name, made in models.items()}
    reports: Mapping[str, RetentionReport | None] = dict.fromkeys(missing)
    if benchmarks:
        named = {OWN_NAME if name == TEACHER else name: loaded[name] for name in missing}
        found = compare_retention(named, loaded[TEACHER], benchmarks, tokenizer)
        reports = {TEACHER if name == OWN_NAME else name: report for name, report in found.items()}
    with preserved_state(loaded.values()):
        speeds = speeds_by_turns(loaded)
    for name, made in models.items():
        if name in missing:
            size = _parameters(made.folder), _weight_bytes(made.folder)
            rows[name] = StageRow(name, *size, speeds[name], reports[name], made.facts)
        rows[name] = replace(rows[name], tokens_per_second=speeds[name])
        write_json({"key": keys[name], "row": rows[name].to_dict()}, paths[name])
    return [rows[name] for name in models]


def _known(path: Path, key: str) -> StageRow | None:
    """What was measured before of the same model, by the same benchmarks."""
    found = read_json(path, "what was measured of a model") if path.is_file() else {}
    return StageRow.from_dict(found["row"]) if found.get("key") == key else None


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

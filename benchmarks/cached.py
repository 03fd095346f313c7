"""What distilling from soft labels on disk costs: building them, reading them, and a whole training step.

The models are those of `step`, the text reviews. The reference of a step is the same trainer with the cross-entropy
alone, which asks no teacher; that of building is the teacher's forward with its projection, of which nothing is kept.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from labels import ENCODINGS, rows_of
from measure import in_child, peak_megabytes, take_turns
from step import arguments, models, prepared, stepper

from hf_distill import CachedTeacher, KDConfig, KDTrainer
from hf_distill.cache import CacheReader, build_cache
from hf_distill.signals import Signal


ALONE, LIVE, FORWARD = "CE alone", "CE + KL, the teacher itself", "forward alone"
STEPS = [ALONE, LIVE, *(f"CE + KL, {name}" for name in ENCODINGS)]
BUILDS = [FORWARD, *ENCODINGS]
READS = list(ENCODINGS)
# Rows of logits that the reference of building makes at once.
AT_ONCE = 512


@dataclass(frozen=True)
class Setting:
    """Rows of one length; a step takes `batch` of them."""

    rows: int = 64
    length: int = 256
    batch: int = 8


def measure_steps(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Times and peaks of a training step."""
    with _caches(setting, [name for name in names if name not in (ALONE, LIVE)], threads) as folder:
        seconds = in_child(_step_seconds, setting, folder, names, repeats, threads)
        peaks = {name: in_child(_step_peak, setting, folder, name, threads) for name in names}
    return {"setting": asdict(setting), "threads": threads, "seconds": seconds, "peak_mb": peaks}


def measure_builds(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Times of building a cache of all rows."""
    seconds = in_child(_build_seconds, setting, names, repeats, threads)
    return {"setting": asdict(setting), "threads": threads, "seconds": seconds, "tokens": _tokens(setting)}


def measure_reads(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Times of reading all rows in random order, a batch at a time."""
    with _caches(setting, names, threads) as folder:
        seconds = in_child(_read_seconds, setting, folder, names, repeats, threads)
    return {"setting": asdict(setting), "threads": threads, "seconds": seconds, "tokens": _tokens(setting)}


def _tokens(setting: Setting) -> int:
    return setting.rows * (setting.length - 1)


@contextmanager
def _caches(setting: Setting, names: list[str], threads: int) -> Iterator[Path]:
    """A folder with a cache for each case."""
    with tempfile.TemporaryDirectory() as folder:
        in_child(_build_all, setting, Path(folder), names, threads)
        yield Path(folder)


def _build_all(setting: Setting, folder: Path, names: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    _, teacher = models([0])
    rows = rows_of(teacher, setting)
    for name in names:
        _build(teacher, rows, folder / name, name)


def _build(teacher: Any, rows: Dataset, folder: Path, name: str) -> None:
    encoding, options = ENCODINGS[name.removeprefix("CE + KL, ")]
    build_cache(teacher, rows, folder, encoding=encoding, show_progress=False, **options)


def _build_seconds(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    _, teacher = models([0])
    rows = rows_of(teacher, setting)

    def build(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _build(teacher, rows, Path(folder), name)

    steps: dict[str, Callable[[], object]] = {name: partial(build, name) for name in names}
    if FORWARD in steps:
        steps[FORWARD] = partial(_forward, teacher, torch.tensor(rows["input_ids"]))
    return take_turns(steps, repeats)


@torch.no_grad()
def _forward(teacher: Any, ids: torch.Tensor) -> None:
    for part in ids.split(16):
        batch = {"input_ids": part, "attention_mask": torch.ones_like(part)}
        output = teacher.signals(batch, {Signal.LOGITS}).logits
        for hidden in output.hidden.flatten(0, -2).split(AT_ONCE):
            output.head(hidden)


def _read_seconds(
    setting: Setting, folder: Path, names: list[str], repeats: int, threads: int
) -> dict[str, list[float]]:
    torch.set_num_threads(threads)

    def read(reader: CacheReader, order: list[Any]) -> None:
        for start in range(0, len(order), setting.batch):
            reader.targets(order[start : start + setting.batch])

    steps = {}
    for name in names:
        reader = CacheReader(folder / name)
        order = list(reader.rows())
        random.Random(0).shuffle(order)
        steps[name] = partial(read, reader, order)
    return take_turns(steps, repeats)


def _trainer(name: str, folder: Path, student: Any, teacher: Any) -> KDTrainer:
    weights = {"ce_weight": 1.0, "kd_weight": 0.0} if name == ALONE else {}
    args = KDConfig(**arguments(), learning_rate=1e-4, **weights)
    source = teacher if name in (ALONE, LIVE) else CachedTeacher(folder / name)
    data = {"train_dataset": Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})}
    return KDTrainer(student, source, args, **data, processing_class=teacher.tokenizer)


def _batch(setting: Setting, teacher: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows_of(teacher, setting)[: setting.batch]["input_ids"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _step_seconds(
    setting: Setting, folder: Path, names: list[str], repeats: int, threads: int
) -> dict[str, list[float]]:
    """All cases train one student with one optimizer; only their times mean anything."""
    torch.set_num_threads(threads)
    student, teacher = models()
    trainers = {name: _trainer(name, folder, student, teacher) for name in names}
    shared, batch = prepared(trainers[names[0]]), _batch(setting, teacher)
    return take_turns({name: partial(stepper(of, *shared), batch) for name, of in trainers.items()}, repeats)


def _step_peak(setting: Setting, folder: Path, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    student, teacher = models()
    trainer = _trainer(name, folder, student, teacher)
    step, batch = stepper(trainer, *prepared(trainer)), _batch(setting, teacher)
    step({key: values[:1] for key, values in batch.items()})  # libraries, thread pools and AdamW's moments
    return peak_megabytes(partial(step, batch))

"""What the objectives of `objectives` cost: a whole training step of `step`, with and without each of them.

All cases train one student with one optimizer, so that they fit into memory together and take turns; only their times
mean anything. Peaks come from a process each.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from measure import in_child, take_turns
from objectives import CASES, trainer_of
from step import Setting, batch_of, models, peak_of, prepared, stepper


def measure(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Times and peaks of a step of each case."""
    seconds = in_child(_seconds, setting, names, repeats, threads)
    peaks = {name: in_child(_peak, setting, name, threads) for name in names}
    return {"setting": asdict(setting), "threads": threads, "seconds": seconds, "peak_mb": peaks}


def _trainers(names: list[str]) -> dict[str, Any]:
    student, teacher = models()
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
    tokenizer, rate = teacher.tokenizer, 1e-4
    return {name: trainer_of(CASES[name], student, teacher, rows, tokenizer, learning_rate=rate) for name in names}


def _seconds(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    trainers, batch = _trainers(names), batch_of(setting)
    shared = prepared(trainers[names[0]])
    steps = {name: partial(stepper(trainer, *shared), batch) for name, trainer in trainers.items()}
    return take_turns(steps, repeats)


def _peak(setting: Setting, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    [trainer] = _trainers([name]).values()
    return peak_of(stepper(trainer, *prepared(trainer)), setting)

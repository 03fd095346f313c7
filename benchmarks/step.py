"""A whole training step: teacher, student, loss, backward and AdamW, with the models and the batch of the quickstart.

The student is every second layer of SmolLM2-135M-Instruct, in fp32 under bf16 autocast; both trainers minimise the
forward KL at T = 1 to the bf16 teacher on the same tokens. Peaks are over the loaded models and AdamW's moments.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import in_child, peak_megabytes, take_turns
from torch import Tensor

from hf_distill import KDConfig, KDTrainer, load_teacher
from hf_distill.students import shrink


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from assets import smollm2


Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A batch."""

    rows: int = 8
    length: int = 256


def batch_of(setting: Setting) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (setting.rows, setting.length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def models(layers: Sequence[int] = range(0, 30, 2)) -> tuple[Any, Any]:
    """A student of some of the teacher's 30 layers, and the teacher."""
    attention = "sdpa" if torch.cuda.is_available() else "eager"  # bf16 SDPA has a slow backward on CPUs
    teacher = load_teacher(str(smollm2()), dtype="bfloat16", attn_implementation=attention)
    return shrink(teacher.model, layers=list(layers), dtype=torch.float32), teacher


def arguments() -> dict[str, Any]:
    common = {"bf16": True, "use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no"}
    return common | {"output_dir": tempfile.gettempdir(), "gradient_checkpointing": False}


def hf_distill_trainer() -> Any:
    student, teacher = models()
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
    args = KDConfig(**arguments(), learning_rate=1e-4, ce_weight=0.0, kd_weight=1.0, temperature=1.0)
    return KDTrainer(student, teacher, args, train_dataset=rows, processing_class=teacher.tokenizer)


def gkd_trainer() -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = models()
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    args = GKDConfig(**arguments(), learning_rate=1e-4, lmbda=0.0, beta=0.0)  # off-policy, forward KL
    tokenizer = teacher.tokenizer
    rows = Dataset.from_dict({"messages": [chat]})
    return GKDTrainer(student, teacher.model, args=args, train_dataset=rows, processing_class=tokenizer)


# The first is the reference.
CASES: dict[str, Callable[[], Any]] = {"TRL GKDTrainer": gkd_trainer, "hf_distill KDTrainer": hf_distill_trainer}


def measure(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Times and peaks of a step of each trainer."""
    seconds = in_child(_seconds, setting, names, repeats, threads)
    peaks = {name: in_child(_peak, setting, name, threads) for name in names}
    return {"setting": asdict(setting), "threads": threads, "seconds": seconds, "peak_mb": peaks}


def prepared(trainer: Any) -> tuple[Any, Any]:
    """The student and the optimizer of a trainer, prepared as `train` does."""
    trainer.create_optimizer()
    return trainer.accelerator.prepare(trainer.model, trainer.optimizer)


def stepper(trainer: Any, model: Any, optimizer: Any) -> Callable[[Batch], float]:
    """What takes one step of a trainer."""
    trainer.model_wrapped, trainer.current_gradient_accumulation_steps = model, 1

    def step(batch: Batch) -> float:
        labelled = (batch["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(model, dict(batch), num_items_in_batch=labelled)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _seconds(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    batch = batch_of(setting)
    steppers = {name: _stepper_of(name) for name in names}
    losses = {name: step(batch) for name, step in steppers.items()}
    reference, *others = losses.values()
    if any(abs(other - reference) > 0.01 * reference for other in others):
        raise RuntimeError(f"The trainers compute different losses: {losses}.")
    return take_turns({name: partial(step, batch) for name, step in steppers.items()}, repeats)


def _peak(setting: Setting, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    return peak_of(_stepper_of(name), setting)


def _stepper_of(name: str) -> Callable[[Batch], float]:
    trainer = CASES[name]()
    return stepper(trainer, *prepared(trainer))


def peak_of(step: Callable[[Batch], float], setting: Setting) -> float:
    """How far a step raises the memory in use."""
    step(batch_of(Setting(1, 8)))  # libraries, thread pools and AdamW's moments
    batch = batch_of(setting)
    return peak_megabytes(partial(step, batch))

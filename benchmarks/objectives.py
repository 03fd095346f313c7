"""What each objective adds to cross-entropy and forward KL at equal tokens, on the task of the quickstart.

The student is 15 of SmolLM2-135M-Instruct's 30 layers (10 first, 5 last); every case sees the same rows in the same
order, chosen by the seed, and is scored on the same held-out texts. A run is one case with one seed, in a process of
its own; with `--write` it is recorded when it ends, and runs that are recorded are not run again. What a case costs is
measured by the suite `taps`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import in_child, load, machine, record
from step import arguments, models
from transformers import PrinterCallback, default_data_collator

from hf_distill import (
    CachedTeacher,
    GradientShareCallback,
    KDConfig,
    KDTrainer,
    LogitObjective,
    evaluate_retention,
    objectives,
)
from hf_distill.cache import build_cache
from hf_distill.cache.registry import PRESETS
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from hf_distill.students import choose_layers
from hf_distill.teachers import Teacher


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from assets import pack, review_texts


@dataclass(frozen=True)
class Setting:
    """A run."""

    steps: int = 20
    rows: int = 4
    length: int = 128
    texts: int = 100
    layers: int = 15
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Case:
    """What is trained: 0.5 cross-entropy, 0.5 of a divergence, and an objective.

    Args:
        objective: A class of `hf_distill.objectives`; none for the reference.
        weight: Its weight.
        settings: Its other arguments.
        divergence: The divergence.
    """

    objective: str | None = None
    weight: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    divergence: str = "forward_kl"

    def build(self, width: int) -> list[objectives.Objective]:
        """The objectives for two models of one width."""
        terms: list[objectives.Objective] = [LogitObjective(0.5, divergence=self.divergence)]
        if self.objective:
            channels = {"channels": range(width)} if self.objective == "RegressorFreeObjective" else {}
            terms.append(getattr(objectives, self.objective)(self.weight, **self.settings, **channels))
        return terms


@dataclass(frozen=True)
class CachedCase(Case):
    """With soft labels on disk in place of the teacher, in an encoding or preset."""

    encoding: str = "base"


HIDDEN, ATTENTION, RELATION = "HiddenStateObjective", "AttentionObjective", "RelationObjective"
REFERENCE = "CE + KL"
# The weights are meant to give a term about a quarter of the gradient in the first step (LOG.md); see `shares` in the
# results.
CASES = {
    REFERENCE: Case(),
    "hidden mse": Case(HIDDEN, 0.04, {"loss": "mse", "skip_first": True}),
    "hidden relative mse": Case(HIDDEN, 6.0, {"loss": "relative_mse"}),
    "hidden cosine": Case(HIDDEN, 10.0, {"loss": "cosine"}),
    "hidden cka": Case(HIDDEN, 16.0, {"loss": "cka"}),
    "regressor-free": Case("RegressorFreeObjective", 0.0035, {"skip_first": True}),
    "hidden delta": Case("HiddenDeltaObjective", 15.0),
    "feature dynamics": Case("FeatureDynamicsObjective", 0.06),
    "attention relations": Case(ATTENTION, 0.17, {"loss": "relations"}),
    "attention maps": Case(ATTENTION, 0.25, {"loss": "map_kl"}),
    "rkd": Case(RELATION, 20.0, {"loss": "rkd"}),
    "similarity": Case(RELATION, 500.0, {"loss": "similarity"}),
    "CE + TAID": Case(divergence="taid"),
}


FROM_DISK: dict[str, Case] = {f"{REFERENCE}, {name}": CachedCase(encoding=name) for name in PRESETS}


def trainer_of(
    case: Case, student: Any, teacher: Teacher, rows: Dataset, tokenizer: Any, **settings: Any
) -> KDTrainer:
    args = KDConfig(**arguments(), ce_weight=0.5, **settings)
    data = {"train_dataset": rows, "data_collator": default_data_collator, "processing_class": tokenizer}
    return KDTrainer(student, teacher, args, objectives=case.build(student.config.hidden_size), **data)


def run(setting: Setting, names: Sequence[str], seeds: int, threads: int, write: bool) -> list[dict[str, Any]]:
    """One row for each case and seed, seed by seed; what is recorded already is not run again."""
    known, here, rows = load("objectives") if write else [], machine(), []
    for seed in range(seeds):
        for name in names:
            case = (CASES | FROM_DISK)[name]
            key = {"case": name, "seed": seed, "setting": asdict(setting), "spec": asdict(case), "threads": threads}
            row = next((row for row in known if (key | {"machine": here}).items() <= row.items()), None)
            if row is None:
                row = key | in_child(_run, setting, case, seed, threads)
                print(f"{name}, seed {seed}: {row['metrics']}, shares of the gradient {row['shares']}", flush=True)
                if write:
                    record("objectives", row)
            rows.append(row)
    return rows


def _run(setting: Setting, case: Case, seed: int, threads: int) -> dict[str, Any]:
    """Train one student and score it."""
    torch.set_num_threads(threads)
    student, teacher = models(choose_layers(30, setting.layers, setting.layers * 2 // 3, -(-setting.layers // 3)))
    texts = {split: [row.text for row in rows] for split, rows in review_texts().items()}
    rows = pack(texts["train"], teacher.tokenizer, setting.length).shuffle(seed=seed)
    rows = rows.select(range(setting.steps * setting.rows))
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": min(5, setting.steps - 1), "max_steps": setting.steps}
    size = {"per_device_train_batch_size": setting.rows, "learning_rate": setting.learning_rate}
    settings = {**schedule, **size, "seed": seed, "logging_steps": 1, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        source = _from_disk(case, teacher, rows, folder) if isinstance(case, CachedCase) else teacher
        trainer = trainer_of(case, student, source, rows, teacher.tokenizer, **settings)
        trainer.add_callback(GradientShareCallback(every=setting.steps))  # in the first step
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    held_out = Dataset.from_dict({"text": texts["test"][: setting.texts]})
    benchmarks = [benchmark(held_out) for benchmark in (KLDivergence, Top1Agreement, Perplexity)]
    student = student.to(torch.bfloat16)
    scores = evaluate_retention(student, teacher, benchmarks, teacher.tokenizer, measure_footprints=False).rows
    end = "_gradient_share"
    shares = {key.removesuffix(end): value for key, value in trainer.state.log_history[0].items() if end in key}
    return {"metrics": {row.metric: row.student for row in scores}, "shares": shares}


def _from_disk(case: CachedCase, teacher: Any, rows: Dataset, folder: str) -> CachedTeacher:
    build_cache(teacher, rows, folder, encoding=case.encoding, show_progress=False)
    return CachedTeacher(folder)

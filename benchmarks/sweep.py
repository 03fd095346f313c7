"""Try the choices of recipes/quickstart.py: which layers to keep, learning rate, weights and temperature.

    python benchmarks/sweep.py "keep_last=3" "lr=1e-3" "lr=1e-3 ce=0 kd=1" [--steps 10] [--texts 100]

Every argument is one run: a setting changes what it names and leaves the rest as below. All runs see the same rows in
the same order and are scored on the same held-out texts; each prints one row of a table. `steps=0` scores the student
as it was cut.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import default_data_collator

from hf_distill import KDConfig, KDTrainer, evaluate_retention, load_teacher
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from hf_distill.evaluation.tables import markdown_table
from hf_distill.students import choose_layers, shrink


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from assets import pack, review_texts, smollm2


DEFAULTS = {"keep": 20, "keep_last": 3, "lr": 3e-4, "ce": 0.5, "kd": 0.5, "temperature": 1.0}


def read_settings(line: str, steps: int) -> dict[str, float]:
    """Turn `"lr=1e-3 kd=1"` into all settings of a run."""
    given = {name: float(value) for name, value in (setting.split("=") for setting in line.split())}
    unknown = given.keys() - DEFAULTS.keys() - {"steps"}
    if unknown:
        raise ValueError(f"Unknown settings {sorted(unknown)}, expected some of {[*DEFAULTS, 'steps']}.")
    return {**DEFAULTS, "steps": steps, **given}


def train(student, teacher, rows: Dataset, settings: dict[str, float], folder: str) -> None:
    steps = int(settings["steps"])
    args = KDConfig(
        folder, ce_weight=settings["ce"], kd_weight=settings["kd"], temperature=settings["temperature"],
        learning_rate=settings["lr"], lr_scheduler_type="cosine", warmup_steps=min(5, steps - 1), max_steps=steps,
        per_device_train_batch_size=8, bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=10,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    data = {"train_dataset": rows, "data_collator": default_data_collator, "processing_class": teacher.tokenizer}
    KDTrainer(student, teacher, args, **data).train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", help='settings of a run, for example "lr=1e-3 ce=0 kd=1"')
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of 8 rows of 128 tokens")
    parser.add_argument("--texts", type=int, default=100, help="held-out texts")
    flags = parser.parse_args()
    runs = [read_settings(line, flags.steps) for line in flags.runs]
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    teacher = load_teacher(str(smollm2()), dtype="bfloat16", attn_implementation=attention)
    texts = {split: [row.text for row in rows] for split, rows in review_texts().items()}
    packed = pack(texts["train"], teacher.tokenizer, 128)
    held_out = Dataset.from_dict({"text": texts["test"][: flags.texts]})
    benchmarks = [benchmark(held_out) for benchmark in (Perplexity, KLDivergence, Top1Agreement)]
    for settings in runs:
        keep, last, steps = (int(settings[name]) for name in ("keep", "keep_last", "steps"))
        layers = choose_layers(teacher.model.config.num_hidden_layers, keep, keep - last, last)
        student = shrink(teacher.model, layers=layers, dtype=torch.float32)
        start = time.perf_counter()
        if steps:
            with tempfile.TemporaryDirectory() as folder:
                train(student, teacher, packed.select(range(steps * 8)), settings, folder)
        seconds = time.perf_counter() - start
        models = student.to(torch.bfloat16), teacher
        rows = evaluate_retention(*models, benchmarks, teacher.tokenizer, measure_footprints=False).rows
        columns = [*settings, *(row.metric for row in rows), "training (s)"]
        values = [*settings.values(), *(row.student for row in rows), round(seconds)]
        print(markdown_table(columns, [values]), flush=True)


if __name__ == "__main__":
    main()

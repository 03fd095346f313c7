"""What to cut, and from what to begin: students of SmolLM2 of equal size, trained on equal tokens.

    python benchmarks/compression.py depth        # layers or neurons, at equal parameters
    python benchmarks/compression.py importance   # by what neurons are chosen, at equal parameters
    python benchmarks/compression.py scratch      # cut from the teacher, or new weights, at equal size
    python benchmarks/compression.py choices      # the students of recipes/compress_smollm2.py on more choices, and
                                                  # what rounding to int8 takes from them

Settings: --steps (0: before any training), --seeds. Runs that are done are not run again. Loss: half cross-entropy,
half forward KL. Each seed has its own order of the rows, calibration included.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_distill import KDConfig, KDTrainer, load_teacher
from hf_distill.evaluation import MultipleChoice, RetentionReport, compare_retention
from hf_distill.evaluation.rows import collate
from hf_distill.pipelines import CompressConfig, compress
from hf_distill.pipelines.measuring import MEASURED
from hf_distill.pipelines.steps import load_stage
from hf_distill.students import student_from_config


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from compress_data import SPEC, TEACHER, TOKENIZER, TRAIN, benchmarks, continuations, settings
from compress_tables import print_reports, save_reports


# 79 % of the parameters, either way.
CUTS = {
    "22 of 30 layers": {"num_hidden_layers": 22},
    "992 of 1536 neurons": {"intermediate_size": 992, "round_to": 32},
}
LOSSES = ("CE", "KD", "CE+KD")
STAGES = {"": "2-KD", " + int8": "3-Q"}
METHODS = ("activation", "taylor", "fisher", "weight")
TRAINER = ("max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "bf16")


def pruned(folder: Path, steps: int, seed: int, **changed: Any) -> RetentionReport:
    """A student cut from the teacher, after its training."""
    order = "P-KD" if steps else "P"
    args = CompressConfig(str(folder), order=order, **(settings(max(steps, 2), seed) | changed))
    if (known := next(folder.parent.glob(f"*/{MEASURED}"), None)) is not None and not folder.exists():
        folder.mkdir()
        shutil.copy(known, folder)  # the same teacher on the same benchmarks
    report = compress(TEACHER, TRAIN.shuffle(seed), args, benchmarks=benchmarks(), tokenizer=TOKENIZER).report
    assert report is not None  # benchmarks were given
    return report


def from_scratch(folder: Path, steps: int, seed: int) -> RetentionReport:
    """A student of the size of the cut one, with new weights."""
    teacher = load_teacher(TEACHER, dtype="bfloat16", attn_implementation="eager")
    options = settings(max(steps, 2), seed)
    kept = {name: options[name] for name in (*TRAINER, "seed", "use_cpu", "report_to", "logging_steps")}
    torch.manual_seed(seed)
    student = student_from_config(teacher.model, **SPEC).float()
    args = KDConfig(str(folder / "scratch"), save_strategy="no", **kept)
    data = {"train_dataset": TRAIN.shuffle(seed), "data_collator": collate, "processing_class": TOKENIZER}
    trainer = KDTrainer(student, teacher, args, **data)
    if steps:
        trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(folder / "scratch")
    student = AutoModelForCausalLM.from_pretrained(folder / "scratch", attn_implementation="eager")
    return compare_retention({"scratch": student}, teacher, benchmarks(), TOKENIZER)["scratch"]


def on_more_choices(made: Path, seeds: int, items: int) -> dict[str, list[RetentionReport]]:
    """The distilled students that the recipe left, and these rounded, on so many choices, by loss."""
    load = {"attn_implementation": "eager"}
    names = {f"{loss}{suffix}": (loss, stage) for loss in LOSSES for suffix, stage in STAGES.items()}
    folders = {
        f"{name}-{seed}": made / f"{loss}-{seed}" / stage
        for seed in range(seeds)
        for name, (loss, stage) in names.items()
    }
    students = {name: load_stage(folder, **load) for name, folder in folders.items()}
    teacher = load_teacher(TEACHER, dtype="bfloat16", **load)
    chosen = [MultipleChoice(continuations(items), name="continuation")]
    reports = compare_retention(students, teacher, chosen, TOKENIZER)
    return {name: [reports[f"{name}-{seed}"] for seed in range(seeds)] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["depth", "importance", "scratch", "choices"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--made", type=Path, default=Path("outputs/compress"), help="of the recipe")
    parser.add_argument("--items", type=int, default=744, help="of `choices`; 744 can be made")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compression"))
    flags = parser.parse_args()
    root = flags.output_dir / f"{flags.study}-{flags.steps}"
    found: dict[str, list[RetentionReport]] = {}
    if flags.study == "choices":
        found = on_more_choices(flags.made, flags.seeds, flags.items)
    for seed in range(flags.seeds if flags.study != "choices" else 0):
        run = {"steps": flags.steps, "seed": seed}
        if flags.study == "depth":
            for name, spec in CUTS.items():
                report = pruned(root / f"{name.replace(' ', '-')}-{seed}", **run, prune=spec)
                found.setdefault(name, []).append(report)
        elif flags.study == "importance":
            for method in METHODS:
                cut = {"prune": {"intermediate_size": 1152}, "importance": {"mlp": method}}
                found.setdefault(method, []).append(pruned(root / f"{method}-{seed}", **run, **cut))
        else:
            found.setdefault("cut from the teacher", []).append(pruned(root / f"pruned-{seed}", **run))
            found.setdefault("new weights", []).append(from_scratch(root / f"scratch-{seed}", **run))
    save_reports(found, root / "table.json")
    print_reports(found)


if __name__ == "__main__":
    main()

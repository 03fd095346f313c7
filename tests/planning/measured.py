"""The peak of a real training step, run as a program: `python -m tests.planning.measured '{"family": "llama"}'`.

It prints how many bytes models, two steps of `KDTrainer` and everything that they make add to the resident memory of a
process that has trained a tiny model before, so that the interpreter, libraries and pools of threads are there.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


# Every tensor has pages of its own, which go back at once: what is freed does not count.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measured_bytes(**case) -> int:
    """The peak of a case, measured in a process of its own; see `main` for the names."""
    command = [sys.executable, "-m", "tests.planning.measured", json.dumps(case)]
    run = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.splitlines()[-1])


def train(student, teacher, rows, folder, *, batch, arguments) -> None:
    """Two optimizer steps: the moments are there in the second."""
    from transformers import default_data_collator

    from hf_distill import KDConfig, KDTrainer

    args = KDConfig(
        folder, max_steps=2, per_device_train_batch_size=batch, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", dataloader_num_workers=0, **arguments,
    )  # fmt: skip
    KDTrainer(
        student, teacher_model=teacher, args=args, train_dataset=rows, data_collator=default_data_collator
    ).train()


def rows_of(length: int, count: int):
    """Sequences without padding, all labelled."""
    from datasets import Dataset

    ids = torch.randint(5, 300, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def main(family, shape, teacher, *, batch, length, dtype="float32", adapter=False, cached=False, **arguments) -> None:
    """Print the bytes.

    Args:
        family: Of both models, a name of `tests.tiny`.
        shape: Arguments of the student's `tiny.model`.
        teacher: What is different in the teacher.
        batch: Sequences of a micro-batch.
        length: Tokens of each.
        dtype: Of the student's weights; the teacher is in bf16.
        adapter: Train an adapter on frozen bf16 weights.
        cached: Take the teacher's soft labels from disk.
        **arguments: Of `KDConfig`.
    """
    from peft import get_peft_model

    from hf_distill import CachedTeacher, ModelTeacher
    from hf_distill.cache import build_cache
    from tests import tiny
    from tests.planning.llama import lora

    rows = rows_of(length, 2 * batch * arguments.get("gradient_accumulation_steps", 1))

    def make_teacher():
        return ModelTeacher(tiny.model(family, **shape | teacher).bfloat16())

    with tempfile.TemporaryDirectory() as folder:
        train(tiny.model(family), tiny.model(family), rows_of(8, 4), folder, batch=1, arguments=arguments)
        if cached:
            build_cache(make_teacher(), rows, f"{folder}/cache", encoding="base")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        guide = CachedTeacher(f"{folder}/cache") if cached else make_teacher()
        student = tiny.model(family, **shape).to(getattr(torch, "bfloat16" if adapter else dtype))
        if adapter:
            student = get_peft_model(student, lora())
        train(student, guide, rows, folder, batch=batch, arguments=arguments)
        sys.stdout.write(f"{_status('VmHWM') - before}\n")


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

"""The teacher of a run: loaded or wrapped, and checked against the student."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.anatomy import describe, task_of
from hf_distill.teachers import (
    AdapterDisabledTeacher,
    ModelTeacher,
    Teacher,
    check_not_student,
    check_same_task,
    load_teacher,
)


def build_teacher(
    source: str | PreTrainedModel | Teacher,
    student: nn.Module,
    processing_class: Any,
    *,
    quantization: str | None = None,
    dtype: str = "auto",
    compares_logits: bool = True,
) -> Teacher:
    """Load or wrap a teacher, and check that it fits the student.

    Args:
        source: A name, "base" (a LoRA student's own base model), a model or a teacher.
        student: The student.
        processing_class: The student's tokenizer or processor.
        quantization: Of a teacher that is loaded here.
        dtype: Of a teacher that is loaded here.
        compares_logits: False where only hidden states are compared: then the classes need not be the same.

    Raises:
        ValueError: The teacher is the student, does another task, or has another vocabulary.
    """
    task = task_of(student)
    if isinstance(source, str) and source == "base":
        return AdapterDisabledTeacher(student)
    if isinstance(source, str):
        teacher: Teacher = load_teacher(source, quantization=quantization, dtype=dtype, task=task)
    elif isinstance(source, PreTrainedModel):
        check_not_student(student, source)
        teacher = ModelTeacher(source)
    else:
        teacher = source
    check_not_student(student, teacher)
    if compares_logits:
        check_same_task(student, teacher)
    if task != "sequence_classification":
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        teacher.check_vocabulary(tokenizer, describe(student).vocab_size)
    return teacher

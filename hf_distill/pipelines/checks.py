"""What is refused before any weight is loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow.types import is_large_list, is_list
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_distill.anatomy import task_of
from hf_distill.evaluation.rows import check_dataset, count_targets, tokenize
from hf_distill.pipelines.arguments import DISTIL, PRUNE, QUANTIZE, CompressConfig
from hf_distill.pipelines.plan import Step, methods_of, plan
from hf_distill.quantization import bitsandbytes_config, quantization_of
from hf_distill.skeletons import skeleton
from hf_distill.students.quantizers import resolve_quantizer
from hf_distill.students.resolve import check_cuts, target_of
from hf_distill.students.steps import resized


# Bytes of a weight file that its digest reads: the header, and pieces from all over the file.
HEAD, PIECE, PIECES = 2**20, 2**12, 1024


def check_teacher(teacher: Any) -> str:
    """Return the name or folder of the model that is compressed.

    Raises:
        ValueError: It is a model in memory, or the folder of an adapter or of a GGUF file.
    """
    if isinstance(teacher, nn.Module):
        merge = "model = model.merge_and_unload(); " if hasattr(teacher, "peft_config") else ""
        raise ValueError(
            f"`teacher` is a {type(teacher).__name__}; a pipeline goes from folder to folder: "
            f"`{merge}model.save_pretrained(folder)`, and give the folder."
        )
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(f"`teacher` is {teacher!r}; expected the name or the folder of a model.")
    if (Path(teacher) / "adapter_config.json").is_file():
        raise ValueError(
            f"`teacher` is {str(teacher)!r}, which holds a LoRA adapter; merge it first: "
            "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(merged)`."
        )
    if any(Path(teacher).glob("*.gguf")) and not (Path(teacher) / "config.json").is_file():
        raise ValueError(
            f"`teacher` is {str(teacher)!r}, which holds a GGUF file, whose weights are quantised already; give the "
            "model that it was made of."
        )
    return os.fspath(teacher)


def check_plan(
    config: PreTrainedConfig, args: CompressConfig, tokenizer: PreTrainedTokenizerBase | None, teacher: str
) -> list[Step]:
    """Plan the steps, and go through them with models that have no weights.

    Raises:
        ValueError: The model is quantised already, its family has no adapter, the spec cannot be met, or the format
            cannot hold what is left.
        ImportError: The package of the format is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A pipeline runs in one process; start it without `accelerate launch` or `torchrun`.")
    found = quantization_of(config)
    if found is not None:
        raise ValueError(
            f"`teacher` is {teacher!r}, which is quantised already ({found}): it can neither be cut nor be rounded "
            "again; give the model that it was made of. `teacher_quantization` quantises a teacher while it teaches."
        )
    task_of(config)
    model, steps, quantizer = skeleton(config), plan(args, config), None
    for step in steps:
        if step.kind == PRUNE:
            target = target_of(step.args.spec, model)
            check_cuts(step.args.spec, model, target)
            methods_of(step.args, model)
            model = resized(model, target)
        if step.kind == QUANTIZE:
            quantizer = resolve_quantizer(args.quantization, args.group_size)
        if quantizer is not None:
            quantizer.check(model, tokenizer)
            if step.kind == DISTIL:
                resolve_quantizer("int8")  # training with the rounding is torchao's, whatever the format
        if step.kind == DISTIL and args.teacher_quantization is not None:
            bitsandbytes_config(args.teacher_quantization)
    return steps


def rows_of(dataset: Any, config: PreTrainedConfig, tokenizer: Any, max_length: int | None) -> Dataset:
    """The training rows as token ids and labels.

    Raises:
        ValueError: The dataset has neither text nor ids, there is no tokenizer for its text, or nothing to predict.
    """
    check_dataset(dataset)
    if {"input_ids", "labels"} <= set(dataset.column_names) and max_length is None:
        return dataset.select_columns(["input_ids", "labels"])
    task = task_of(config)
    rows = tokenize(dataset, task, tokenizer, max_length)
    if not any(count_targets(row, task) for row in rows):
        raise ValueError(
            f"`dataset` ({len(dataset)} rows) has nothing to predict: its texts are empty, or every label is -100."
        )
    return Dataset.from_list([dict(row) for row in rows])


def load_config(teacher: str) -> PreTrainedConfig:
    """The config of a model by name.

    Raises:
        ValueError: There is no such model.
    """
    try:
        return AutoConfig.from_pretrained(teacher)
    except OSError as error:
        raise ValueError(f"`teacher` is {teacher!r}, which could not be read: {error}") from None


def load_tokenizer(teacher: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model by name; None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(teacher)
    except (OSError, ValueError):
        return None


def model_digest(teacher: str, config: PreTrainedConfig) -> str:
    """Tells a model from another: by its commit on the Hub, or by its config and pieces of its weight files.

    It is no proof that two models are equal.
    """
    folder = Path(teacher)
    found = hashlib.blake2b(digest_size=16)
    if not folder.is_dir():
        found.update(f"{teacher} {getattr(config, '_commit_hash', None)}".encode())
        return found.hexdigest()
    found.update((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            found.update(opened.read(HEAD))
            for start in range(HEAD, size, max(PIECE, (size - HEAD) // PIECES)):
                opened.seek(start)
                found.update(opened.read(PIECE))
    return found.hexdigest()


def dataset_digest(dataset: Dataset) -> str:
    """Tells rows from other rows, by their content."""
    found = hashlib.blake2b(digest_size=16)
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for name in sorted(batch.column_names):
            column = batch.column(name).combine_chunks()
            if is_list(column.type) or is_large_list(column.type):
                found.update(column.value_lengths().to_numpy().tobytes())
                column = column.flatten()
            found.update(f"{name} {column.type}".encode() + column.to_numpy(zero_copy_only=False).tobytes())
    return found.hexdigest()

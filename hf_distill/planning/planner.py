"""What a distillation run needs, from the two configs alone: parameters, FLOPs per token, memory per rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from transformers import PreTrainedConfig

from hf_distill.planning.flops import attention_flops, forward_flops, training_flops
from hf_distill.planning.gap import gap_note
from hf_distill.planning.memory import (
    BF16,
    FP32,
    GIB,
    Layout,
    Quantization,
    Sharding,
    full_logits_bytes,
    gathered_bytes,
    optimizer_bytes,
    weight_bytes,
)
from hf_distill.planning.parameters import adapter_count, parameter_count
from hf_distill.planning.report import Plan
from hf_distill.planning.simulation import MADE_IN, Step, simulate
from hf_distill.planning.timeline import GRADIENTS


if TYPE_CHECKING:
    from peft import PeftConfig


def plan(
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    *,
    world_size: int = 1,
    sharding: Sharding = "ddp",
    per_device_batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_accumulation_steps: int = 1,
    teacher_quantization: Quantization | None = None,
    teacher_cached: bool = False,
    student_quantization: Quantization | None = None,
    student_dtype: Literal["float32", "bfloat16"] = "float32",
    bf16: bool = True,
    peft_config: PeftConfig | None = None,
    gradient_checkpointing: bool = True,
    chunk_bytes: int | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    candidates: Mapping[str, int] | None = None,
) -> Plan:
    """Compute what a run needs; no weight is loaded and nothing is allocated.

    Example:
        >>> print(plan(LlamaConfig(...), LlamaConfig(...), world_size=8, sharding="fsdp2"))

    Args:
        teacher_config: Of the teacher, which computes in bf16.
        student_config: Of the student.
        world_size: Number of ranks.
        sharding: `ddp` (everything on every rank), `fsdp2` or `zero3`.
        per_device_batch_size: Sequences in one micro-batch of a rank.
        sequence_length: Tokens in a sequence, all labelled.
        gradient_accumulation_steps: Micro-batches of an optimizer step; with more than one the gradients stay while
            the next one is computed.
        teacher_quantization: `nf4` or `int8`; the quantised teacher is replicated on every rank.
        teacher_cached: The teacher's soft labels come from disk: no teacher is loaded or run.
        student_quantization: As for the teacher; needs `peft_config`.
        student_dtype: Of the weights that train, their gradients and moments.
        bf16: The trainer's flag of this name: fp32 weights compute in bf16.
        peft_config: Trains an adapter on the frozen bf16 (or quantised) student.
        gradient_checkpointing: Recompute layers in backward.
        chunk_bytes: As in `linear_distillation_loss`.
        device: On a CPU the blocks of the loss are smaller.
        candidates: Parameters by name of models that could stand between a teacher and a far smaller student.

    Raises:
        ValueError: For an unknown choice, a number below 1, or a quantised student without adapter.
    """
    _check_choices(sharding, teacher_quantization, student_quantization, peft_config)
    _check_sizes(
        world_size=world_size,
        per_device_batch_size=per_device_batch_size,
        sequence_length=sequence_length,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    teacher = _Model(teacher_config, teacher_quantization)
    student = _Model(student_config, student_quantization)
    adapter = None if peft_config is None else adapter_count(student_config, peft_config)
    layout = Layout(world_size, sharding)
    step = Step(
        per_device_batch_size,
        sequence_length,
        student_dtype=torch.bfloat16 if student_dtype == "bfloat16" or adapter is not None else torch.float32,
        autocast=bf16,
        checkpointing=gradient_checkpointing,
        accumulating=gradient_accumulation_steps > 1,
        chunk_bytes=chunk_bytes,
        device=device,
    )
    resident = _resident(None if teacher_cached else teacher, student, adapter, layout, student_dtype)
    gradients = layout.per_rank((FP32 if student_dtype == "float32" else BF16) * (adapter or student.count.total))
    stages = simulate(None if teacher_cached else teacher_config, student_config, step, peft_config).peaks(
        1 / world_size if sharding != "ddp" else 1.0, copies=sharding == "ddp"
    )
    stages["optimizer step"] = {GRADIENTS: gradients}
    peak = max(stages, key=lambda stage: sum(stages[stage].values()))
    tokens = per_device_batch_size * sequence_length
    return Plan(
        teacher=teacher.count,
        student=student.count,
        trained=adapter or student.count.total,
        sequence_length=sequence_length,
        layout=layout,
        flops=_flops(teacher, student, adapter, sequence_length, teacher_cached, gradient_checkpointing),
        memory=resident | _named(stages[peak]),
        peak=peak,
        full_logits=full_logits_bytes(tokens, (student.vocab_size, teacher.vocab_size)) if student.count.head else 0,
        notes=tuple(_notes(teacher, student, layout, teacher_cached, candidates)),
    )


class _Model:
    """A config with what the plan reads from it."""

    def __init__(self, config: PreTrainedConfig, quantization: Quantization | None) -> None:
        self.config = config
        self.quantization = quantization
        self.count = parameter_count(config)
        self.vocab_size: int = config.get_text_config().vocab_size


def _check_choices(
    sharding: str,
    teacher_quantization: str | None,
    student_quantization: str | None,
    peft_config: PeftConfig | None,
) -> None:
    if sharding not in get_args(Sharding):
        raise ValueError(f"`sharding` must be one of {get_args(Sharding)}, got {sharding!r}.")
    for quantization in (teacher_quantization, student_quantization):
        if quantization not in (None, *get_args(Quantization)):
            raise ValueError(f"Quantization must be None or one of {get_args(Quantization)}, got {quantization!r}.")
    if student_quantization is not None and peft_config is None:
        raise ValueError(
            f"A student in {student_quantization} cannot train its own weights; add an adapter: "
            'peft_config=LoraConfig(target_modules="all-linear").'
        )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` is {size}; expected a whole number of at least 1, for example `{name}=8`.")


def _resident(
    teacher: _Model | None, student: _Model, adapter: int | None, layout: Layout, student_dtype: str
) -> dict[str, float]:
    """Bytes by part that are there at every moment of a step."""
    frozen = {"teacher weights": teacher, "student weights": student if adapter is not None else None}
    memory = {}
    for name, model in frozen.items():
        if model is not None:
            size = weight_bytes(model.count, model.quantization)
            memory[f"{name} ({model.quantization or 'bf16'}, frozen)"] = layout.per_rank(
                size, quantised=model.quantization is not None
            )
    memory |= optimizer_bytes(adapter or student.count.total, layout, FP32 if student_dtype == "float32" else BF16)
    live = [student] if teacher is None else [teacher, student]
    if layout.sharding != "ddp":
        whole = [model.count for model in live if model.quantization is None]
        memory["gathered weights"] = gathered_bytes(whole, student.count if adapter is None else None)
    if any(model.quantization for model in live):
        memory["one quantised weight in bf16"] = float(
            BF16 * max(model.count.widest for model in live if model.quantization)
        )
    return memory


def _flops(
    teacher: _Model,
    student: _Model,
    adapter: int | None,
    sequence_length: int,
    teacher_cached: bool,
    gradient_checkpointing: bool,
) -> dict[str, float]:
    """FLOPs per token of each part; layers are recomputed under checkpointing, the head is not."""
    attention = attention_flops(student.config, sequence_length)
    recomputed = forward_flops(student.count.multiplied - student.count.head, attention)
    return {
        "teacher forward": 0.0
        if teacher_cached
        else forward_flops(teacher.count.multiplied, attention_flops(teacher.config, sequence_length)),
        "student forward and backward": training_flops(student.count.multiplied, attention, adapter=adapter),
        "student recomputation": recomputed if gradient_checkpointing else 0.0,
    }


def _named(parts: dict[str, float]) -> dict[str, float]:
    """Bytes by the name of a part, but for those that are less than a thousandth."""
    named: dict[str, float] = {}
    for part, size in parts.items():
        named[MADE_IN.get(part, part)] = named.get(MADE_IN.get(part, part), 0.0) + size
    return {part: size for part, size in named.items() if size > sum(named.values()) / 1000}


def _notes(
    teacher: _Model, student: _Model, layout: Layout, teacher_cached: bool, candidates: Mapping[str, int] | None
) -> Iterator[str]:
    gap = gap_note(teacher.count.total, student.count.total, teacher_cached=teacher_cached, candidates=candidates)
    if gap is not None:
        yield gap
    if layout.sharding == "ddp" or teacher_cached or teacher.quantization is not None:
        return
    loading = weight_bytes(teacher.count) / GIB
    yield (
        f"rank 0 reads the whole teacher into host memory before it is sharded: {loading:.0f} GiB (with FSDP2 every "
        "rank does, unless the accelerate config has `fsdp_cpu_ram_efficient_loading: true`)."
    )

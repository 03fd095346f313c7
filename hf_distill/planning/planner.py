"""What a distillation run needs, from the two configs alone: parameters, FLOPs per token, memory per rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from transformers import PreTrainedConfig

from hf_distill.planning.flops import attention_flops, forward_flops, training_flops
from hf_distill.planning.memory import (
    BF16,
    FP32,
    GIB,
    Layout,
    Quantization,
    Sharding,
    activation_bytes,
    full_logits_bytes,
    gathered_bytes,
    head_gradient_bytes,
    layer_activation_bytes,
    loss_bytes,
    training_bytes,
    weight_bytes,
)
from hf_distill.planning.parameters import ParameterCount, adapter_count, parameter_count


if TYPE_CHECKING:
    from peft import PeftConfig

# Capacity gap law (arXiv 2311.07052): the best teacher is about 2.5 times the student. Far beyond it, say so.
BEST_RATIO = 2.5
WIDE_RATIO = 10


@dataclass(frozen=True)
class Plan:
    """The needs of a run; `print(plan)` shows them as a table.

    Args:
        teacher: Sizes of the teacher.
        student: Sizes of the student.
        trained: Parameters that get gradients.
        sequence_length: Tokens of one sequence.
        layout: World size and sharding.
        flops: FLOPs per token by part.
        memory: Bytes per rank by part.
        full_logits: Bytes that a loss on the logits of all positions would take instead of its chunks.
        notes: Advice, one sentence each.
    """

    teacher: ParameterCount
    student: ParameterCount
    trained: int
    sequence_length: int
    layout: Layout
    flops: dict[str, float]
    memory: dict[str, float]
    full_logits: float
    notes: tuple[str, ...]

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one training token, teacher and student together."""
        return sum(self.flops.values())

    @property
    def bytes_per_rank(self) -> float:
        """Bytes on one rank at the peak, all parts together."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        return "\n".join([*self._size_rows(), "", *self._flop_rows(), "", *self._memory_rows(), *self._note_rows()])

    def _size_rows(self) -> list[str]:
        rows = [f"{'Parameters':<44}{'total':>12}{'no embedding':>14}{'trained':>12}"]
        for name, size, trained in (("teacher", self.teacher, 0), ("student", self.student, self.trained)):
            rows.append(f"{name:<44}{_si(size.total):>12}{_si(size.non_embedding):>14}{_si(trained):>12}")
        return rows

    def _flop_rows(self) -> list[str]:
        rows = [f"{'Compute':<44}{'GFLOP/token':>12}{'TFLOP/seq':>14}"]
        for name, flops in [*self.flops.items(), ("total", self.flops_per_token)]:
            rows.append(f"{name:<44}{flops / 1e9:>12.2f}{flops * self.sequence_length / 1e12:>14.2f}")
        return rows

    def _memory_rows(self) -> list[str]:
        ranks = "1 rank" if self.layout.world_size == 1 else f"{self.layout.world_size} ranks, {self.layout.sharding}"
        rows = [f"{f'Memory per rank ({ranks})':<44}{'GiB':>12}"]
        for name, size in [*self.memory.items(), ("total", self.bytes_per_rank)]:
            rows.append(f"{name:<44}{size / GIB:>12.2f}")
        return [*rows, f"{'(whole logits instead of chunks)':<44}{self.full_logits / GIB:>12.2f}"]

    def _note_rows(self) -> list[str]:
        return [f"\nNote: {note}" for note in self.notes]


def plan(
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    *,
    world_size: int = 1,
    sharding: Sharding = "ddp",
    per_device_batch_size: int = 1,
    sequence_length: int = 2048,
    teacher_quantization: Quantization | None = None,
    teacher_cached: bool = False,
    student_quantization: Quantization | None = None,
    student_dtype: Literal["float32", "bfloat16"] = "float32",
    peft_config: PeftConfig | None = None,
    gradient_checkpointing: bool = True,
    chunk_bytes: int | None = None,
) -> Plan:
    """Compute what a run needs; no weight is loaded and nothing is allocated.

    Example:
        >>> print(plan(LlamaConfig(...), LlamaConfig(...), world_size=8, sharding="fsdp2"))

    Args:
        teacher_config: Of the teacher.
        student_config: Of the student.
        world_size: Number of ranks.
        sharding: `ddp` (everything on every rank), `fsdp2` or `zero3`.
        per_device_batch_size: Sequences in one micro-batch of a rank.
        sequence_length: Tokens in a sequence, all labelled.
        teacher_quantization: `nf4` or `int8`; the quantised teacher is replicated on every rank.
        teacher_cached: The teacher's soft labels come from disk: no teacher is loaded or run.
        student_quantization: As for the teacher; needs `peft_config`.
        student_dtype: Of the weights that train, their gradients and moments: fp32 (bf16 is computed with), or bf16.
        peft_config: Trains an adapter on the frozen bf16 (or quantised) student.
        gradient_checkpointing: Recompute layers in backward.
        chunk_bytes: As in `linear_distillation_loss`.

    Raises:
        ValueError: For an unknown choice, a number below 1, or a quantised student without adapter.
    """
    _check(sharding, student_quantization, peft_config, world_size, per_device_batch_size, sequence_length)
    teacher = _Model(teacher_config, teacher_quantization)
    student = _Model(student_config, student_quantization)
    adapter = None if peft_config is None else adapter_count(student_config, peft_config)
    layout = Layout(world_size, sharding)
    tokens = per_device_batch_size * sequence_length
    weight = FP32 if student_dtype == "float32" else BF16

    memory = {} if teacher_cached else _teacher_memory(teacher, layout, tokens)
    memory |= _student_memory(student, adapter, layout, weight)
    if sharding != "ddp":
        live = [student] if teacher_cached else [teacher, student]
        memory["gathered weights"] = gathered_bytes([model.count for model in live if model.quantization is None])
    memory["activations"] = activation_bytes(
        student.count, student.hidden_size, tokens, checkpointing=gradient_checkpointing
    )
    vocabularies = student.vocab_size, teacher.vocab_size
    memory["loss, chunks of logits"] = loss_bytes(
        tokens,
        vocabularies,
        (student.hidden_size, teacher.hidden_size),
        chunk_bytes,
        trained_head=adapter is None,
    )
    if adapter is None:
        memory["loss, gradient of the head"] = head_gradient_bytes(student.count.head)
    return Plan(
        teacher=teacher.count,
        student=student.count,
        trained=student.count.total if adapter is None else adapter,
        sequence_length=sequence_length,
        layout=layout,
        flops=_flops(teacher, student, adapter, sequence_length, teacher_cached, gradient_checkpointing),
        memory=memory,
        full_logits=full_logits_bytes(tokens, vocabularies),
        notes=tuple(_notes(teacher, student, layout, teacher_cached)),
    )


class _Model:
    """A config with what the plan reads from it."""

    def __init__(self, config: PreTrainedConfig, quantization: Quantization | None) -> None:
        if quantization not in (None, *get_args(Quantization)):
            raise ValueError(f"Quantization must be None or one of {get_args(Quantization)}, got {quantization!r}.")
        self.config = config
        self.quantization = quantization
        self.count = parameter_count(config)
        self.hidden_size: int = config.get_text_config().hidden_size
        self.vocab_size: int = config.get_text_config().vocab_size


def _check(sharding: str, student_quantization: str | None, peft_config: PeftConfig | None, *sizes: int) -> None:
    if sharding not in get_args(Sharding):
        raise ValueError(f"`sharding` must be one of {get_args(Sharding)}, got {sharding!r}.")
    if min(sizes) < 1:
        raise ValueError(
            f"World size, batch size and sequence length must be at least 1, got {', '.join(map(str, sizes))}."
        )
    if student_quantization is not None and peft_config is None:
        raise ValueError(
            f"A student in {student_quantization} cannot train its own weights; add an adapter: "
            'peft_config=LoraConfig(target_modules="all-linear").'
        )


def _frozen_bytes(model: _Model, layout: Layout) -> float:
    return layout.per_rank(weight_bytes(model.count, model.quantization), quantised=model.quantization is not None)


def _teacher_memory(teacher: _Model, layout: Layout, tokens: int) -> dict[str, float]:
    return {
        f"teacher weights ({teacher.quantization or 'bf16'})": _frozen_bytes(teacher, layout),
        "teacher forward, one layer": layer_activation_bytes(teacher.count, teacher.hidden_size, tokens),
    }


def _student_memory(student: _Model, adapter: int | None, layout: Layout, weight: int) -> dict[str, float]:
    if adapter is None:
        return training_bytes(student.count.total, layout, weight)
    frozen = {f"student weights ({student.quantization or 'bf16'}, frozen)": _frozen_bytes(student, layout)}
    return frozen | training_bytes(adapter, layout, weight)


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


def _notes(teacher: _Model, student: _Model, layout: Layout, teacher_cached: bool) -> Iterator[str]:
    ratio = teacher.count.total / student.count.total
    if ratio > WIDE_RATIO:
        yield (
            f"the teacher is {ratio:.1f} times the student. The capacity gap law (arXiv 2311.07052) finds the best "
            f"teacher near {BEST_RATIO} times; a teacher assistant between them or TAID (arXiv 2501.16937) may help."
        )
    if layout.sharding == "ddp" or teacher_cached or teacher.quantization is not None:
        return
    loading = weight_bytes(teacher.count) / GIB
    yield (
        f"rank 0 reads the whole teacher into host memory before it is sharded: {loading:.0f} GiB (with FSDP2 every "
        "rank does, unless the accelerate config has `fsdp_cpu_ram_efficient_loading: true`)."
    )


def _si(number: float) -> str:
    """Write a count of parameters with three or four digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"

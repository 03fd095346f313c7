"""Which ways of running a distillation fit into the memory at hand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from transformers import PreTrainedConfig

from hf_distill.planning.memory import GIB
from hf_distill.planning.planner import plan
from hf_distill.planning.report import Plan


# What of a GPU's memory a plan may take: the CUDA context, NCCL and fragmentation have the rest.
USABLE = 0.9


@dataclass(frozen=True)
class Way:
    """One way of running a distillation.

    Args:
        name: What it is.
        flags: What the command line of a recipe takes for it.
        plan: What it needs.
        gpu_bytes: Memory of a GPU.
    """

    name: str
    flags: str
    plan: Plan
    gpu_bytes: float

    @property
    def cached(self) -> bool:
        """Whether the teacher's soft labels come from disk."""
        return not self.plan.flops["teacher forward"]

    @property
    def usable_bytes(self) -> float:
        """What of a GPU's memory the plan may take."""
        return USABLE * self.gpu_bytes

    @property
    def fits(self) -> bool:
        """Whether a rank's peak leaves a tenth of its memory free."""
        return self.plan.bytes_per_rank <= self.usable_bytes

    def __str__(self) -> str:
        memory = self.plan.memory
        verdict = "fits"
        if not self.fits:
            largest = max(memory, key=memory.__getitem__)
            excess = self.plan.bytes_per_rank - self.usable_bytes
            verdict = (
                f"{excess / GIB:.1f} GiB too much in the {self.plan.peak}; most of all: {largest}, "
                f"{memory[largest] / GIB:.1f} GiB"
            )
        return f"{self.name:<52}{self.plan.bytes_per_rank / GIB:>9.1f} GiB  {verdict}"


def ways(
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    *,
    gpus: int,
    gpu_memory: float,
    lora_rank: int = 16,
    **settings: Any,
) -> list[Way]:
    """All ways of running a distillation: first those that change nothing, then those that save more and more.

    Args:
        teacher_config: Of the teacher.
        student_config: Of the student.
        gpus: How many.
        gpu_memory: Of each, in GiB.
        lora_rank: Of the adapter in the ways that train one.
        **settings: Of `plan`: batch size, sequence length, accumulation, gradient checkpointing.

    Raises:
        ValueError: A number is not above 0; see also `plan`.
    """
    if gpus < 1 or gpu_memory <= 0 or lora_rank < 1:
        raise ValueError(
            f"`gpus` is {gpus}, `gpu_memory` {gpu_memory} GiB and `lora_rank` {lora_rank}; expected numbers above 0."
        )
    found = []
    for name, flags, choices in _choices(gpus, lora_rank):
        needs = plan(teacher_config, student_config, world_size=gpus, **choices, **settings)
        found.append(Way(name, flags, needs, gpu_memory * GIB))
    return found


def _choices(gpus: int, lora_rank: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, flags and arguments of `plan`, in the order of preference."""
    from peft import LoraConfig

    students = {
        "whole student": ("", {}),
        f"adapter of rank {lora_rank}": (
            f"--lora_rank {lora_rank}",
            {"peft_config": LoraConfig(r=lora_rank, target_modules="all-linear")},
        ),
    }
    teachers = {
        "": ("", {}),
        ", nf4 teacher": ("--teacher_quantization nf4", {"teacher_quantization": "nf4"}),
        ", soft labels from disk": ("--teacher_cache FOLDER", {"teacher_cached": True}),
    }
    layouts = {"ddp": "DDP"} | ({"fsdp2": "FSDP2", "zero3": "ZeRO-3"} if gpus > 1 else {})
    found: list[tuple[str, str, dict[str, Any]]] = []
    for (student, (trained, student_settings)), (teacher, (source, teacher_settings)), (sharding, layout) in product(
        students.items(), teachers.items(), layouts.items()
    ):
        parts = (f"--config_file recipes/accelerate/{sharding}.yaml", "RECIPE", source, trained)
        settings: dict[str, Any] = {"sharding": sharding, **student_settings, **teacher_settings}
        found.append((f"{student}{teacher}, {layout}", " ".join(part for part in parts if part), settings))
    return found

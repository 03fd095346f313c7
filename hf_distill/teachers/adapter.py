"""The student's own base as teacher: the adapter is switched off for the teacher's pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_distill.anatomy import shape_of, task_of, unwrap
from hf_distill.quantization import prepare_quantized_student, quantization_of
from hf_distill.signals import Layers, ModelShape, Signal, TeacherSignals
from hf_distill.teachers.base import Teacher, class_names
from hf_distill.teachers.inputs import model_inputs
from hf_distill.teachers.model import public_name, read_signals


class AdapterDisabledTeacher(Teacher):
    """The base model of a LoRA student, by switching its adapter off: no second copy of the weights.

    It runs in the student's own precision and autocast, so that an adapter that has learned nothing gives exactly the
    teacher's distribution. During the teacher's pass all dropout is off; afterwards the training flag of every module
    and the `requires_grad` of every parameter are what they were.

    Args:
        model: The student, a `PeftModel`, wrapped (DDP, FSDP2) or not; it is called as it was given.

    Raises:
        ValueError: It is not a `PeftModel`; the adapter is prompt learning, which has no layers to switch off; or
            weights of the base itself are trained, so that there is no base left to be the teacher.
    """

    provides = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES, Signal.ATTENTION})

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._peft = _peft_model(model)
        base = unwrap(model)
        # The teacher's pass is an eval pass: on some CPUs it would leave 4-bit weights without gradient.
        prepare_quantized_student(model)
        self.name = self._peft.active_peft_config.base_model_name_or_path or base.config.name_or_path or None
        self.task = task_of(base)
        self.vocab_size = base.config.get_text_config().vocab_size
        self.labels = class_names(base) if self.task == "sequence_classification" else None

    def config_for_card(self) -> dict[str, Any]:
        """Name, architecture and quantisation of the base; what is not known is left out."""
        facts = {
            "name": public_name(self.name),
            "architecture": type(unwrap(self.model)).__name__,
            "quantization": quantization_of(unwrap(self.model).config),
            "adapter": "disabled",
        }
        return {key: value for key, value in facts.items() if value is not None}

    def shape(self) -> ModelShape:
        """Depth and width; see `Teacher.shape`."""
        return shape_of(self.model, "teacher")

    @contextmanager
    def as_model(self) -> Iterator[nn.Module]:
        """The student without its adapter; see `Teacher.as_model`."""
        with self._adapter_disabled():
            yield self.model

    def _signals(self, batch: Mapping[str, Any], needs: frozenset[Signal], layers: Layers) -> TeacherSignals:
        inputs = model_inputs(unwrap(self.model), batch)
        with torch.no_grad(), self._adapter_disabled():
            logits, read = read_signals(self.model, inputs, layers)
        return TeacherSignals(logits if Signal.LOGITS in needs else None, read.hidden, read.attention, read.final_norm)

    @contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        """Switch adapters and dropout off; PEFT's own context would leave every adapter parameter trainable."""
        training = [module for module in self.model.modules() if module.training]
        trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for module in training:
            module.training = False
        try:
            with self._peft.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            for module in training:
                module.training = True


def _peft_model(model: nn.Module) -> Any:
    """The `PeftModel` inside the wrappers of a distributed run, checked to have a base that stays what it was."""
    from peft import PeftModel

    inner = extract_model_from_parallel(model)
    if not isinstance(inner, PeftModel):
        raise ValueError(
            f'`teacher_model="base"` needs a LoRA student, but the student is a {type(inner).__name__}; pass '
            "`peft_config=LoraConfig(...)` to the trainer, or load a teacher with `load_teacher(name)`."
        )
    if inner.active_peft_config.is_prompt_learning:
        raise ValueError(
            f'`teacher_model="base"` does not work with prompt learning ({inner.active_peft_config.peft_type.value}); '
            "use an adapter in the layers, `peft_config=LoraConfig(...)`, or load a teacher with `load_teacher(name)`."
        )
    marks = (getattr(inner.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    trained = [n for n, p in inner.named_parameters() if p.requires_grad and not any(mark in n for mark in marks)]
    if trained:
        raise ValueError(
            f'`teacher_model="base"` needs a frozen base, but {len(trained)} of its parameters are trained, such as '
            f'{trained[0]!r}; use `LoraConfig(bias="none")` and `modules_to_save`, or load a teacher with '
            "`load_teacher(name)`."
        )
    return inner

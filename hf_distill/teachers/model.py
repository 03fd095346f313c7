"""The usual teacher: a frozen model beside the student."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.anatomy import ModuleHead, resolve_head, shape_of, task_of, unwrap, virtual_tokens, vocabulary_size
from hf_distill.functional import LMHead
from hf_distill.quantization import quantization_of
from hf_distill.signals import Layers, ModelShape, Projection, Signal, TeacherSignals, identity
from hf_distill.taps import LayersTap, tap_last_hidden, tap_layers
from hf_distill.teachers.base import Teacher, class_names
from hf_distill.teachers.inputs import model_inputs
from hf_distill.teachers.placement import RemoteHead, place


class ModelTeacher(Teacher):
    """A frozen model: no gradient, no dropout, no cache.

    Its layers compute in the precision of their own weights, whatever autocast the student trains under, so that its
    hidden states are the same in training, in evaluation and in a cache: load it in bfloat16 to make it fast. (Sharded
    by FSDP2 it follows the mixed-precision policy of the plugin.)

    Args:
        model: A causal LM, masked LM or sequence classifier, with a PEFT adapter or without. It is frozen and put in
            eval mode, in place.
        tokenizer: Its tokenizer, to check the student's against.
        name: What it is called; `config.name_or_path` if None.

    Raises:
        ValueError: The task cannot be told from the model, or its adapter puts virtual tokens before the text.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        teacher = ModelTeacher(model, AutoTokenizer.from_pretrained(name))
        ```
    """

    provides = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES, Signal.ATTENTION})

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
    ) -> None:
        kind = virtual_tokens(model)
        if kind is not None:
            raise ValueError(
                f"The teacher has a {kind} adapter, whose virtual tokens have no counterpart in the student; use a "
                "LoRA adapter or a full model as teacher."
            )
        self._base = unwrap(model)
        self.task = task_of(self._base)
        self.model: nn.Module = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name or self._base.config.name_or_path or None
        self.vocab_size = self._base.config.get_text_config().vocab_size
        self.labels = class_names(self._base) if self.task == "sequence_classification" else None
        self.reads_token_types = "token_type_ids" in inspect.signature(self._base.forward).parameters
        self._num_parameters = _count_parameters(self._base)
        self._known_ids = min(self.vocab_size, vocabulary_size(tokenizer)) if tokenizer else self.vocab_size
        self._device: torch.device | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the model to the device of this process, or shard it as the student is (FSDP2, ZeRO-3).

        Raises:
            ValueError: A distributed run cannot place it: it is spread over devices, or quantised on another one.
        """
        if self._device is not None:
            return  # sharded already
        self.model, self._device = place(self.model, accelerator)

    def config_for_card(self) -> dict[str, Any]:
        """Name, commit, architecture, size, precision and quantisation; what is not known is left out."""
        config = self._base.config
        facts = {
            "name": public_name(self.name),
            "revision": getattr(config, "_commit_hash", None),
            "architecture": type(self._base).__name__,
            "parameters": self._num_parameters,
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "quantization": quantization_of(config),
        }
        return {key: value for key, value in facts.items() if value is not None}

    def shape(self) -> ModelShape:
        """Depth and width; see `Teacher.shape`."""
        return shape_of(self.model, "teacher")  # not the base: an adapter may change what can be heard

    @contextmanager
    def as_model(self) -> Iterator[nn.Module]:
        """The model, computing in the precision of its own weights; see `Teacher.as_model`."""
        self.model.eval()
        with torch.autocast(self._base.device.type, enabled=False):
            yield self.model

    def _signals(self, batch: Mapping[str, Any], needs: frozenset[Signal], layers: Layers) -> TeacherSignals:
        home = batch["input_ids"].device
        device = self._device or self._base.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded: hooks on the modules move the inputs
            device = home
        inputs = model_inputs(self._base, self._only_known_tokens(batch))
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        self.model.eval()  # somebody may have called .train() on a model that is theirs too
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits, read = read_signals(self.model, inputs, layers)
        norm, norm_device = read.final_norm, logits.hidden.device  # what enters the head comes out of the norm
        if norm is not None and norm_device != home:
            norm = RemoteHead(norm, norm_device, home)
        return TeacherSignals(
            logits=_at_home(logits, home) if Signal.LOGITS in needs else None,
            hidden={layer: states.to(home) for layer, states in read.hidden.items()},
            attention={layer: states.to(home) for layer, states in read.attention.items()},
            final_norm=norm,
        )

    def _only_known_tokens(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Check that the teacher knows every token that it reads or judges; padding that it does not know is replaced.

        The student's tokenizer may have a pad token of its own, beyond the teacher's embedding.
        """
        ids = batch["input_ids"]
        unknown = ids >= self._known_ids
        labels = batch.get("labels") if self.task != "sequence_classification" else None
        judged = torch.zeros_like(unknown) if labels is None else labels >= self._known_ids
        if not (unknown | judged).any():
            return batch
        mask = batch.get("attention_mask")
        read = unknown if mask is None or mask.shape != ids.shape else unknown & (mask != 0)
        if (read | judged).any():
            token = int(ids[read][0]) if read.any() else int(labels[judged][0])  # type: ignore[index]
            raise ValueError(
                f"The batch holds token id {token}, but the teacher ({self.name}) knows only ids below "
                f"{self._known_ids}: the student's tokenizer has a token that the teacher was not trained with. "
                "Prepare the data with the teacher's tokenizer, or drop the rows that contain it."
            )
        pad = self._base.config.get_text_config().pad_token_id
        return {**batch, "input_ids": ids.masked_fill(unknown, 0 if pad is None else pad)}


def check_not_student(student: nn.Module, teacher: nn.Module | Teacher) -> None:
    """Check that the teacher is another model than the student; call it before a `ModelTeacher` freezes the model.

    Args:
        student: The student, wrapped or not.
        teacher: A model, or any teacher.

    Raises:
        ValueError: Both have parameters in common, as the student itself or the base of its adapter would.
    """
    model = teacher.model if isinstance(teacher, ModelTeacher) else teacher
    if not isinstance(model, nn.Module):
        return
    own = {id(parameter) for parameter in student.parameters()}
    common = sum(id(parameter) in own for parameter in model.parameters())
    if common:
        raise ValueError(
            f"`teacher_model` shares {common} parameters with the student, so it would be trained too. Load it on its "
            'own, `teacher_model=load_teacher(name)`; for the base of a LoRA student pass `teacher_model="base"`.'
        )


def public_name(name: str | None) -> str | None:
    """A name that can be published: of a local folder, only its last part."""
    if name is None:
        return None
    is_path = os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)
    return os.path.basename(os.path.normpath(name)) if is_path else name


def read_signals(model: nn.Module, inputs: Mapping[str, Any], layers: Layers) -> tuple[Projection, LayersTap]:
    """Call a model once: its logits, not yet projected, and what was asked of its layers."""
    with tap_layers(model, layers) as tap:
        logits = project(model, inputs)
    return logits, tap


def project(model: nn.Module, inputs: Mapping[str, Any]) -> Projection:
    """Call a model and return its logits, not yet projected for language models."""
    if task_of(model) == "sequence_classification":
        return Projection(hidden=model(**inputs).logits, head=identity)
    with tap_last_hidden(model) as tap:
        model(**inputs)
    # An adapter that is disabled now stays out of the head; a shard is gathered now, on all ranks together.
    return Projection(hidden=tap.hidden, head=resolve_head(model))


def _at_home(projection: Projection, home: torch.device) -> Projection:
    """Bring what is read later to the student's device, and make the head accept it."""
    hidden, head = projection.hidden, projection.head
    if isinstance(head, LMHead):
        hidden = hidden.to(head.weight.dtype)  # they differ where FSDP2's policy computes in another precision
    if isinstance(head, LMHead | ModuleHead):
        weight = head.weight if isinstance(head, LMHead) else next(head.module.parameters())
        device = hidden.device if weight.is_meta else weight.device
        if device != home:
            head = RemoteHead(head, device, home)
    return Projection(hidden=hidden.to(home), head=head)


def _count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model; ZeRO-3 leaves a part of each tensor here."""
    if any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
        return sum(parameter.ds_numel for parameter in model.parameters())
    return model.num_parameters()

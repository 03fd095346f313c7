"""Training with the rounding in it: quantisation-aware training, and distillation where a teacher is given."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.anatomy import unwrap
from hf_distill.students.quantize import check_model, check_target, write_quantized
from hf_distill.students.quantize_check import Row
from hf_distill.students.quantize_report import QuantizeReport
from hf_distill.students.quantizers.base import Quantizer, Source, linear_layers
from hf_distill.students.quantizers.compressed_format import CompressedTensorsQuantizer
from hf_distill.students.quantizers.torchao_format import TorchAOQuantizer, intx_config


BITS = (4, 8)
FORMATS = ("compressed-tensors", "torchao")


def prepare_qat(model: PreTrainedModel, bits: int = 4, group_size: int = 32) -> PreTrainedModel:
    """Make the linear layers of a student compute with weights as they will be rounded.

    Forward rounds to symmetric integers with a scale for each group of inputs, which follows the weights; backward
    passes the gradient to the weights as if there were no rounding (straight-through). Train the result with any
    trainer: `KDTrainer` with the student's own unquantised self or the original teacher makes it quantisation-aware
    distillation (arXiv:2601.20088), for which forward KL alone and a small learning rate (1e-5 for large models) are
    recommended. Then `convert_qat`. What the trainer saves meanwhile are the unrounded weights, as a plain model;
    to go on from these, load them and prepare again.

    Args:
        model: The student; its linear layers are replaced in place, the head and the embedding are not.
        bits: 4 or 8.
        group_size: It must divide the widths.

    Returns:
        The same model.

    Raises:
        ValueError: The bits or the group size do not fit, or the model has quantised weights, which would get no
            gradient, or adapters.
        ImportError: torchao is not installed.

    Example:
        >>> student = prepare_qat(AutoModelForCausalLM.from_pretrained("student"))
        >>> args = KDConfig("qad", ce_weight=0.0, kd_weight=1.0, temperature=1.0, learning_rate=1e-5)
        >>> KDTrainer(student, args=args, teacher_model="student", train_dataset=rows).train()
        >>> report = convert_qat(student, "student-w4a16")
    """
    if bits not in BITS:
        raise ValueError(f"`bits` is {bits}; expected one of {BITS}.")
    quantizer = TorchAOQuantizer("qat", bits, group_size)
    quantizer.check_installed()
    if fake_quantized_layers(model):
        raise ValueError("The student is prepared already; train it, then call `convert_qat(model, folder)`.")
    quantizer.check(check_model(model), None)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    layers = linear_layers(model)
    base = intx_config(bits, group_size)
    quantize_(model, QATConfig(base, step="prepare"), filter_fn=lambda module, name: name in layers)
    return model


def convert_qat(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    check: Iterable[Row] | None = None,
    reference: PreTrainedModel | None = None,
) -> QuantizeReport:
    """Write the model folder of a student that was trained after `prepare_qat`.

    The folder computes what the student computed in training, from integers and scales. The student is left as it is.

    Args:
        model: The student.
        folder: Where to write; it must not exist yet, or be empty.
        format: "compressed-tensors", where 4 bits take 4 bits and which vLLM reads, or "torchao", where they take a
            byte.
        tokenizer: Written beside the model.
        check: Rows of token ids on which what was written is compared with `reference`.
        reference: The unquantised student or the teacher; None for the student as it was trained, which shows that
            nothing was lost.

    Raises:
        ValueError: The model was not prepared, or an argument is wrong.
        ImportError: The package is not installed.
    """
    base = unwrap(model)
    fake = fake_quantized_layers(base)
    if not fake:
        raise ValueError(
            "The student was not prepared; call `prepare_qat(model)` before it is trained, or "
            "`quantize(model, folder)` to round it as it is."
        )
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}; expected one of {', '.join(map(repr, FORMATS))}.")
    quantizer = _quantizer(format, fake)
    quantizer.check_installed()
    target = check_target(folder)
    with tempfile.TemporaryDirectory(prefix="hf_distill-") as scratch:
        base.save_pretrained(scratch, state_dict=_state(base, fake, rounded=format == "compressed-tensors"))
        source = Source(Path(scratch), base, tokenizer)
        return write_quantized(quantizer, source, target, check, base if reference is None else reference)


def fake_quantized_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that `prepare_qat` made, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "weight_fake_quantizer")}


def _quantizer(format: str, fake: dict[str, Any]) -> Quantizer:
    """What writes the integers of the training."""
    settings = next(iter(fake.values())).weight_fake_quantizer.config
    bits = 4 if settings.dtype == torch.int4 else 8
    if format == "torchao":
        return TorchAOQuantizer(f"qat-int{bits}", bits, settings.group_size)
    scales = {name: _rounded(layer)[1] for name, layer in fake.items()}
    return CompressedTensorsQuantizer(f"qat-w{bits}a16", bits, settings.group_size, scales)


@torch.no_grad()
def _rounded(layer: Any) -> tuple[Tensor, Tensor]:
    """The weights `[out, in]` that a layer computes with, and the scales of their groups `[out, groups]`."""
    weight = layer.weight_fake_quantizer(layer.weight)
    return weight, layer.weight_fake_quantizer.scale


def _state(model: PreTrainedModel, fake: dict[str, Any], *, rounded: bool) -> dict[str, Tensor]:
    """The weights to save: as trained, or as rounded, from which the same scales give the same integers again."""
    state = dict(model.state_dict())
    if rounded:
        state |= {f"{name}.weight": _rounded(layer)[0] for name, layer in fake.items()}
    return state

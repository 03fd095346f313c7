"""Quantised weights: how bitsandbytes is set up, and what a quantised student needs to keep its gradients."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel


QUANTIZATIONS = ("nf4", "int8")


def bitsandbytes_config(quantization: str) -> BitsAndBytesConfig:
    """Settings of a frozen quantised model.

    `nf4` is QLoRA's format with double quantisation and bfloat16 compute (arXiv:2305.14314), 4.13 bits a weight;
    `int8` is LLM.int8() (arXiv:2208.07339). Embeddings and the head stay as they are.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"`quantization={quantization!r}` needs bitsandbytes, which is not installed: "
            '`pip install "hf_distill[quant]"`.'
        )
    if quantization == "int8":
        # One warning for every product of every layer and step, about what LLM.int8() always does.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_about_casting)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _is_not_about_casting(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Name the quantisation of a model's weights: "nf4", "int8", another method's name, or None."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    if settings.get("load_in_4bit"):
        return str(settings["bnb_4bit_quant_type"])
    if settings.get("load_in_8bit"):
        return "int8"
    return str(getattr(settings["quant_method"], "value", settings["quant_method"]))


def prepare_quantized_student(model: nn.Module) -> None:
    """Make sure that gradients pass through quantised layers, and keep them as they were loaded.

    On CPUs with AVX512-BF16 the first forward pass of a `Linear4bit` in eval mode repacks its weight into a layout
    that has no backward: after any evaluation the layers below get no gradient, without an error, and what is saved
    differs from what was loaded. This is switched off here; call it before the first eval pass. Layers of torchao that
    quantise their inputs have no backward at all, so they are refused. Other models are left alone.

    Args:
        model: The student, wrapped or not.

    Raises:
        ValueError: An eval pass has repacked the weights already, and the exact ones are lost; or a layer passes no
            gradient on.
    """
    _check_differentiable(model)
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit student ran in eval mode before, which left {name!r} without gradient. Load it again and "
                "call `prepare_quantized_student(model)` (or build the trainer) before evaluating or generating."
            )
        module.support_avx512bf16_for_cpu = False


def _check_differentiable(model: nn.Module) -> None:
    """Pass one row through every layer that holds torchao's weights."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight, kind = module.weight, type(module.weight.data)
        if not kind.__module__.startswith("torchao."):
            continue
        sample = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(module(sample).sum() + 0 * sample.sum(), sample)
        if not gradient.any():
            raise ValueError(
                f"The student's layer {name!r} ({kind.__name__}) passes no gradient to the layers below it, which "
                "would train on nothing, without an error. Quantise weights alone (`method='int8'`, or "
                "`quantization='nf4'`), or train unquantised weights with `prepare_qat(model)`."
            )


def skip_unpackable_layers(model: PreTrainedModel) -> None:
    """Keep layers whose shape it crashes on, such as pruned ones, out of the repacking on CPUs."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (module.out_features % 32 or module.in_features % 64):
            module.support_avx512bf16_for_cpu = False

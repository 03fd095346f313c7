"""Naive twins of pruned models: the full model, with what was cut masked while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_distill.anatomy import describe
from hf_distill.students.report import PruneReport
from tests import tiny


IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
# By family, the last names of the modules whose input are the neurons, and the outputs of the heads.
DOWN = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2", "bert": "output.dense"}
GATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3")
# Windows and layers without rotary positions: the place of a layer matters.
SETTINGS = {
    "gemma2": {"sliding_window": 3},
    "gemma3": {"sliding_window": 3},
    "smollm3": {"use_sliding_window": True, "sliding_window": 3, "attention_bias": True, "mlp_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
}


def build(family: str, layers: int = 4, **config) -> PreTrainedModel:
    """A model whose every weight, bias and norm is random and matters to the logits."""
    model = tiny.model(family, layers=layers, **(SETTINGS.get(family, {}) | config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(3 if parameter.dim() > 1 else 1).add_(noise * 0.1)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def masked_logits(model: PreTrainedModel, family: str, report: PruneReport) -> torch.Tensor:
    """Logits of the full model without what the report says was cut."""
    layers, width = describe(model).layers, model.config.hidden_size
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            if index not in report.layers:
                stack.enter_context(_hook(layer, _skip))
                continue
            position = report.layers.index(index)
            if report.neurons is not None:
                down = layer.get_submodule(DOWN.get(family, "mlp.down_proj"))
                stack.enter_context(_masked_input(down, report.neurons[position], 1))
            if report.heads is not None:
                head_dim = layer.self_attn.head_dim
                stack.enter_context(_masked_input(layer.self_attn.o_proj, report.heads[position], head_dim))
        if report.channels is not None:
            for name, module in model.named_modules():
                if name.endswith(("embed_tokens", "o_proj", "down_proj")):
                    stack.enter_context(_hook(module, _masked_output(report.channels)))
                elif "RMSNorm" in type(module).__name__ and module.weight.numel() == width:
                    stack.enter_context(_hook(module, _norm_over(len(report.channels))))
        return logits(model)


@contextmanager
def _hook(module: nn.Module, change) -> Iterator[None]:
    handle = module.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _skip(module, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _mask(size: int, kept, width: int) -> torch.Tensor:
    mask = torch.zeros(size // width, width)
    mask[list(kept)] = 1
    return mask.flatten()


@contextmanager
def _masked_input(module: nn.Module, kept, width: int) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: (args[0] * _mask(args[0].shape[-1], kept, width),))
    try:
        yield
    finally:
        handle.remove()


def _masked_output(kept):
    return lambda module, args, kwargs, output: output * _mask(output.shape[-1], kept, 1)


def _norm_over(channels: int):
    """RMSNorm of a stream of which all but some channels are zero, as if these were not there."""

    def norm(module, args, kwargs, output):
        states = args[0]
        gemma = "Gemma" in type(module).__name__
        eps = module.eps if gemma else module.variance_epsilon
        scale = 1 + module.weight if gemma else module.weight
        return states * (states.square().sum(-1, keepdim=True) / channels + eps).rsqrt() * scale

    return norm

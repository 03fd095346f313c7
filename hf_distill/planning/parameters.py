"""How many parameters a config makes: the model is built on the meta device, which holds shapes and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_distill.anatomy import describe
from hf_distill.skeletons import skeleton


if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class ParameterCount:
    """Exact sizes of one model; a parameter that two modules share counts once in `total`.

    Args:
        total: All parameters.
        embedding: Rows that are looked up, not multiplied: tokens, positions, token types.
        head: The projection to the vocabulary, which is part of `embedding` when `tied`; 0 for classifiers.
        tied: The head is the token embedding.
        linear: Weights of linear layers but for the head: what 4-bit and 8-bit loading quantise.
        block: The largest transformer layer: what FSDP and ZeRO-3 gather at a time.
        layers: Number of transformer layers.
        block_width: Sum over a layer's linear modules of inputs and outputs: what its activations are made of.
        idle: Expert weights that one token does not pass (mixture of experts).
    """

    total: int
    embedding: int
    head: int
    tied: bool
    linear: int
    block: int
    layers: int
    block_width: int
    idle: int

    @property
    def non_embedding(self) -> int:
        """Parameters without embeddings and head: the N of scaling laws."""
        return self.total - self.embedding - (0 if self.tied else self.head)

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: two FLOPs each in a forward pass."""
        return self.non_embedding - self.idle + self.head


def parameter_count(config: PreTrainedConfig) -> ParameterCount:
    """Count the parameters of the model that a config describes, exactly and without memory for weights.

    Args:
        config: `architectures` names the class; a causal language model when it is empty.
    """
    model = skeleton(config)
    layers = describe(model).layers
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None) or 0
    looked_up = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return ParameterCount(
        total=model.num_parameters(),
        embedding=sum(looked_up.values()),
        head=0 if head_weight is None else head_weight.numel(),
        tied=id(head_weight) in looked_up,
        linear=sum(m.weight.numel() for m in _linear_modules(model) if m is not head),
        block=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        layers=len(layers),
        block_width=max(_width(layer, chosen) for layer in layers),
        idle=sum(p.numel() // p.shape[0] * (p.shape[0] - chosen) for p in _experts(model) if chosen),
    )


def adapter_count(config: PreTrainedConfig, peft_config: PeftConfig) -> int:
    """Count the parameters that train when PEFT adds an adapter to the model of a config."""
    from peft import get_peft_model

    model = skeleton(config)
    with torch.device("meta"):
        adapted = get_peft_model(model, peft_config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _linear_modules(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]


def _experts(module: nn.Module) -> list[nn.Parameter]:
    """Weights of experts are stacked: `[experts, ., .]`."""
    return [p for p in module.parameters() if p.dim() == 3]


def _width(layer: nn.Module, experts_per_token: int) -> int:
    dense = sum(sum(m.weight.shape) for m in _linear_modules(layer))
    return dense + experts_per_token * sum(sum(p.shape[1:]) for p in _experts(layer))

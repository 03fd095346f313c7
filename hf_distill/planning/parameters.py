"""How many parameters a config makes: the model is built on the meta device, which holds shapes and no weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_distill.anatomy import describe, unwrap
from hf_distill.skeletons import skeleton


if TYPE_CHECKING:
    from peft import PeftConfig


Result = TypeVar("Result")


def remember(function: Callable[..., Result]) -> Callable[..., Result]:
    """Call a function once for configs of the same content: a comparison of many ways asks the same many times."""
    known: dict[tuple[Any, ...], Result] = {}

    @wraps(function)
    def remembering(*arguments: Any) -> Result:
        key = tuple(_content(argument) for argument in arguments)
        if key not in known:
            known[key] = function(*arguments)
        return known[key]

    return remembering


def _content(argument: Any) -> Any:
    if not hasattr(argument, "to_dict"):
        return argument
    facts = {key: value for key, value in argument.to_dict().items() if key != "_name_or_path"}
    return type(argument), str(facts)


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
        widest: The largest of the weights of linear layers: what 4-bit and 8-bit weights are made whole for.
        idle: Expert weights that one token does not pass (mixture of experts).
    """

    total: int
    embedding: int
    head: int
    tied: bool
    linear: int
    block: int
    layers: int
    widest: int
    idle: int

    @property
    def non_embedding(self) -> int:
        """Parameters without embeddings and head: the N of scaling laws."""
        return self.total - self.embedding - (0 if self.tied else self.head)

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: two FLOPs each in a forward pass."""
        return self.non_embedding - self.idle + self.head


@remember
def parameter_count(config: PreTrainedConfig) -> ParameterCount:
    """Count the parameters of the model that a config describes, exactly and without memory for weights.

    Args:
        config: `architectures` names the class; a causal language model when it is empty.
    """
    model = unwrap(build(config))
    layers = describe(model).layers
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None) or 0
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    looked_up = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return ParameterCount(
        total=model.num_parameters(),
        embedding=sum(looked_up.values()),
        head=0 if head_weight is None else head_weight.numel(),
        tied=id(head_weight) in looked_up,
        linear=sum(linear),
        block=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        layers=len(layers),
        widest=max(linear),
        idle=sum(p.numel() // p.shape[0] * (p.shape[0] - chosen) for p in _experts(model) if chosen),
    )


@remember
def adapter_count(config: PreTrainedConfig, peft_config: PeftConfig) -> int:
    """Count the parameters that train when PEFT adds an adapter to the model of a config."""
    adapted = build(config, peft_config=peft_config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def build(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    peft_config: PeftConfig | None = None,
    depth: int | None = None,
) -> nn.Module:
    """Build the model of a config on the meta device, with its first `depth` layers, and an adapter if asked."""
    model = skeleton(config, dtype)
    if depth is not None:
        del describe(model).layers[depth:]
    if peft_config is None:
        return model
    from peft import get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, deepcopy(peft_config))  # which writes into its config


def _experts(module: nn.Module) -> list[nn.Parameter]:
    """Weights of experts are stacked: `[experts, ., .]`."""
    return [p for p in module.parameters() if p.dim() == 3]

"""How many parameters a config makes: the model is built on the meta device, which holds shapes and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class ParameterCount:
    """Exact sizes of one model; a parameter that two modules share counts once in `total`.

    Args:
        total: All parameters.
        embedding: Rows that are looked up and not multiplied: tokens, positions, token types.
        head: The projection to the vocabulary; it is part of `embedding` when `tied`. 0 for a classifier.
        tied: The head is the token embedding.
        linear: Weights of linear layers without the head: what 4-bit and 8-bit loading quantise.
        block: The largest transformer layer: what FSDP and ZeRO-3 gather at a time.
        idle: Expert weights that one token does not pass (mixture of experts).
    """

    total: int
    embedding: int
    head: int
    tied: bool
    linear: int
    block: int
    idle: int = 0

    @property
    def non_embedding(self) -> int:
        """Parameters without embeddings and head, the N of scaling laws."""
        return self.total - self.embedding - (0 if self.tied else self.head)

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: two FLOPs each in a forward pass."""
        return self.non_embedding - self.idle + self.head


def parameter_count(config: PreTrainedConfig) -> ParameterCount:
    """Count the parameters of the model that a config describes, exactly and without memory for weights.

    Args:
        config: Of any transformers model; `architectures` names the class, a causal language model when it is empty.
    """
    return count(skeleton(config))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device, in bf16."""
    with torch.device("meta"):
        if config.architectures:
            return getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.bfloat16)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def count(model: PreTrainedModel) -> ParameterCount:
    """Count the parameters of a model that is not wrapped."""
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    embeddings = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    return ParameterCount(
        total=model.num_parameters(),
        embedding=sum(weight.numel() for weight in embeddings.values()),
        head=0 if head_weight is None else head_weight.numel(),
        tied=id(head_weight) in embeddings,
        linear=sum(module.weight.numel() for module in linear),
        block=_largest_block(model),
        idle=_idle_experts(model),
    )


def adapted(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Add adapters to a model on the meta device."""
    from peft import get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, peft_config)


def trainable(model: nn.Module) -> int:
    """Count the parameters that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _largest_block(model: PreTrainedModel) -> int:
    names = set(model._no_split_modules or ())
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)


def _idle_experts(model: PreTrainedModel) -> int:
    """Expert weights are stacked, `[experts, ...]`; every token takes `num_experts_per_tok` of them."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if not chosen:
        return 0
    stacked = [p for p in model.parameters() if p.dim() == 3]
    return sum(p.numel() - p.numel() * chosen // p.shape[0] for p in stacked)

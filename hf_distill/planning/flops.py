"""Floating point operations of a distillation step, counted per token: one multiply and add are two.

Source: Kaplan et al., arXiv 2001.08361, section 2.1: forward 2N, backward 4N.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


def forward_flops(parameters: int, attention: float = 0.0) -> float:
    """Of one token's forward pass: `2 N` plus attention.

    Args:
        parameters: N, the parameters that the token is multiplied with (`ParameterCount.multiplied`).
        attention: From `attention_flops`.
    """
    return 2.0 * parameters + attention


def training_flops(parameters: int, attention: float = 0.0, *, adapter: int | None = None) -> float:
    """Of one token's forward and backward pass.

    `6 N` when all parameters train. Frozen weights need no gradient: `4 N`, plus `6` per adapter parameter. Attention
    has no weights, so its backward pass costs twice its forward pass in both cases.

    Args:
        parameters: N, the base model's own parameters only.
        attention: Forward FLOPs of attention, from `attention_flops`.
        adapter: Trainable parameters of an adapter on a frozen model; None trains everything.
    """
    weights = 6.0 * parameters if adapter is None else 4.0 * parameters + 6.0 * adapter
    return weights + 3.0 * attention


def attention_flops(config: PreTrainedConfig, sequence_length: int) -> float:
    """Of scores and weighted values in one token's forward pass, all layers: `2 L S d` if causal, else `4 L S d`.

    A causal model looks at half of the sequence on average. Sliding windows are not taken into account.

    Args:
        config: Its heads and their size give d, which is not always the hidden size.
        sequence_length: S.
    """
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    causal = "CausalLM" in "".join(config.architectures or ["CausalLM"])
    return (2.0 if causal else 4.0) * text.num_hidden_layers * sequence_length * text.num_attention_heads * size

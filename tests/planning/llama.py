"""The configs of Llama 3.1, written out: the tests need no Hub."""

from __future__ import annotations

from transformers import LlamaConfig


COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}


def llama_70b() -> LlamaConfig:
    """Llama-3.1-70B."""
    return LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **COMMON
    )


def llama_8b() -> LlamaConfig:
    """Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **COMMON
    )

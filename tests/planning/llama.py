"""The configs of Llama 3.1, written out: the tests need no Hub."""

from __future__ import annotations

from functools import cache

from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedConfig

from hf_distill.planning import ParameterCount, parameter_count
from tests import tiny


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


@cache
def count_70b() -> ParameterCount:
    """Sizes of Llama-3.1-70B, counted once."""
    return parameter_count(llama_70b())


@cache
def count_8b() -> ParameterCount:
    """Sizes of Llama-3.1-8B, counted once."""
    return parameter_count(llama_8b())


def config_of(model) -> PreTrainedConfig:
    """The config of a model as `from_pretrained` would give it: with the name of the class."""
    model.config.architectures = [type(model).__name__]
    return model.config


def tiny_config(family: str = "llama", **kwargs) -> PreTrainedConfig:
    """The config of a tiny model."""
    return config_of(tiny.model(family, **kwargs))


def lora():
    """An adapter on all linear layers."""
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")

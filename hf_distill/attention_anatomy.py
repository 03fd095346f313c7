"""Facts about attention in Hugging Face models: its heads, how it is called, and its projections."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


# What maps to queries, keys and values, where they are three modules.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


def head_shape(config: PreTrainedConfig) -> dict[str, int]:
    """Number and width of heads, as fields of `ModelShape`; none where the config does not say it plainly."""
    heads = getattr(config, "num_attention_heads", None)
    # Latent attention has other widths for values than for queries, and other names for both.
    if not isinstance(heads, int) or hasattr(config, "kv_lora_rank"):
        return {}
    shared = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"num_heads": heads, "num_kv_heads": shared or heads, "head_dim": width}


def uses_interface(layer: nn.Module) -> bool:
    """Whether the attention of a layer is called through transformers' `AttentionInterface`."""
    return any(_modeling_code(module) is not None for module in layer.modules())


def attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """What an attention module calls under an implementation; "eager" is a function of its modeling file.

    Raises:
        ValueError: It is eager, and the file has no function of the usual name.
    """
    code = _modeling_code(module)
    eager = getattr(code, "eager_attention_forward", None)
    if code is None or (implementation == "eager" and eager is None):
        raise ValueError(
            f"The attention of {type(module).__name__} cannot be tapped under its eager implementation; set "
            "`attn_implementation='sdpa'`."
        )
    return code.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def projections(layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The modules of a layer whose outputs are queries, keys and values, adapters included.

    Raises:
        ValueError: There are none under a name that is known.
    """
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        found.setdefault(path.rpartition(".")[2], module)  # an adapter comes before what it wraps
    for query, key, value in PROJECTIONS:
        if {query, key, value} <= found.keys():
            return found[query], found[key], found[value]
    raise ValueError(
        f"{type(layer).__name__} does not call its attention through transformers' `AttentionInterface`, and has no "
        f"separate modules for queries, keys and values ({', '.join(names[0] for names in PROJECTIONS)} and so on), "
        "so its attention cannot be distilled; match hidden states instead."
    )


def _modeling_code(module: nn.Module) -> Any:
    """The Python module that defines a module's class, if it calls attention through the interface."""
    # The bases count too: FSDP2 and users derive classes.
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS")), None)

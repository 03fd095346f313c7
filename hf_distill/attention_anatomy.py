"""Facts about attention in Hugging Face models: its heads, how it is called, and its projections."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


# What the name of an implementation begins with while it is tapped.
TAPPED = "hf_distill_tap_"
# What maps to queries, keys and values, where they are three modules.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


def head_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """Number and width of heads, as fields of `ModelShape`; none where the config does not say it plainly."""
    heads = getattr(config, "num_attention_heads", None)
    # Latent attention has other widths for values than for queries, and other names for both.
    if not isinstance(heads, int) or hasattr(config, "kv_lora_rank"):
        return {}
    shared = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"num_heads": heads, "num_kv_heads": shared or heads, "head_dim": width}


def interface_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that call their attention through transformers' `AttentionInterface`."""
    return [module for module in layer.modules() if _calls_interface(module.__class__)]


def attention_limits(layers: Sequence[nn.Module], learned_prompt: str | None) -> dict[str, Any]:
    """What cannot be had of the attention of layers, and why, as fields of `ModelShape`."""
    limits: dict[str, dict[int, str]] = {"no_attention": {}, "no_attention_maps": {}}
    for number, layer in enumerate(layers, start=1):
        for field, check in (("no_attention", check_tappable), ("no_attention_maps", check_maps)):
            try:
                check(layer)
            except ValueError as error:
                limits[field][number] = str(error)
        if learned_prompt is not None:
            limits["no_attention"][number] = (
                f"its adapter ({learned_prompt}) adds keys to those of the text; use `LoraConfig`."
            )
    return limits


def check_tappable(layer: nn.Module) -> None:
    """Check that queries, keys and values of a layer can be heard.

    Raises:
        ValueError: They cannot: of the implementation it is not known which keys its queries see, or the layer has no
            attention that is known.
    """
    calling = interface_modules(layer)
    for module in calling:
        own = str(module.config._attn_implementation).removeprefix(TAPPED)
        if not (own in ("eager", "sdpa") or "flash" in own):
            raise ValueError(
                f"The model's attention implementation is {own!r}, which cannot be tapped; load it with "
                "`attn_implementation='sdpa'`, 'eager' or 'flash_attention_2'."
            )
        attention_function(module, own)
    if not calling:
        projections(layer)


def check_maps(layer: nn.Module) -> None:
    """Check that attention maps of a layer that can be tapped can be rebuilt from its queries and keys.

    Raises:
        ValueError: They cannot.
    """
    if not interface_modules(layer):
        raise ValueError(
            f"{type(layer).__name__} does not use transformers' `AttentionInterface`, so its queries and keys are "
            "heard before their position embedding; use `loss='relations'`."
        )
    if any(getattr(module, "sinks", None) is not None for module in layer.modules()):
        raise ValueError(
            f"The attention of {type(layer).__name__} has learned sinks beside its keys; use `loss='relations'`."
        )


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


@cache
def _calls_interface(cls: type[nn.Module]) -> bool:
    """Whether a method of a class looks up the function that its attention is dispatched to."""
    # The bases count too: FSDP2 and users derive classes.
    methods = (inspect.unwrap(method) for base in cls.__mro__ for method in vars(base).values() if callable(method))
    names = (getattr(getattr(method, "__code__", None), "co_names", ()) for method in methods)
    return any("ALL_ATTENTION_FUNCTIONS" in used for used in names)


def _modeling_code(module: nn.Module) -> Any:
    """The Python module that defines the class whose attention is called through the interface, if it is known."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS")), None)

"""Students with fresh weights: the teacher's architecture scaled down, or another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_distill.anatomy import unwrap
from hf_distill.attention_anatomy import head_shape
from hf_distill.students.families import FAMILIES
from hf_distill.students.surgery import PER_LAYER


# What a config says of one model's weights or files, and not of the architecture.
OF_ONE_MODEL = (
    "quantization_config",
    "hf_distill",
    "_name_or_path",
    "_pre_quantization_dtype",
    "transformers_version",
)


def student_from_config(
    source: nn.Module | PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any
) -> PreTrainedModel:
    """Build a student with random weights from a teacher's config, or from a config of another architecture.

    A model that starts from the teacher's weights (`shrink`, `prune`) needs far less training; this is for students
    that these cannot make, and for the comparison with them.

    What depends on the sizes follows where it is not given: the width of a head where it is the hidden size over the
    heads, the heads of keys and values by the size of their groups, and settings of single layers, of which the first
    ones stay.

    Args:
        source: A teacher, wrapped, quantised or not (its weights are not read), or a config; of a config
            `architectures` names the class, a causal language model where it is empty.
        seed: Of the weights. The global random state is left alone.
        dtype: Of the weights; optimizers need fp32 to train from scratch.
        **sizes: Fields of the config to change: `num_hidden_layers`, `hidden_size`, `intermediate_size`,
            `num_attention_heads`, `num_key_value_heads`, `vocab_size` and so on.

    Returns:
        A plain model on the CPU, in eval mode.

    Raises:
        ValueError: The config has no such field, or transformers refuses the values.

    Example:
        >>> student = student_from_config(teacher, num_hidden_layers=12, hidden_size=384, num_attention_heads=6)
        >>> student = student_from_config(Qwen3Config(...), vocab_size=teacher.config.vocab_size)
    """
    config = source if isinstance(source, PreTrainedConfig) else unwrap(source).config
    build = _builder(source, config)
    config = _with_sizes(config, sizes)
    with torch.device("meta"):  # shows what cannot be built before memory is taken
        build(_copy(config))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return build(config, dtype=dtype).eval()


def _builder(source: nn.Module | PreTrainedConfig, config: PreTrainedConfig) -> Callable[..., PreTrainedModel]:
    """What builds a model from a config."""
    if isinstance(source, nn.Module):
        return type(unwrap(source))._from_config
    if not config.architectures:
        return AutoModelForCausalLM.from_config
    if not hasattr(transformers, config.architectures[0]):
        raise ValueError(
            f"`architectures` of the config is {config.architectures}, which transformers does not have; expected a "
            'class of it, for example `config.architectures = ["Qwen3ForCausalLM"]`.'
        )
    return getattr(transformers, config.architectures[0])._from_config


def _copy(config: PreTrainedConfig) -> PreTrainedConfig:
    return type(config).from_dict(config.to_dict())


def _with_sizes(config: PreTrainedConfig, sizes: dict[str, Any]) -> PreTrainedConfig:
    """A copy of a config with other sizes, and with what follows from them."""
    fields = {name: value for name, value in config.to_dict().items() if name not in OF_ONE_MODEL}
    family = FAMILIES.get(config.model_type)
    renamed = dict(config.attribute_map) | ({"intermediate_size": family.mlp_width} if family is not None else {})
    changes = {renamed.get(name, name): value for name, value in sizes.items()}
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        known = sorted(
            name for name, value in fields.items() if isinstance(value, int) and not isinstance(value, bool)
        )
        raise ValueError(f"{type(config).__name__} has no {unknown}; expected fields such as {known}.")
    fields |= _followers(config, changes | sizes) | changes
    depth = fields[renamed.get("num_hidden_layers", "num_hidden_layers")]
    for name in PER_LAYER:
        values = fields.pop(name, None)
        if values is not None and len(values) >= depth:
            fields[name] = values[:depth]  # a deeper student takes the family's own pattern
    try:
        scaled = type(config).from_dict(fields)
        scaled.validate()
    except Exception as error:  # the validators of a config raise what they like
        raise ValueError(f"{type(config).__name__} does not take {sizes}: {error.__cause__ or error}") from error
    return scaled


def _followers(config: PreTrainedConfig, sizes: dict[str, Any]) -> dict[str, int]:
    """The width of embeddings and heads and the heads of keys and values, where they follow from the sizes."""
    hidden, now = sizes.get("hidden_size", config.hidden_size), head_shape(config)
    follows: dict[str, int] = {}
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:  # OPT
        follows["word_embed_proj_dim"] = hidden
    if not now:
        return follows
    heads = sizes.get("num_attention_heads", now["num_heads"])
    if getattr(config, "head_dim", None) == config.hidden_size // now["num_heads"]:
        follows["head_dim"] = hidden // heads
    if hasattr(config, "num_key_value_heads"):
        group = now["num_heads"] // now["num_kv_heads"]
        shared = sizes.get("num_key_value_heads", now["num_kv_heads"] if heads % group else heads // group)
        if heads % shared:
            raise ValueError(
                f"`num_attention_heads` is {heads} and `num_key_value_heads` {shared}; expected a multiple of it. "
                f"Give `num_key_value_heads` too, for example {heads}."
            )
        follows["num_key_value_heads"] = shared
    return follows

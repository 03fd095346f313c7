"""Models without weights: shapes on the meta device."""

from __future__ import annotations

from copy import deepcopy

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the model of a config on the meta device.

    Args:
        config: `architectures` names the class; a causal language model where it is empty.
        dtype: Of the parameters.
    """
    config = deepcopy(config)  # which models write into
    with torch.device("meta"):
        if config.architectures:
            return getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

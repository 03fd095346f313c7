"""From quantised weights back to plain ones, which can be cut and trained."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_distill.students.quantize import load_quantized
from hf_distill.students.quantizers.base import linear_layers, model_class


# Unit vectors that a layer answers at once.
CHUNK = 1024


@torch.no_grad()
def dequantize(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Write out the rounded weights of a folder that `quantize` or `convert_qat` made, as a plain model.

    A linear layer's weights are its answers to unit vectors, whatever the format: the result holds the weights that
    the quantised model computes with, in its dtype. What rounding lost stays lost.

    Args:
        folder: The model folder.

    Returns:
        A model of the same class in eval mode, without quantisation.

    Raises:
        ValueError: The folder has no report of `quantize`.
    """
    source = load_quantized(folder)
    source(input_ids=torch.zeros(1, 1, dtype=torch.int64))  # compressed-tensors unpacks when the model is first called
    config = copy.deepcopy(AutoConfig.from_pretrained(Path(folder)))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = model_class(config)._from_config(config, dtype=source.dtype)
    layers = linear_layers(plain)
    for name, parameter in plain.named_parameters():
        path, _, kind = name.rpartition(".")
        module = source.get_submodule(path)
        if path in layers and kind == "weight":
            parameter.copy_(_weight(module, layers[path].in_features, source.dtype))
        else:
            parameter.copy_(getattr(module, kind))
    return plain.eval()


def _weight(layer: nn.Module, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` that a layer multiplies by."""
    silent = layer(torch.zeros(1, width, dtype=dtype))  # its bias
    chunks = torch.eye(width, dtype=dtype).split(CHUNK)
    return torch.cat([layer(chunk) - silent for chunk in chunks]).T

"""torchao: integer weights in transformers' own folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig

from hf_distill.students.quantizers.base import Quantizer, Source, check_multiples, linear_layers


class TorchAOQuantizer(Quantizer):
    """Weights as int8, activations as they are.

    Without a group size every output has one scale (Int8WeightOnly). With one, each group of inputs has its own
    (IntxWeightOnly): the form in which torchao ends quantisation-aware training. Its 4-bit weights take a byte each in
    the file; `w4a16` packs them.
    """

    package = "torchao"
    module = "torchao"
    extra = "torchao"

    def __init__(self, method: str, bits: int, group_size: int | None = None) -> None:
        super().__init__(method, group_size)
        self.bits = bits

    @property
    def formats(self) -> frozenset[str]:
        """Bytes, whatever their number of bits."""
        return frozenset({"I8"})

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse group sizes that do not divide the widths."""
        linear_layers(model)
        if self.group_size is not None:
            check_multiples(model, self.method, self.group_size, hint="; choose a `group_size` that divides them.")

    def config(self) -> Any:
        """The config of torchao."""
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig() if self.group_size is None else intx_config(self.bits, self.group_size)

    def write(self, source: Source, folder: Path) -> None:
        """Let transformers quantise while it loads, and save that."""
        model = source.load(quantization_config=TorchAoConfig(self.config()))
        model.save_pretrained(folder)


def intx_config(bits: int, group_size: int) -> Any:
    """The config of torchao for symmetric integers with a scale for each group: weights only."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))

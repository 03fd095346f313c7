"""compressed-tensors: packed integer weights in the format that vLLM reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.students.quantizers.base import Quantizer, Source, check_multiples, linear_layers


GROUP_SIZES = (128, 64, 32)


class CompressedTensorsQuantizer(Quantizer):
    """Symmetric integers packed into int32 words ("pack-quantized"), activations as they are.

    transformers unpacks them in the first forward pass; vLLM computes with them. Rounding is to the nearest, with the
    scale that the largest weight of a group asks for: no calibration.

    Args:
        method: Its name.
        bits: 4 or 8.
        group_size: Inputs that share a scale. None: for 8 bits all inputs of an output; for 4 bits the largest of 128,
            64 and 32 that divides all widths.
        scales: Chosen elsewhere, `[out, in / group_size]` by layer: `convert_qat` gives those of the training.
    """

    package = "compressed-tensors"
    module = "compressed_tensors"
    extra = "compressed-tensors"

    def __init__(
        self, method: str, bits: int, group_size: int | None = None, scales: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(method, group_size)
        self.bits = bits
        self.scales = scales

    @property
    def formats(self) -> frozenset[str]:
        """Words of 32 bits."""
        return frozenset({"I32"})

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Choose the group size where none was given, and refuse one that does not divide the widths."""
        layers = linear_layers(model)
        if self.bits == 4 and self.group_size is None:
            widths = {layer.in_features for layer in layers.values()}
            fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
            self.group_size = fitting[0] if fitting else GROUP_SIZES[-1]
        # Channels, too, are packed into whole words: vLLM cuts them at these.
        multiple = self.group_size or 32 // self.bits
        hint = "; choose a `group_size` that divides them, or round widths to multiples of 64 when you prune."
        check_multiples(model, self.method, multiple, hint=hint)

    def write(self, source: Source, folder: Path) -> None:
        """Choose scales, pack the weights and save them."""
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import apply_quantization_config
        from compressed_tensors.quantization.utils import calculate_qparams

        # In fp32, so that the integers are exact; the scales are those that the folder will hold.
        model = source.load(dtype=torch.float32)
        layers = linear_layers(model)
        others = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in layers]
        config = self._config(others)
        apply_quantization_config(model, config, show_progress=False)
        arguments = config.config_groups["group_0"].weights
        with torch.no_grad():
            for name, layer in layers.items():
                if self.scales is not None:
                    scale = self.scales[name]
                else:
                    groups = layer.weight.unflatten(1, (-1, self.group_size or layer.in_features))
                    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
                layer.weight_scale.copy_(scale.to(source.model.dtype))
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.to(source.model.dtype).save_pretrained(folder)
        compressor.update_config(str(folder))

    def _config(self, others: list[str]) -> Any:
        """The config of compressed-tensors: every linear layer but those named in `others`."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        weights = QuantizationArgs(
            num_bits=self.bits,
            type="int",
            symmetric=True,
            strategy="channel" if self.group_size is None else "group",
            group_size=self.group_size,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
        return QuantizationConfig(
            config_groups={"group_0": scheme}, format="pack-quantized", ignore=others, quantization_status="frozen"
        )

"""What quantising a student cost and saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_distill.students.quantizers import Quantizer


FILE = "quantize_report.json"


@dataclass(frozen=True)
class QuantizeReport:
    """The result of `quantize` or `convert_qat`. What was not measured is None.

    Args:
        method: As it was asked for.
        backend: The package that wrote the weights.
        backend_version: Its version.
        group_size: Weights of a row that share a scale; None where all of a row do.
        gguf_file: The file to name as `gguf_file=` in `from_pretrained`; None for folders of safetensors.
        parameters: Of the model, a tied head once.
        quantized_parameters: Those in the method's format.
        weight_bytes_before: Bytes of the unquantised model's weight files.
        weight_bytes: Bytes of the weight files that were written.
        bits_per_quantized_weight: In the quantised layers, scales and all else that they store included, biases not.
        bits_per_weight: Of all tensors in the files.
        left: Matrices in another format than the method's (embeddings, the head, stacked experts), and that format.
        tokens: Predictions that were compared.
        kl: Mean of KL(unquantised || reloaded) over them, in nats, at temperature 1.
        top1_agreement: Share of them with one first choice.
    """

    method: str
    backend: str
    backend_version: str
    group_size: int | None
    gguf_file: str | None
    parameters: int
    quantized_parameters: int
    weight_bytes_before: int
    weight_bytes: int
    bits_per_quantized_weight: float
    bits_per_weight: float
    left: Mapping[str, str] = field(default_factory=dict)
    tokens: int | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeReport:
        """The report that `to_dict` wrote.

        Raises:
            ValueError: A field is missing or unknown.
        """
        expected = {entry.name for entry in fields(cls)}
        if set(data) != expected:
            raise ValueError(
                f"The report has the fields {sorted(data)}; expected {sorted(expected)}, as `quantize` writes them to "
                f"{FILE}."
            )
        return cls(**data)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `quantize_report.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> QuantizeReport:
        """Read it from a folder that `quantize` wrote.

        Raises:
            ValueError: There is none, or it is not whole.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {FILE}; expected a folder that `quantize` or `convert_qat` wrote.")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def __str__(self) -> str:
        line = (
            f"{self.method} by {self.backend} {self.backend_version}: {self.weight_bytes / 1e6:.1f} MB of "
            f"{self.weight_bytes_before / 1e6:.1f}, {self.bits_per_quantized_weight:.2f} bits a quantised weight, "
            f"{self.bits_per_weight:.2f} a weight"
        )
        if self.kl is not None and self.top1_agreement is not None:
            line += f"; KL {self.kl:.4g}, top-1 agreement {self.top1_agreement:.1%} over {self.tokens} tokens"
        return line


def measure_storage(quantizer: Quantizer, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Count what the files of a folder hold, from their headers.

    Args:
        quantizer: That wrote it.
        folder: The model folder.
        model: The unquantised model, perhaps without weights: names and sizes of its layers.

    Returns:
        The fields of `QuantizeReport` about bits and layers.
    """
    stored = quantizer.stored(folder, model)
    quantized = bits = 0
    left = {}
    for name, parameter in model.named_parameters():  # a tied head is not among them
        if parameter.ndim < 2:
            continue
        layer = name.removesuffix(".weight")
        tensors = [
            t for t in stored if t.name == name or (t.name.startswith(f"{layer}.") and t.name != f"{layer}.bias")
        ]
        if any(tensor.format in quantizer.formats for tensor in tensors):
            quantized += parameter.numel()
            bits += 8 * sum(tensor.bytes for tensor in tensors)
        else:  # some families save other names than their modules have
            left[layer] = tensors[0].format if tensors else str(parameter.dtype).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "quantized_parameters": quantized,
        "bits_per_quantized_weight": bits / quantized,
        "bits_per_weight": 8 * sum(tensor.bytes for tensor in stored) / parameters,
        "left": left,
    }

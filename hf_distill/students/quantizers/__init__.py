"""One file a format: how the weights of a model folder are written with fewer bits, and how they are read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hf_distill.students.quantizers.base import Quantizer, StoredTensor
from hf_distill.students.quantizers.bitsandbytes_format import BitsAndBytesQuantizer
from hf_distill.students.quantizers.compressed_format import CompressedTensorsQuantizer
from hf_distill.students.quantizers.gguf_format import GGUFQuantizer
from hf_distill.students.quantizers.torchao_format import TorchAOQuantizer


QUANTIZERS: Mapping[str, Callable[[int | None], Quantizer]] = {
    "int8": lambda group_size: TorchAOQuantizer("int8", 8, group_size),
    "w8a16": lambda group_size: CompressedTensorsQuantizer("w8a16", 8, group_size),
    "w4a16": lambda group_size: CompressedTensorsQuantizer("w4a16", 4, group_size),
    "nf4": lambda group_size: BitsAndBytesQuantizer("nf4", group_size),
    "int8-bnb": lambda group_size: BitsAndBytesQuantizer("int8-bnb", group_size),
    "gguf-q8_0": lambda group_size: GGUFQuantizer("gguf-q8_0", group_size),
    "gguf-q4_0": lambda group_size: GGUFQuantizer("gguf-q4_0", group_size),
}
# What is asked for and cannot be made here, with the method to take.
ELSEWHERE = {
    "int4": (
        "torchao's Int4WeightOnly has no CPU kernel in any of its packing formats (0.18), so what it writes could not "
        "be read back here",
        "w4a16",
    ),
    "gguf-q4_k_m": ("the K-quants are made by llama.cpp's llama-quantize, not by the gguf package", "gguf-q4_0"),
}


def resolve_quantizer(method: str, group_size: int | None = None) -> Quantizer:
    """The quantiser of a method, with its package found.

    Raises:
        ValueError: There is no such method, or it takes no such group size.
        ImportError: Its package is not installed.
    """
    if method in ELSEWHERE:
        reason, instead = ELSEWHERE[method]
        raise ValueError(f"`method` is {method!r}, but {reason}; use `method={instead!r}`.")
    if method not in QUANTIZERS:
        raise ValueError(f"`method` is {method!r}; expected one of {', '.join(map(repr, QUANTIZERS))}.")
    quantizer = QUANTIZERS[method](group_size)
    quantizer.check_installed()
    return quantizer


__all__ = ["QUANTIZERS", "Quantizer", "StoredTensor", "resolve_quantizer"]

"""Students: a plain Hugging Face model in, a plain Hugging Face model out."""

from hf_distill.students.channels import select_channels
from hf_distill.students.qat import convert_qat, prepare_qat
from hf_distill.students.quantize import load_quantized, quantize
from hf_distill.students.quantize_report import QuantizeReport
from hf_distill.students.shrink import choose_layers, shrink


__all__ = [
    "QuantizeReport",
    "choose_layers",
    "convert_qat",
    "load_quantized",
    "prepare_qat",
    "quantize",
    "select_channels",
    "shrink",
]

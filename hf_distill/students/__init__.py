"""Students: a plain Hugging Face model in, a plain Hugging Face model out."""

from hf_distill.students.channels import select_channels
from hf_distill.students.shrink import choose_layers, shrink


__all__ = ["choose_layers", "select_channels", "shrink"]

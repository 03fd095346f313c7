"""Students: a plain Hugging Face model in, a plain Hugging Face model out."""

from hf_distill.students.channels import select_channels
from hf_distill.students.design import student_from_config
from hf_distill.students.importance import estimate_importance
from hf_distill.students.prune import prune
from hf_distill.students.qat import convert_qat, prepare_qat
from hf_distill.students.quantize import load_quantized, quantize
from hf_distill.students.quantize_report import QuantizeReport
from hf_distill.students.report import PruneReport
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.shrink import choose_layers, shrink
from hf_distill.students.spec import PruneSpec
from hf_distill.students.steps import prune_steps


__all__ = [
    "ImportanceScores",
    "PruneReport",
    "PruneSpec",
    "QuantizeReport",
    "choose_layers",
    "convert_qat",
    "estimate_importance",
    "load_quantized",
    "prepare_qat",
    "prune",
    "prune_steps",
    "quantize",
    "select_channels",
    "shrink",
    "student_from_config",
]

"""Students: a plain Hugging Face model in, a plain Hugging Face model out."""

from hf_distill.students.channels import select_channels
from hf_distill.students.design import student_from_config
from hf_distill.students.importance import estimate_importance
from hf_distill.students.prune import prune
from hf_distill.students.report import PruneReport
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.shrink import choose_layers, shrink
from hf_distill.students.spec import PruneSpec
from hf_distill.students.steps import prune_steps


__all__ = [
    "ImportanceScores",
    "PruneReport",
    "PruneSpec",
    "choose_layers",
    "estimate_importance",
    "prune",
    "prune_steps",
    "select_channels",
    "shrink",
    "student_from_config",
]

"""Knowledge distillation for `transformers.Trainer` and TRL."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_distill.cache import RemoteTeacher
    from hf_distill.cards import push_distilled
    from hf_distill.evaluation import RetentionReport, evaluate_retention
    from hf_distill.objectives import AttentionObjective, HiddenStateObjective, LogitObjective, RelationObjective
    from hf_distill.teachers import CachedTeacher, ModelTeacher, load_teacher
    from hf_distill.training.arguments import KDConfig
    from hf_distill.training.callback import DistillationCallback
    from hf_distill.training.gates import GateObjective
    from hf_distill.training.gradient_shares import GradientShareCallback
    from hf_distill.training.layer_drop import LayerDropCallback
    from hf_distill.training.retention import RetentionCallback
    from hf_distill.training.sft import KDSFTConfig, KDSFTTrainer
    from hf_distill.training.trainer import KDTrainer

__version__ = version("hf-distill")

__all__ = [
    "AttentionObjective",
    "CachedTeacher",
    "DistillationCallback",
    "GateObjective",
    "GradientShareCallback",
    "HiddenStateObjective",
    "KDConfig",
    "KDSFTConfig",
    "KDSFTTrainer",
    "KDTrainer",
    "LayerDropCallback",
    "LogitObjective",
    "ModelTeacher",
    "RelationObjective",
    "RemoteTeacher",
    "RetentionCallback",
    "RetentionReport",
    "evaluate_retention",
    "load_teacher",
    "push_distilled",
]

# Public name -> the module that defines it, imported when the name is first used.
_MODULES = {
    "AttentionObjective": "hf_distill.objectives",
    "CachedTeacher": "hf_distill.teachers",
    "DistillationCallback": "hf_distill.training.callback",
    "GateObjective": "hf_distill.training.gates",
    "GradientShareCallback": "hf_distill.training.gradient_shares",
    "HiddenStateObjective": "hf_distill.objectives",
    "KDConfig": "hf_distill.training.arguments",
    "KDSFTConfig": "hf_distill.training.sft",
    "KDSFTTrainer": "hf_distill.training.sft",
    "KDTrainer": "hf_distill.training.trainer",
    "LayerDropCallback": "hf_distill.training.layer_drop",
    "LogitObjective": "hf_distill.objectives",
    "ModelTeacher": "hf_distill.teachers",
    "RelationObjective": "hf_distill.objectives",
    "RemoteTeacher": "hf_distill.cache",
    "RetentionCallback": "hf_distill.training.retention",
    "RetentionReport": "hf_distill.evaluation",
    "evaluate_retention": "hf_distill.evaluation",
    "load_teacher": "hf_distill.teachers",
    "push_distilled": "hf_distill.cards",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

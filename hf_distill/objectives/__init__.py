"""The terms that a distillation loss is made of."""

from hf_distill.objectives.attention import AttentionObjective
from hf_distill.objectives.base import FeatureObjective, Objective
from hf_distill.objectives.hidden import HiddenStateObjective
from hf_distill.objectives.logits import LogitObjective, check_logit_objectives, logit_loss
from hf_distill.objectives.schedules import Schedule, cosine, linear, piecewise, warmup


__all__ = [
    "AttentionObjective",
    "FeatureObjective",
    "HiddenStateObjective",
    "LogitObjective",
    "Objective",
    "Schedule",
    "check_logit_objectives",
    "cosine",
    "linear",
    "logit_loss",
    "piecewise",
    "warmup",
]

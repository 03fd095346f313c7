"""The terms that a distillation loss is made of."""

from hf_distill.objectives.base import FeatureObjective, Objective
from hf_distill.objectives.hidden import HiddenStateObjective
from hf_distill.objectives.logits import LogitObjective, check_logit_objectives, logit_loss


__all__ = [
    "FeatureObjective",
    "HiddenStateObjective",
    "LogitObjective",
    "Objective",
    "check_logit_objectives",
    "logit_loss",
]

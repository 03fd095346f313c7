"""The terms that a distillation loss is made of."""

from hf_distill.objectives.attention import AttentionObjective
from hf_distill.objectives.base import FeatureObjective, Objective
from hf_distill.objectives.dynamics import FeatureDynamicsObjective, HiddenDeltaObjective
from hf_distill.objectives.hidden import HiddenStateObjective
from hf_distill.objectives.logits import LogitObjective, check_logit_objectives, logit_loss
from hf_distill.objectives.presets import distilbert_objectives, minilm_objectives, tinybert_objectives
from hf_distill.objectives.regressor_free import RegressorFreeObjective
from hf_distill.objectives.relational import RelationObjective
from hf_distill.objectives.schedules import Schedule, cosine, linear, piecewise, warmup


__all__ = [
    "AttentionObjective",
    "FeatureDynamicsObjective",
    "FeatureObjective",
    "HiddenDeltaObjective",
    "HiddenStateObjective",
    "LogitObjective",
    "Objective",
    "RegressorFreeObjective",
    "RelationObjective",
    "Schedule",
    "check_logit_objectives",
    "cosine",
    "distilbert_objectives",
    "linear",
    "logit_loss",
    "minilm_objectives",
    "piecewise",
    "tinybert_objectives",
    "warmup",
]

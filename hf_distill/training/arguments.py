"""The distillation fields that both configs share, and `KDConfig`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_distill.objectives import AttentionObjective, HiddenStateObjective, LogitObjective
from hf_distill.objectives.base import check_weight
from hf_distill.quantization import QUANTIZATIONS
from hf_distill.teachers.loading import DTYPES, check_choice


# Lower is better for these, although their names do not end in "loss", which is all that transformers looks at.
LOWER_IS_BETTER = ("kl", "nll")
WEIGHTS = ("ce_weight", "kd_weight", "hidden_weight", "attention_weight", "relation_weight")


@dataclass
class DistillationArguments:
    """Fields of a distillation run.

    `loss = ce_weight * CE + kd_weight * T^2 * divergence + hidden_weight * distance + attention_weight * distance`.

    Args:
        teacher_model_name_or_path: The teacher, loaded by the trainer; "base" is a LoRA student's own base model.
        teacher_quantization: "nf4" or "int8" to load the teacher with bitsandbytes.
        teacher_dtype: Precision of the teacher's weights, for example "bfloat16"; "auto" keeps the saved one.
        teacher_cache: Folder of soft labels that `build_cache` made, in place of a teacher that is loaded.
        ce_weight: Weight of the cross-entropy on the labels.
        kd_weight: Weight of the divergence from the teacher.
        temperature: Softens both distributions. 1 is right for language models, whose distributions are peaked.
        divergence: A name of `hf_distill.functional.DIVERGENCES`.
        divergence_kwargs: Arguments of the divergence, as a dict or JSON, for example `{"beta": 0.5}`.
        hidden_weight: Weight of the distance of hidden states; see `HiddenStateObjective`.
        hidden_loss: Which distance: cosine, relative_mse, mse, smooth_l1, cka or procrustes.
        layer_mapping: "uniform", "last_k", "every_nth", "inner", "learned", or pairs (student, teacher), as a list or
            JSON.
        attention_weight: Weight of the distance of attention at the last layer; see `AttentionObjective`.
        attention_loss: Which distance: relations, map_kl, map_mse or score_mse.
        relation_weight: Weight of the distance of relations between tokens; see `RelationObjective`.
        objective_lr_multiplier: Learning rate of projectors, as a multiple of the student's: they start from nothing.

    Raises:
        ValueError: A field is out of its range, or asks for something that would be ignored in silence.
    """

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher to load, or 'base': a LoRA student's own base model."}
    )
    teacher_quantization: str | None = field(default=None, metadata={"help": "'nf4' or 'int8' (bitsandbytes)."})
    teacher_dtype: str = field(default="auto", metadata={"help": "Precision of the teacher's weights."})
    teacher_cache: str | None = field(default=None, metadata={"help": "Folder of soft labels, in place of a teacher."})
    ce_weight: float = field(default=0.5, metadata={"help": "Weight of the cross-entropy on the labels."})
    kd_weight: float = field(default=0.5, metadata={"help": "Weight of the divergence from the teacher."})
    temperature: float = field(default=1.0, metadata={"help": "Softens both distributions in the divergence."})
    divergence: str = field(default="forward_kl", metadata={"help": "Divergence from the teacher."})
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the divergence, as JSON."}
    )
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the distance of hidden states."})
    hidden_loss: str = field(default="cosine", metadata={"help": "Distance of hidden states."})
    layer_mapping: list[Any] | str | None = field(
        default="uniform",
        metadata={"help": "'uniform', 'last_k', 'every_nth', 'inner', 'learned', or pairs of layers as JSON."},
    )
    attention_weight: float = field(default=0.0, metadata={"help": "Weight of the distance of attention."})
    attention_loss: str = field(default="relations", metadata={"help": "Distance of attention."})
    relation_weight: float = field(default=0.0, metadata={"help": "Weight of the relations between tokens."})
    objective_lr_multiplier: float = field(
        default=10.0, metadata={"help": "Learning rate of projectors, as a multiple of the student's."}
    )

    def __post_init__(self) -> None:
        kwargs = self.divergence_kwargs
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
        self.divergence_kwargs = kwargs = None if kwargs is None else _numbers("divergence_kwargs", kwargs)
        if sum(check_weight(name, getattr(self, name)) for name in WEIGHTS) == 0:
            names = ", ".join(f"`{name}`" for name in WEIGHTS)
            raise ValueError(f"{names} are all 0, so nothing is trained; set one, e.g. `kd_weight=0.5`.")
        LogitObjective(divergence=self.divergence, temperature=self.temperature, divergence_kwargs=kwargs)
        mapping = "uniform" if self.layer_mapping is None else self.layer_mapping
        self.layer_mapping = json.loads(mapping) if isinstance(mapping, str) and mapping.startswith("[") else mapping
        HiddenStateObjective(loss=self.hidden_loss, layer_mapping=self.layer_mapping)
        AttentionObjective(loss=self.attention_loss)
        check_weight("objective_lr_multiplier", self.objective_lr_multiplier)
        if self.teacher_quantization is not None:
            check_choice("teacher_quantization", self.teacher_quantization, QUANTIZATIONS)
        if isinstance(self.teacher_dtype, str):
            check_choice("teacher_dtype", self.teacher_dtype, DTYPES)
        self._check_trainer_fields()
        super().__post_init__()  # type: ignore[misc] # the other base is a TrainingArguments

    def _check_trainer_fields(self) -> None:
        """Check and complete fields of `TrainingArguments` that mean something else, or nothing, in distillation."""
        if getattr(self, "label_smoothing_factor", 0):
            raise ValueError(
                "`label_smoothing_factor` would be ignored: the cross-entropy is computed beside the divergence. "
                "Leave it at 0; the teacher's distribution already smooths the labels."
            )
        checkpointing: Any = getattr(self, "gradient_checkpointing_kwargs", None) or {}
        if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` cuts the graph that the distillation loss "
                "reads hidden states from; use `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        if getattr(self, "load_best_model_at_end", False) and getattr(self, "metric_for_best_model", None) is None:
            # eval_loss changes with the temperature and the weights; the KL at T=1 does not.
            self.metric_for_best_model = "kl"
        metric = getattr(self, "metric_for_best_model", None)
        if metric is not None and metric.endswith(LOWER_IS_BETTER):
            if getattr(self, "greater_is_better", None):
                raise ValueError(f"`greater_is_better=True` with `metric_for_best_model={metric!r}`: lower is better.")
            self.greater_is_better = False


def _numbers(field_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose text is read as numbers: YAML takes 5e-4, which has no point, for text.

    Raises:
        ValueError: Text is no number.
    """
    try:
        return {name: float(value) if isinstance(value, str) else value for name, value in settings.items()}
    except ValueError as error:
        raise ValueError(
            f"`{field_name}` is {settings}; expected a number for each name, for example `{{'beta': 0.5}}`."
        ) from error


@dataclass
class KDConfig(DistillationArguments, TrainingArguments):
    """`transformers.TrainingArguments` and the distillation fields.

    `metric_for_best_model="kl"` (the divergence from the teacher at T=1 on the evaluation set) is the metric to select
    checkpoints by, and the default of `load_best_model_at_end`: unlike `eval_loss`, it does not depend on
    temperature and weights.
    """

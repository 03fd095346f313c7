"""The objectives of a run: made from the config's flags or from a list, and evaluated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.objectives import (
    AttentionObjective,
    FeatureObjective,
    HiddenStateObjective,
    LogitObjective,
    Objective,
    RelationObjective,
    check_logit_objectives,
)
from hf_distill.objectives.base import term_names
from hf_distill.signals import Layers, ModelShape, StudentSignals, Targets, TeacherSignals, Tokens


# What is compared, for each choice of positions that an objective of the run has made.
Compared = Mapping[str, tuple[StudentSignals, TeacherSignals]]


def build_objectives(args: Any, objectives: Sequence[Objective] | None) -> list[Objective]:
    """Return the objectives that were given, checked, or make those that the config's flags ask for.

    Args:
        args: A config with the fields of `DistillationArguments`.
        objectives: What the user passed; None takes the flags.

    Raises:
        ValueError: Something is no objective, two cannot be computed together, or nothing would be trained.
    """
    objectives = _from_flags(args) if objectives is None else list(objectives)
    check_objectives(objectives)
    if args.ce_weight == 0 and not any(objective.is_ever_trained() for objective in objectives):
        raise ValueError("`ce_weight` and all weights of `objectives` are 0, so nothing is trained; set one > 0.")
    return objectives


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Check that a run can evaluate the objectives together.

    Raises:
        ValueError: Something is no objective, or two cannot be computed in one pass.
    """
    known = LogitObjective | FeatureObjective
    unknown = [type(objective).__name__ for objective in objectives if not isinstance(objective, known)]
    if unknown:
        raise ValueError(
            f"`objectives` holds {unknown}; expected objectives of hf_distill, e.g. `LogitObjective(0.5)`."
        )
    check_logit_objectives([objective for objective in objectives if isinstance(objective, LogitObjective)])


def _from_flags(args: Any) -> list[Objective]:
    objectives: list[Objective] = []
    if args.kd_weight > 0:
        settings = {"temperature": args.temperature, "divergence_kwargs": args.divergence_kwargs}
        objectives.append(LogitObjective(args.kd_weight, divergence=args.divergence, **settings))
    if args.hidden_weight > 0:
        objectives.append(
            HiddenStateObjective(args.hidden_weight, loss=args.hidden_loss, layer_mapping=args.layer_mapping)
        )
    if args.attention_weight > 0:
        objectives.append(AttentionObjective(args.attention_weight, loss=args.attention_loss))
    if args.relation_weight > 0:
        objectives.append(RelationObjective(args.relation_weight))
    return objectives


class FeatureTerms(nn.Module):
    """The objectives that look inside both models, evaluated in one call so that DDP sees all of their parameters.

    Args:
        objectives: Those of a run. Those of logits are left to `logit_loss`; they are here for the state dict, which
            holds what all objectives have learned.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        features = [objective for objective in objectives if isinstance(objective, FeatureObjective)]
        self.objectives = nn.ModuleList(features)
        self.others = nn.ModuleList(objective for objective in objectives if objective not in features)
        named = zip(term_names(objectives), objectives, strict=True)
        self._names = [name for name, objective in named if isinstance(objective, FeatureObjective)]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term at this step, by its name in logs."""
        return dict(zip(self._names, [objective.weight for objective in self._features()], strict=True))

    @property
    def student_layers(self) -> Layers:
        """What is needed of the student's layers."""
        features = self._features()
        return Layers(
            hidden=frozenset().union(*(objective.student_layers for objective in features)),
            attention=frozenset().union(*(objective.student_attention for objective in features)),
            final_norm=any(objective.reads_final_norm for objective in features),
        )

    @property
    def teacher_layers(self) -> Layers:
        """What is needed of the teacher's layers."""
        features = self._features()
        return Layers(
            hidden=frozenset().union(*(objective.teacher_layers for objective in features)),
            attention=frozenset().union(*(objective.teacher_attention for objective in features)),
            final_norm=any(objective.reads_final_norm for objective in features),
        )

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Let every objective choose its layers and build its parameters."""
        for objective in self._features():
            objective.bind(student, teacher)

    def tokens(self, targets: Targets, batch: Mapping[str, Tensor], *, per_row: bool) -> dict[str, Tokens]:
        """The positions of a batch that are compared, for each choice; see `Tokens.of`."""
        choices = dict.fromkeys(objective.positions for objective in self._features())
        return {choice: Tokens.of(targets, batch, per_row=per_row, positions=choice) for choice in choices}

    def forward(self, compared: Compared) -> Tensor:
        """The sums over labels of all terms, `[K]`, in the order of `weights`."""
        return torch.stack([objective(*compared[objective.positions]) for objective in self._features()])

    def _features(self) -> list[FeatureObjective]:
        return [objective for objective in self.objectives if isinstance(objective, FeatureObjective)]

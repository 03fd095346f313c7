"""Dynamics: not where hidden states are, but how they move from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.functional.dynamics import feature_dynamics
from hf_distill.objectives.base import FeatureObjective, check_weight
from hf_distill.objectives.hidden import HiddenStateObjective, States
from hf_distill.objectives.layer_map import Pairs, check_mapping, layer_pairs
from hf_distill.objectives.schedules import Schedule
from hf_distill.signals import HiddenStates, ModelShape, Projection, Signal, StudentSignals, TeacherSignals


class FeatureDynamicsObjective(FeatureObjective):
    """Match how predictions form from layer to layer (Feature Dynamics Distillation, ACL 2025 long.1125).

    Hidden states of some layers go through each model's own head; compared are the distributions (the trajectory)
    and the steps between layers (its derivative). Widths and depths may differ, the vocabulary must be the same. The
    logits exist for a chunk of tokens at a time; the time is that of some four projections to the vocabulary for each
    layer and model. There is no code by the authors.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        layer_mapping: "inner", as in the paper, or another mapping or pairs of at least two layers; see `layer_pairs`.
        num_pairs: How many pairs a named mapping makes.
        positions: See `FeatureObjective`.
        trajectory_weight: Factor of the KL of the distributions.
        derivative_weight: Factor of one minus the cosine of the steps.
        final_norm: Whether each model's own final norm comes before its head, as it does in the model's forward. The
            paper does not say; hidden states grow from layer to layer, and with them the logits without a norm.
        chunk_bytes: Budget for the logits of a chunk of tokens.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        ```python
        objectives = [LogitObjective(1.0), FeatureDynamicsObjective(1.0)]
        trainer = KDTrainer(model, teacher, objectives=objectives, ...)
        ```
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES})
    name = "dynamics"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        layer_mapping: str | Sequence[Sequence[int]] = "inner",
        num_pairs: int = 4,
        positions: str = "labelled",
        trajectory_weight: float = 1.0,
        derivative_weight: float = 1.0,
        final_norm: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__(weight, positions)
        check_mapping(layer_mapping, num_pairs)
        self.layer_mapping = layer_mapping
        self.num_pairs = num_pairs
        self.trajectory_weight = check_weight("trajectory_weight", trajectory_weight)
        self.derivative_weight = check_weight("derivative_weight", derivative_weight)
        self.reads_final_norm = final_norm
        self.chunk_bytes = chunk_bytes
        self.pairs: Pairs = ()
        self._depths = (0, 0)

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        settings = {
            "layers (student, teacher)": list(self.pairs),
            "trajectory": self.trajectory_weight,
            "derivative": self.derivative_weight,
            "source": "ACL 2025 long.1125",  # `citation` is for arXiv
        }
        return super().config() | settings | ({"final norm": "before the heads"} if self.reads_final_norm else {})

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose the layers; see `FeatureObjective.bind`."""
        if headless := [model.name for model in (student, teacher) if model.vocab_size is None]:
            raise ValueError(
                f"FeatureDynamicsObjective compares {student.name} and {teacher.name} through their heads over the "
                f"vocabulary, but {' and '.join(headless)} has none that takes hidden states of a layer; use "
                "HiddenStateObjective."
            )
        without = [model.name for model in (student, teacher) if not model.has_final_norm]
        if self.reads_final_norm and without:
            raise ValueError(
                f"`final_norm=True` needs the norm before the heads of {student.name} and {teacher.name}, but "
                f"{' and '.join(without)} has none that is known; leave it out."
            )
        self._depths = student.num_layers, teacher.num_layers
        self.pairs = _at_least_two(layer_pairs(self.layer_mapping, self.num_pairs, student, teacher), student, teacher)
        self.student_layers = frozenset(pair[0] for pair in self.pairs)
        self.teacher_layers = frozenset(pair[1] for pair in self.pairs)

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The sum over labels of both parts; see `FeatureObjective.forward`."""
        if student.tokens is None or not isinstance(teacher.logits, Projection):
            raise ValueError(
                "`student.tokens` is missing, or `teacher.logits` with a head; ask a teacher for what `needs` names."
            )
        ours, theirs = zip(*self.pairs, strict=True)
        with torch.no_grad():
            targets = self._entering_head(teacher, theirs, self._depths[1])
        trajectory, derivative = feature_dynamics(
            self._entering_head(student, ours, self._depths[0]),
            student.logits.head,
            targets,
            teacher.logits.head,
            chunk_bytes=self.chunk_bytes,
        )
        return student.tokens.sum(self.trajectory_weight * trajectory + self.derivative_weight * derivative)

    def _entering_head(
        self, signals: StudentSignals | TeacherSignals, layers: Sequence[int], depth: int
    ) -> list[Tensor]:
        """Hidden states of some layers, after the final norm if it is asked for; the last layer's have passed it."""
        if not self.reads_final_norm:
            return [signals.hidden[layer] for layer in layers]
        if signals.final_norm is None:
            raise ValueError("`final_norm` of the signals is missing; ask for `Layers(final_norm=True)`.")
        return [
            signals.hidden[layer] if layer == depth else signals.final_norm(signals.hidden[layer]) for layer in layers
        ]


class HiddenDeltaObjective(HiddenStateObjective):
    """Match the differences of hidden states between consecutive layers of a mapping.

    This is not Feature Dynamics Distillation, though it has been described as such: the paper compares what the heads
    make of the hidden states (`FeatureDynamicsObjective`). There is no evidence for it on language models.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        loss: As in `HiddenStateObjective`, whose projectors it has too.
        layer_mapping: "inner", which leaves out the last layer, whose states are on another scale after the final
            norm; or another mapping or pairs of at least two layers.
        num_pairs: How many pairs a named mapping makes; the differences are one less.
        positions: See `FeatureObjective`.
        shared_projector: See `HiddenStateObjective`.
        skip_first: See `HiddenStateObjective`.
    """

    citation: str = ""
    name = "hidden_delta"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        loss: str = "cosine",
        layer_mapping: str | Sequence[Sequence[int]] = "inner",
        num_pairs: int = 4,
        positions: str = "labelled",
        shared_projector: bool = False,
        skip_first: bool = False,
    ) -> None:
        check_mapping(layer_mapping, num_pairs)
        super().__init__(
            weight,
            loss=loss,
            layer_mapping=layer_mapping,
            num_pairs=num_pairs,
            positions=positions,
            shared_projector=shared_projector,
            skip_first=skip_first,
        )

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose the layers and build the projectors; see `FeatureObjective.bind`."""
        super().bind(student, teacher)
        _at_least_two(self.pairs, student, teacher)
        if len(self.projectors) == len(self.pairs):
            self.projectors = self.projectors[:-1]

    def _compared(self, student: HiddenStates, teacher: HiddenStates) -> list[States]:
        compared: list[States] = []
        for (our_start, their_start), (our_end, their_end) in pairwise(self.pairs):
            ours = student[our_end].float() - student[our_start].float()
            compared.append((ours, [teacher[their_end].float() - teacher[their_start].float()]))
        return compared


def _at_least_two(pairs: Pairs, student: ModelShape, teacher: ModelShape) -> Pairs:
    if len(pairs) < 2:
        raise ValueError(
            f"`layer_mapping` makes {len(pairs)} pair of the {student.num_layers} layers of {student.name} and the "
            f"{teacher.num_layers} of {teacher.name}; steps between layers need at least 2, for example "
            "`layer_mapping=[(1, 1), (-1, -1)]`."
        )
    return pairs

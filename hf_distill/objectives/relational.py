"""Relational distillation: how tokens lie to each other, instead of where each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.functional.registry import unknown_name
from hf_distill.functional.relations import RELATIONS
from hf_distill.objectives.base import FeatureObjective
from hf_distill.objectives.gathering import draw_sample
from hf_distill.objectives.layer_map import Pairs, check_mapping, layer_pairs
from hf_distill.objectives.schedules import Schedule
from hf_distill.signals import ModelShape, Signal, StudentSignals, TeacherSignals


# By loss: tokens of a sample, and the most that memory allows where it grows with their cube.
SIZES = {"rkd": (64, 256), "rkd_angle": (64, 256), "rkd_distance": (128, None), "similarity": (128, None)}


class RelationObjective(FeatureObjective):
    """Match the relations between tokens (RKD, arXiv:1904.05068; similarity preserving, arXiv:1907.09682).

    The widths may differ, and there is nothing to train. The tokens are evenly spaced over the positions that the
    labels train, of all rows and, gathered, of all ranks: a micro-batch of one row has as many relations as a large
    one. Published for images and sentence embeddings; for language models experimental.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        loss: `rkd` (distances and twice the angles), `rkd_distance`, `rkd_angle` or `similarity`, whose values are
            small and weights large; see `hf_distill.functional.relations`.
        layer_mapping: "uniform", "last_k", "every_nth", or pairs (student layer, teacher layer); see `layer_pairs`.
        num_pairs: How many pairs a named mapping makes; the last layers alone by default.
        positions: "real" takes the tokens from all real ones; see `FeatureObjective`.
        num_tokens: How many tokens are compared with each other, of all ranks together; 64 where there are angles
            (at most 256: their memory grows with the cube), else 128.
        gather: Compare tokens of all ranks with each other. False under tensor parallelism, where ranks share rows,
            and where ranks see different numbers of micro-batches.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        ```python
        trainer = KDTrainer(model, teacher, objectives=[LogitObjective(0.5), RelationObjective(0.5)], ...)
        ```
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES})
    name = "relation"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        loss: str = "rkd",
        layer_mapping: str | Sequence[Sequence[int]] = "uniform",
        num_pairs: int = 1,
        positions: str = "labelled",
        num_tokens: int | None = None,
        gather: bool = True,
    ) -> None:
        super().__init__(weight, positions)
        if loss not in RELATIONS:
            raise unknown_name("relation loss", loss, RELATIONS)
        check_mapping(layer_mapping, num_pairs)
        default, most = SIZES[loss]
        self.num_tokens = default if num_tokens is None else num_tokens
        if self.num_tokens < 3 or (most is not None and self.num_tokens > most):
            raise ValueError(
                f"`num_tokens` is {num_tokens}; expected at least 3"
                + (f" and at most {most} for loss={loss!r}." if most else ".")
                + f" Leave it out to take {default}."
            )
        self.loss = loss
        self.layer_mapping = layer_mapping
        self.num_pairs = num_pairs
        self.gather = gather
        # Two papers, one class.
        self.citation = "1907.09682" if loss == "similarity" else "1904.05068"
        self.pairs: Pairs = ()

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        settings = {"loss": self.loss, "layers (student, teacher)": list(self.pairs), "tokens": self.num_tokens}
        return super().config() | settings

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose the pairs; see `FeatureObjective.bind`."""
        self.pairs = layer_pairs(self.layer_mapping, self.num_pairs, student, teacher)
        self.student_layers = frozenset(pair[0] for pair in self.pairs)
        self.teacher_layers = frozenset(pair[1] for pair in self.pairs)

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The mean distance over pairs, once for every label; see `FeatureObjective.forward`."""
        labels, first = student.labels.numel(), student.hidden[self.pairs[0][0]]
        sample = draw_sample(len(first), labels, self.num_tokens, first.device, gather=self.gather)
        sides = [(student.hidden[ours], teacher.hidden[theirs]) for ours, theirs in self.pairs]
        features = [states.index_select(0, sample.index).float() for pair in sides for states in pair]
        whole = sample.gather(torch.cat(features, dim=1)).split([part.shape[1] for part in features], dim=1)
        with torch.autocast(first.device.type, enabled=False):
            values = [RELATIONS[self.loss](*pair) for pair in zip(whole[::2], whole[1::2], strict=True)]
        return sample.for_each_label(torch.stack(values).mean(0), labels)

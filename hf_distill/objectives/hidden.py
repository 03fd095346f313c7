"""Hidden-state distillation: pairs of layers, with projectors where the widths differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_distill.functional.features import PER_SET, PER_TOKEN
from hf_distill.functional.registry import unknown_name
from hf_distill.objectives.base import FeatureObjective
from hf_distill.objectives.layer_map import Pairs, check_mapping, layer_pairs
from hf_distill.objectives.projectors import build_projectors
from hf_distill.objectives.schedules import Schedule
from hf_distill.signals import ModelShape, Signal, StudentSignals, TeacherSignals


LOSSES = PER_TOKEN | PER_SET


class HiddenStateObjective(FeatureObjective):
    """Match the teacher's hidden states at pairs of layers (FitNets, arXiv:1412.6550; TinyBERT, arXiv:1909.10351).

    Compared are the positions that the labels train: for a language model the positions that predict a labelled
    token, for a classifier every real token. The distances are averaged over the pairs.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        loss: `cosine`, `relative_mse`, `mse` or `smooth_l1`, which need a projector where the widths differ; or `cka`
            or `procrustes`, which compare the geometry of all tokens of a micro-batch and need none (but then a
            micro-batch is not the sum of its rows: give it as many tokens as the memory allows).
        layer_mapping: "uniform", "last_k", "every_nth", or pairs (student layer, teacher layer); see `layer_pairs`.
        num_pairs: How many pairs a named mapping makes. Which layers are chosen matters little (arXiv:2502.04499).
        shared_projector: One projector for all pairs, as TinyBERT has it, instead of one each.
        skip_first: Leave out the first token of every sequence, on which decoders put activations hundreds of times
            larger than on the others.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        ```python
        trainer = KDTrainer(model, teacher, objectives=[LogitObjective(0.5), HiddenStateObjective(0.1)], ...)
        ```
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES})
    citation: ClassVar[str] = "1412.6550"
    name = "hidden"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        loss: str = "cosine",
        layer_mapping: str | Sequence[Sequence[int]] = "uniform",
        num_pairs: int = 4,
        shared_projector: bool = False,
        skip_first: bool = False,
    ) -> None:
        super().__init__(weight)
        if loss not in LOSSES:
            raise unknown_name("hidden-state loss", loss, LOSSES)
        check_mapping(layer_mapping, num_pairs)
        self.loss = loss
        self.layer_mapping = layer_mapping
        self.num_pairs = num_pairs
        self.shared_projector = shared_projector
        self.skip_first = skip_first
        self.pairs: Pairs = ()
        self.projectors = nn.ModuleList()

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        settings: dict[str, object] = {"loss": self.loss, "layers (student, teacher)": list(self.pairs)}
        if len(self.projectors):
            settings["projectors"] = len(self.projectors)
        if self.skip_first:
            settings["first token"] = "skipped"
        return super().config() | settings

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose the pairs and build the projectors; see `FeatureObjective.bind`."""
        self.pairs = layer_pairs(self.layer_mapping, self.num_pairs, student, teacher)
        self.student_layers = frozenset(pair[0] for pair in self.pairs)
        self.teacher_layers = frozenset(pair[1] for pair in self.pairs)
        if self.loss in PER_TOKEN:
            self.projectors = build_projectors(
                student.hidden_size, teacher.hidden_size, len(self.pairs), shared=self.shared_projector
            )

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The sum over labels of the mean distance over pairs; see `FeatureObjective.forward`."""
        values = [self._pair(i, student, teacher) for i in range(len(self.pairs))]
        return torch.stack(values).mean(0)

    def _pair(self, i: int, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        ours, theirs = student.hidden[self.pairs[i][0]], teacher.hidden[self.pairs[i][1]]
        if len(self.projectors):
            projector = self.projectors[i if len(self.projectors) > 1 else 0]
            ours = projector(ours.to(projector.weight.dtype))
        tokens, kept = student.tokens, None
        if tokens is None:
            raise ValueError("`student.tokens` is missing: they say which positions `student.hidden` holds.")
        if self.skip_first:
            kept = ~tokens.is_first
        with torch.autocast(ours.device.type, enabled=False):
            if self.loss in PER_TOKEN:
                distance = PER_TOKEN[self.loss](ours, theirs)
                return tokens.sum(distance if kept is None else distance * kept)
            if kept is not None:
                ours, theirs = ours[kept], theirs[kept]
            if len(ours) < 2:  # one token has no geometry
                return ours[:0].float().sum()
            return PER_SET[self.loss](ours, theirs) * student.labels.numel()

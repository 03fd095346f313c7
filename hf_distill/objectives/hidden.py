"""Hidden-state distillation: pairs of layers, with projectors where the widths differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_distill.functional.features import PER_SET, PER_TOKEN
from hf_distill.functional.registry import unknown_name
from hf_distill.objectives.base import FeatureObjective, check_weight
from hf_distill.objectives.layer_map import LAYER_MAPPINGS, Pairs, check_mapping, layer_pairs
from hf_distill.objectives.learned_map import LearnedMap
from hf_distill.objectives.projectors import build_projectors
from hf_distill.objectives.schedules import Schedule, Scheduled
from hf_distill.signals import HiddenStates, ModelShape, Signal, StudentSignals, TeacherSignals, Tokens


LOSSES = PER_TOKEN | PER_SET
# States of the student, and what of the teacher they are compared with: one layer, or the layers of a learned map.
States = tuple[Tensor, list[Tensor]]


class HiddenStateObjective(FeatureObjective):
    """Match the teacher's hidden states at pairs of layers (FitNets, arXiv:1412.6550; TinyBERT, arXiv:1909.10351).

    Compared are the positions that the labels train: for a language model the positions that predict a labelled
    token, for a classifier every real token. The distances are averaged over the pairs.

    With a learned map (SemCKD, arXiv:2012.03236; experimental) a layer of the student has the weighted mean of its
    distances from all layers of the teacher, whose hidden states are then all kept for the step. Left alone, the
    weights go to whichever layer is nearest; their entropy is rewarded, so that with `map_entropy` e they tend to
    softmax(-distance / e). The value of a student that equals its teacher is not 0 then.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        loss: `cosine`, `relative_mse`, `mse` or `smooth_l1`, which need a projector where the widths differ; or `cka`
            or `procrustes`, which compare the geometry of all tokens of a micro-batch and need none (but then a
            micro-batch is not the sum of its rows: give it as many tokens as the memory allows).
        layer_mapping: "uniform", "last_k", "every_nth", "inner", or pairs (student layer, teacher layer), see
            `layer_pairs`; or "learned", the layers of "uniform" with weights that begin around its partners.
        num_pairs: How many pairs a named mapping makes. Which layers are chosen matters little (arXiv:2502.04499).
        positions: "real" compares all real tokens, prompts too; see `FeatureObjective`.
        shared_projector: One projector for all pairs, as TinyBERT has it, instead of one each.
        skip_first: Leave out the first token of every sequence, on which decoders put activations hundreds of times
            larger than on the others.
        channels: Instead of a projector: which of the teacher's channels, as many as the student is wide, are
            compared; for example `hf_distill.students.select_channels(teacher, batches, size)`. A student whose
            hidden width was pruned from this teacher's is compared with the channels that it kept.
        map_temperature: Of the learned map's softmax, > 0, or a schedule of it. The lower it is, the faster the map
            moves.
        map_entropy: How much the entropy of the learned map counts against distances, >= 0.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        ```python
        trainer = KDTrainer(model, teacher, objectives=[LogitObjective(0.5), HiddenStateObjective(0.1)], ...)
        ```
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.HIDDEN_STATES})
    citation: str = "1412.6550"
    name = "hidden"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        loss: str = "cosine",
        layer_mapping: str | Sequence[Sequence[int]] = "uniform",
        num_pairs: int = 4,
        positions: str = "labelled",
        shared_projector: bool = False,
        skip_first: bool = False,
        channels: Sequence[int] | Tensor | None = None,
        map_temperature: float | Schedule = 0.1,
        map_entropy: float = 0.1,
    ) -> None:
        super().__init__(weight, positions)
        if loss not in LOSSES:
            raise unknown_name("hidden-state loss", loss, LOSSES)
        check_mapping(layer_mapping, num_pairs, (*LAYER_MAPPINGS, "learned"))
        self.loss = loss
        self.layer_mapping = layer_mapping
        self.num_pairs = num_pairs
        self.shared_projector = shared_projector
        self.skip_first = skip_first
        self.channels = None if channels is None else torch.as_tensor(channels, dtype=torch.int64).cpu()
        if layer_mapping == "learned":
            self.scheduled["map_temperature"] = Scheduled(map_temperature)
            if not min(self.scheduled["map_temperature"].values()) > 0:
                raise ValueError(f"`map_temperature` is {map_temperature}; expected a number > 0, for example 0.1.")
        self.map_entropy = check_weight("map_entropy", map_entropy)
        self.pairs: Pairs = ()
        self.projectors = nn.ModuleList()
        self.learned: LearnedMap | None = None

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        settings: dict[str, object] = {"loss": self.loss}
        if self.learned is None:
            settings["layers (student, teacher)"] = list(self.pairs)
        else:
            shares = self.learned.shown(self._temperature)
            settings["layers (student: shares of the teacher's)"] = {
                pair[0]: share for pair, share in zip(self.pairs, shares, strict=True)
            }
        if len(self.projectors):
            settings["projectors"] = len(self.projectors)
        if self.channels is not None:
            settings["channels of the teacher"] = len(self.channels)
        if self.skip_first:
            settings["first token"] = "skipped"
        return super().config() | settings

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose the pairs and build the projectors; see `FeatureObjective.bind`."""
        is_learned = self.layer_mapping == "learned"
        self.pairs = layer_pairs("uniform" if is_learned else self.layer_mapping, self.num_pairs, student, teacher)
        self.student_layers = frozenset(pair[0] for pair in self.pairs)
        self.teacher_layers = frozenset(pair[1] for pair in self.pairs)
        if is_learned:
            self.teacher_layers = frozenset(range(1, teacher.num_layers + 1))
            self.learned = LearnedMap(self.pairs, teacher.num_layers, self._temperature)
        if self.channels is None and self.loss in PER_TOKEN:
            self.channels = _kept_channels(student, teacher)
        if self.channels is not None:
            _check_channels(self.channels, student, teacher)
        elif self.loss in PER_TOKEN:
            self.projectors = build_projectors(
                student.hidden_size, teacher.hidden_size, len(self.pairs), shared=self.shared_projector
            )

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The sum over labels of the mean distance over pairs; see `FeatureObjective.forward`."""
        tokens, labels = student.tokens, student.labels.numel()
        if tokens is None:
            raise ValueError("`student.tokens` is missing: they say which positions `student.hidden` holds.")
        values = []
        for i, (ours, theirs) in enumerate(self._compared(student.hidden, teacher.hidden)):
            if len(self.projectors):
                projector = self.projectors[i if len(self.projectors) > 1 else 0]
                ours = projector(ours.to(projector.weight.dtype))
            values.append(torch.stack([self._distance(ours, states, tokens, labels) for states in theirs]))
        if self.learned is None:
            return torch.cat(values).mean()
        shares, narrowness = self.learned.shares(self._temperature), self.learned.narrowness(self._temperature)
        distances = (shares * torch.stack(values)).sum(-1)
        return (distances + self.map_entropy * labels * narrowness).mean()

    @property
    def _temperature(self) -> float:
        return self.scheduled["map_temperature"].value

    def _compared(self, student: HiddenStates, teacher: HiddenStates) -> list[States]:
        """What is compared, in the order of the projectors."""
        if self.learned is None:
            return [(student[ours], [teacher[theirs]]) for ours, theirs in self.pairs]
        layers = sorted(self.teacher_layers)
        return [(student[ours], [teacher[layer] for layer in layers]) for ours, _ in self.pairs]

    def _distance(self, ours: Tensor, theirs: Tensor, tokens: Tokens, labels: int) -> Tensor:
        """The sum over labels of the distance of two layers."""
        kept = ~tokens.is_first if self.skip_first else None
        if self.channels is not None:
            theirs = theirs.index_select(1, self.channels.to(theirs.device))
        with torch.autocast(ours.device.type, enabled=False):
            if self.loss in PER_TOKEN:
                distance = PER_TOKEN[self.loss](ours, theirs)
                return tokens.sum(distance if kept is None else distance * kept)
            if kept is not None:
                ours, theirs = ours[kept], theirs[kept]
            if len(ours) < 2:  # one token has no geometry
                return ours[:0].float().sum()
            return PER_SET[self.loss](ours, theirs) * labels


def _kept_channels(student: ModelShape, teacher: ModelShape) -> Tensor | None:
    """The teacher's channels that a pruned student is made of, if it was cut from a model of the teacher's width."""
    if student.kept_channels is None or student.cut_from_width != teacher.hidden_size:
        return None
    return torch.tensor(student.kept_channels, dtype=torch.int64)


def _check_channels(channels: Tensor, student: ModelShape, teacher: ModelShape) -> None:
    inside = channels.dim() == 1 and bool(((channels >= 0) & (channels < teacher.hidden_size)).all())
    if not inside or len(channels) != student.hidden_size or len(channels.unique()) != len(channels):
        raise ValueError(
            f"`channels` has shape {list(channels.shape)}; expected {student.hidden_size} different channels, as many "
            f"as {student.name} is wide, of the {teacher.hidden_size} of {teacher.name} (from 0). Take "
            f"`select_channels(teacher, batches, {student.hidden_size})` from hf_distill.students."
        )

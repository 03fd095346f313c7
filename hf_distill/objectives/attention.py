"""Attention distillation: maps, scores, or the relations among queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.functional.attention import (
    SCORE_LOSSES,
    Scores,
    relation_distance,
    relation_heads,
    score_distance,
)
from hf_distill.functional.registry import unknown_name
from hf_distill.objectives.base import FeatureObjective
from hf_distill.objectives.layer_map import Pairs, check_mapping, layer_pairs
from hf_distill.objectives.schedules import Schedule
from hf_distill.signals import AttentionStates, ModelShape, Signal, StudentSignals, TeacherSignals


RELATIONS = ("query", "key", "value")
LOSSES = ("relations", *SCORE_LOSSES)
CITATIONS = {"relations": "2012.15828", "map_kl": "2002.10957", "score_mse": "1909.10351"}


class AttentionObjective(FeatureObjective):
    """Match the teacher's attention at pairs of layers, the last ones by default (MiniLMv2, arXiv:2012.15828).

    Compared are the rows of the positions that the labels train: for a language model those that predict a labelled
    token, for a classifier every real token. Keys count that both models see there. The models keep their attention
    implementation (SDPA, FlashAttention), and maps are never built for a whole layer. Published for encoders; for
    decoders it is experimental.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        loss: `relations` (query-query, key-key and value-value of MiniLMv2, for any numbers and widths of heads),
            `map_kl` (arXiv:2002.10957) or `map_mse` of attention maps, averaged over heads where their numbers
            differ, or `score_mse` (TinyBERT, arXiv:1909.10351), which needs equal numbers of heads.
        layer_mapping: As in `HiddenStateObjective`; layers count from 1. For teachers of 24 layers and more MiniLMv2
            takes one of the upper middle instead of the last, for example `[(-1, 19)]`.
        num_pairs: How many pairs a named mapping makes.
        positions: "real" compares the rows of all real tokens, prompts too; see `FeatureObjective`.
        relation_heads: Into how many parts the relations cut all heads together; it divides the widths of queries
            and of keys of both models. None chooses a number for each relation.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        ```python
        trainer = KDTrainer(model, teacher, objectives=[LogitObjective(0.5), AttentionObjective(0.1)], ...)
        ```
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ATTENTION})
    name = "attention"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        loss: str = "relations",
        layer_mapping: str | Sequence[Sequence[int]] = "uniform",
        num_pairs: int = 1,
        positions: str = "labelled",
        relation_heads: int | None = None,
    ) -> None:
        super().__init__(weight, positions)
        if loss not in LOSSES:
            raise unknown_name("attention loss", loss, LOSSES)
        check_mapping(layer_mapping, num_pairs)
        if relation_heads is not None and (relation_heads < 1 or loss != "relations"):
            raise ValueError(
                f"`relation_heads` is {relation_heads} with `loss={loss!r}`; expected a number >= 1 with "
                "`loss='relations'`, or None."
            )
        self.loss = loss
        self.citation = CITATIONS.get(loss, "")
        self.layer_mapping = layer_mapping
        self.num_pairs = num_pairs
        self.relation_heads = relation_heads
        self.pairs: Pairs = ()
        self._heads_shown: object = relation_heads

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        settings: dict[str, object] = {"loss": self.loss, "layers (student, teacher)": list(self.pairs)}
        if self._heads_shown is not None:
            settings["relation heads"] = self._heads_shown
        return super().config() | settings

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose the pairs and check the heads; see `FeatureObjective.bind`."""
        self.pairs = layer_pairs(self.layer_mapping, self.num_pairs, student, teacher)
        if any(0 in pair for pair in self.pairs):
            raise ValueError(
                f"`layer_mapping` pairs layers {list(self.pairs)} of the {student.name} and the {teacher.name}; 0 is "
                "the embedding, which has no attention: name layers from 1."
            )
        self.student_attention = frozenset(pair[0] for pair in self.pairs)
        self.teacher_attention = frozenset(pair[1] for pair in self.pairs)
        self._check_layers(student, teacher)
        if self.loss == "relations":
            self._bind_relations(student, teacher)
            return
        if self.loss == "score_mse" and student.num_heads != teacher.num_heads:
            raise ValueError(
                f"`loss='score_mse'` needs equal numbers of heads, but the {student.name} has {student.num_heads} and "
                f"the {teacher.name} {teacher.num_heads}; use 'relations', or 'map_kl', which averages heads."
            )

    def _check_layers(self, student: ModelShape, teacher: ModelShape) -> None:
        """Check that both models let their attention be heard."""
        for model, layers in ((student, self.student_attention), (teacher, self.teacher_attention)):
            maps = {} if self.loss == "relations" else model.no_attention_maps
            refused = {**maps, **model.no_attention}
            if without := sorted(layers & refused.keys()):
                raise ValueError(
                    f"`loss={self.loss!r}` compares the attention of the {student.name} and the {teacher.name}, but "
                    f"that of layer {without[0]} cannot be had of the {model.name}: {refused[without[0]]}"
                )

    def _bind_relations(self, student: ModelShape, teacher: ModelShape) -> None:
        """Check that the relation heads divide all widths, where these are known."""
        widths = [
            (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim) for model in (student, teacher)
        ]
        if not all((*widths[0], *widths[1])):
            return
        common = math.gcd(*widths[0], *widths[1])
        if self.relation_heads is None:
            chosen = [relation_heads(ours, theirs) for ours, theirs in zip(*widths, strict=True)]
            self._heads_shown = f"{chosen[0]} (queries), {chosen[1]} (keys, values)"
        elif common % self.relation_heads:
            fitting = [number for number in range(1, common + 1) if common % number == 0]
            (ours, our_keys), (theirs, their_keys) = widths
            raise ValueError(
                f"`relation_heads` is {self.relation_heads}, which must divide the widths of queries and keys: {ours} "
                f"and {our_keys} of the {student.name}, {theirs} and {their_keys} of the {teacher.name}. These do: "
                f"{fitting}; None chooses for queries and keys apart."
            )

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The sum over labels of the mean distance over pairs; see `FeatureObjective.forward`."""
        tokens = student.tokens
        if tokens is None:
            raise ValueError("`student.tokens` is missing: they say which rows of the maps are compared.")
        with torch.autocast(tokens.index.device.type, enabled=False):
            values = [
                self._pair(student.attention[ours], teacher.attention[theirs], tokens.index)
                for ours, theirs in self.pairs
            ]
            return tokens.sum(torch.stack(values).mean(0))

    def _pair(self, student: AttentionStates, teacher: AttentionStates, index: Tensor) -> Tensor:
        if self.loss == "relations":
            seen = student.seen, teacher.seen
            distances = [
                relation_distance(getattr(student, part), getattr(teacher, part), seen, index, self.relation_heads)
                for part in RELATIONS
            ]
            return torch.stack(distances).sum(0)
        return score_distance(_scores(student, "student"), _scores(teacher, "teacher"), index, self.loss)


def _scores(states: AttentionStates, role: str) -> Scores:
    if not states.has_maps:
        raise ValueError(
            f"The attention of the {role} is more than the softmax of its queries and keys (sinks, relative "
            "positions), so its maps cannot be rebuilt; use `loss='relations'`."
        )
    return Scores(states.query, states.key, states.seen, states.scaling, states.softcap)

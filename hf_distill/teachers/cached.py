"""A teacher that was run before: its soft labels are read from disk."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.cache.identity import tokenizer_identity, vocabulary_digest
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.rows import Row
from hf_distill.functional.head import LMHead
from hf_distill.functional.recipe import resolve_recipe
from hf_distill.functional.sparse import SparseLogits, check_targets
from hf_distill.objectives import FeatureObjective, LogitObjective, Objective
from hf_distill.signals import (
    Layers,
    ModelShape,
    Projection,
    Signal,
    Targets,
    TeacherSignals,
    real_tokens,
    sequences,
)
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.model import public_name


class CachedTeacher(Teacher):
    """A cache of soft labels, read from disk row by row: no weights of the teacher are in memory.

    The sequences of a batch are found by their token ids, whatever their order, batches, padding and packing.
    Positions without a label are not read, and hold anything.

    Args:
        path: The folder that `build_cache` made.

    Raises:
        ValueError: It is no whole cache.

    Example:
        ```python
        build_cache(load_teacher(name), trainer.train_dataset, "soft-labels", encoding="topk", k=50)
        trainer = KDSFTTrainer(model=student, teacher_model=CachedTeacher("soft-labels"), ...)
        ```
    """

    task = "causal_lm"

    def __init__(self, path: str | Path) -> None:
        self._reader = CacheReader(path)
        self._head: LMHead | None = None
        self._manifest = self._reader.manifest
        self.provides = self._reader.encoding.provides
        self.name = self._manifest.teacher.name
        self.vocab_size = self._manifest.teacher.vocab_size

    def config_for_card(self) -> dict[str, Any]:
        """The teacher that was run, and what of it was kept."""
        teacher, encoding = self._manifest.teacher, self._manifest.encoding
        temperatures = ", ".join(f"{temperature:g}" for temperature in encoding["temperatures"])
        size = f"{self._manifest.bytes / self._manifest.tokens:.1f} bytes a token"
        facts = {
            "name": public_name(teacher.name),
            "architecture": teacher.architecture,
            "quantization": teacher.quantization,
            "soft_labels": f"read from a cache: {encoding['name']}, T = {temperatures}, {size}",
        }
        return {key: value for key, value in facts.items() if value is not None}

    def remedy(self, missing: Collection[Signal]) -> str:
        """See `Teacher.remedy`."""
        if set(missing) == {Signal.HIDDEN_STATES}:
            return "build the cache with `encoding='hidden'`, which keeps the last layer's, or use a ModelTeacher"
        return super().remedy(missing)

    def check_objectives(self, objectives: Iterable[Objective]) -> None:
        """Also checks that what was kept is enough for every divergence, at every temperature.

        Raises:
            ValueError: It is not; see `check_targets`.
        """
        objectives = list(objectives)
        super().check_objectives(objectives)
        kept = self._reader.targets([])
        for objective in objectives:
            if isinstance(objective, FeatureObjective) and objective.positions != "labelled":
                raise ValueError(
                    f"`objectives`: {type(objective).__name__} compares all {objective.positions} tokens, and a cache "
                    "holds the labelled ones; set `positions='labelled'`, or use a ModelTeacher."
                )
            if isinstance(objective, LogitObjective) and isinstance(kept, SparseLogits):
                self._check_divergence(objective, kept)

    def _check_divergence(self, objective: LogitObjective, kept: SparseLogits) -> None:
        temperature, *others = sorted(set(objective.scheduled["temperature"].values()))
        if others:
            raise ValueError(
                f"`temperature` goes from {temperature:g} to {others[-1]:g} in small steps, and the cache "
                f"{self._reader.path} can be read at {list(kept.temperatures)}; keep it at one of them, or build the "
                "cache with `encoding='hidden'`, which can be read at any."
            )
        term = {objective.divergence: (1.0, objective.divergence_kwargs)}
        check_targets(kept, resolve_recipe(term, temperature, ()))

    def check_layers(self, layers: Layers) -> None:
        """Checks that only the last layer is asked for.

        Raises:
            ValueError: Another one is.
        """
        depth = self._manifest.teacher.num_layers
        if others := sorted(layers.hidden - {depth}):
            raise ValueError(
                f"`objectives` compare the teacher's layers {others}, and the cache {self._reader.path} holds the "
                f"hidden states of the last one, {depth}; set `layer_mapping` to the pair of last layers, or use a "
                "ModelTeacher."
            )

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        """Compares digests: the cache does not hold the tokenizer. A pad token may have been added to the student's.

        Raises:
            ValueError: The vocabularies differ.
        """
        known = self._manifest.tokenizer
        if tokenizer is None or known.vocabulary is None:
            return
        vocabulary = tokenizer.get_vocab()
        unpadded = {token: number for token, number in vocabulary.items() if token != tokenizer.pad_token}
        if known.vocabulary not in (vocabulary_digest(vocabulary), vocabulary_digest(unpadded)):
            raise ValueError(
                f"The cache {self._reader.path} was built with another tokenizer than the student's: the vocabularies "
                "differ, so its ids are other tokens. Build it again with `build_cache(..., tokenizer=...)`, or use a "
                "student of the teacher's family."
            )
        if known.chat_template not in (None, tokenizer_identity(tokenizer).chat_template):
            warnings.warn(
                f"The student's chat template is not the one that the cache {self._reader.path} was built with. Rows "
                "that it makes otherwise are not in the cache, and will be refused.",
                stacklevel=2,
            )

    def shape(self) -> ModelShape:
        """Depth and width of the teacher that was run; see `Teacher.shape`."""
        teacher = self._manifest.teacher
        if Signal.HIDDEN_STATES not in self.provides or teacher.num_layers is None or teacher.hidden_size is None:
            return super().shape()
        name = f"teacher ({teacher.architecture}, cached)"
        return ModelShape(name, teacher.num_layers, teacher.hidden_size, vocab_size=teacher.vocab_size, is_causal=True)

    def _signals(self, batch: Mapping[str, Any], needs: frozenset[Signal], layers: Layers) -> TeacherSignals:
        rows, index = _rows_of(batch)
        kept = self._reader.targets(rows)
        device = batch["input_ids"].device
        # Every position takes the number of its token, those without a label that of any.
        place = torch.zeros(batch["input_ids"].numel(), dtype=torch.int64)
        place[index] = torch.arange(len(index))
        everywhere = kept.at(place if len(index) else place[:0])
        if isinstance(everywhere, SparseLogits):
            return TeacherSignals(everywhere.to(torch.empty(0, device=device)))
        hidden = everywhere.hidden.to(device)
        logits = Projection(hidden, self._head_on(device, everywhere)) if Signal.LOGITS in needs else None
        return TeacherSignals(logits, dict.fromkeys(layers.hidden, hidden))

    def _head_on(self, device: torch.device, output: Projection) -> Any:
        """The teacher's head, moved once."""
        if not isinstance(output.head, LMHead):
            return output.head
        if self._head is None or self._head.weight.device != device:
            bias = None if output.head.bias is None else output.head.bias.to(device)
            self._head = replace(output.head, weight=output.head.weight.to(device), bias=bias)
        return self._head


def _rows_of(batch: Mapping[str, Any]) -> tuple[list[Row], Tensor]:
    """The sequences of a batch that have labels, and the flattened positions whose next token is a label."""
    ids = batch["input_ids"].cpu()
    facts = {key: batch[key].cpu() for key in ("attention_mask", "position_ids") if batch.get(key) is not None}
    facts["input_ids"] = ids
    real = real_tokens(facts).to(torch.bool)
    numbers = sequences(facts, real).flatten()
    if batch.get("labels") is None:
        raise ValueError(
            "A cached teacher reads the positions that have a label, and the batch has no `labels`. To measure "
            "retention on other texts than those of the cache, give the model: "
            "`evaluate_retention(student, load_teacher(name))`."
        )
    index = Targets.from_labels(batch["labels"].cpu(), shift=True).index
    wanted = torch.zeros(ids.numel(), dtype=torch.bool)
    wanted[index] = True
    if not real.flatten()[index].all():
        raise ValueError(
            "A label follows padding: the first token of a row that is padded on the left has one, and no teacher was "
            'asked for it. Set `tokenizer.padding_side = "right"`, or that label to -100.'
        )
    flat, rows = ids.flatten(), []
    for number in numbers[index].unique():
        own = (numbers == number) & real.flatten()
        if wanted[own][-1]:
            raise ValueError(
                "A label follows the last token of a sequence: it belongs to the next document of a packed row, and "
                "no teacher was asked for it. Set it to -100, as TRL's collator does with `padding_free=True`."
            )
        rows.append(Row(flat[own].numpy().astype(np.int32), wanted[own][:-1].numpy()))
    return rows, index

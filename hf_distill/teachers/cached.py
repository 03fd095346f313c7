"""A teacher that was run before: its soft labels are read from disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.cache.identity import tokenizer_identity, vocabulary_digest
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.rows import Row
from hf_distill.functional import LMHead
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
from hf_distill.teachers.inputs import READ
from hf_distill.teachers.model import public_name
from hf_distill.teachers.vocabulary import check_vocabularies


# What of a batch says which tokens belong to which sequence, and which are trained.
ROW_KEYS = ("input_ids", "attention_mask", "position_ids", "labels")


class CachedTeacher(Teacher):
    """A cache of soft labels, read from disk row by row: no weights of the teacher are in memory.

    The sequences of a batch are found by their token ids, whatever the order, the batches, padding and packing.
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
        self._manifest = self._reader.manifest
        self._teacher = self._manifest.teacher
        self._heads: dict[torch.device, LMHead] = {}
        self.provides = self._reader.encoding.provides
        self.name = self._teacher.name
        self.vocab_size = self._teacher.vocab_size

    def config_for_card(self) -> dict[str, Any]:
        """The teacher's name, commit, architecture and quantisation, and how its distributions were kept."""
        teacher, options = self._teacher, dict(self._manifest.encoding)
        name, size = options.pop("name"), self._manifest.bytes / max(self._manifest.tokens, 1)
        settings = [f"{key}={value}" for key, value in options.items() if key not in ("vocab_size", "temperatures")]
        facts = {
            "name": public_name(teacher.name),
            "revision": teacher.revision,
            "architecture": teacher.architecture,
            "quantization": teacher.quantization,
            "soft_labels": f"from a cache: {', '.join([name, *settings])}; {size:.1f} bytes per token",
        }
        return {key: value for key, value in facts.items() if value is not None}

    def shape(self) -> ModelShape:
        """Depth and width of the model that the cache was made of."""
        teacher = self._teacher
        if teacher.num_layers is None or teacher.hidden_size is None:
            raise ValueError(
                f"The cache {self._reader.path} does not say how deep and wide its teacher ({self.name}) is; build it "
                "from a local teacher, or compare logits alone."
            )
        return ModelShape(
            name=f"teacher ({teacher.architecture})",
            num_layers=teacher.num_layers,
            hidden_size=teacher.hidden_size,
            vocab_size=teacher.vocab_size,
            is_causal=True,
        )

    def remedy(self, missing: Collection[Signal]) -> str:
        """What to do about signals that the cache does not hold; the end of a message."""
        if set(missing) == {Signal.HIDDEN_STATES}:
            return "build the cache with `encoding='hidden'`, which keeps the hidden states of the last layer"
        return "no encoding of a cache keeps them: use a `ModelTeacher`"

    def check_objectives(self, objectives: Iterable[Objective]) -> None:
        """See `Teacher.check_objectives`; a divergence or a temperature may need more than was kept, too."""
        objectives = list(objectives)
        super().check_objectives(objectives)
        for objective in objectives:
            if isinstance(objective, LogitObjective):
                self._check_divergence(objective)
            elif isinstance(objective, FeatureObjective) and objective.positions == "real":
                raise ValueError(
                    f"`objectives`: {type(objective).__name__} compares all real tokens, and a cache holds those that "
                    "predict a label; use `positions='labelled'`."
                )

    def _check_divergence(self, objective: LogitObjective) -> None:
        """Ask the rules of the loss, with targets of no tokens, for every temperature of the run."""
        targets = self._reader.targets([])
        if not isinstance(targets, SparseLogits):
            return
        temperatures = sorted(set(objective.scheduled["temperature"].values()))
        known = f"The cache {self._reader.path} ({self._reader.encoding.name}) is read at {targets.temperatures}"
        if len(temperatures) > 1:
            raise ValueError(
                f"`temperature` goes from {temperatures[0]:g} to {temperatures[-1]:g} in small steps. {known} only; "
                "keep it at one of them, or build the cache with `encoding='hidden'`."
            )
        terms = {objective.divergence: (1.0, objective.divergence_kwargs)}
        try:
            check_targets(targets, resolve_recipe(terms, temperatures[0], ()))
        except ValueError as error:
            raise ValueError(
                f"`objectives`: {objective.divergence} at temperature {temperatures[0]:g} cannot be computed from "
                f"this teacher. {known}. {error}"
            ) from None

    def check_layers(self, layers: Layers) -> None:
        """See `Teacher.check_layers`: the last layer alone was kept."""
        if others := sorted(layers.hidden - {self._teacher.num_layers}):
            raise ValueError(
                f"`layer_mapping` asks for the hidden states of the teacher's layers {others}, and the cache "
                f"{self._reader.path} holds those of its last layer, {self._teacher.num_layers}, alone; map to that "
                "one, e.g. `layer_mapping='last_k'` with `num_pairs=1`, or use a ModelTeacher."
            )

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        """See `Teacher.check_vocabulary`; digests are compared, since the teacher's tokenizer is not in the cache.

        A pad token that was added to the student's is accepted. Another chat template gives a warning: the rows that
        it makes may not be in the cache.
        """
        theirs, where = self._manifest.tokenizer, f"the cache {self._reader.path} of {self.name}"
        if tokenizer is None or theirs.vocabulary is None:
            check_vocabularies(tokenizer, None, vocab_size, self._teacher.vocab_size)
            return
        vocabulary = tokenizer.get_vocab()
        unpadded = {token: number for token, number in vocabulary.items() if token != tokenizer.pad_token}
        if theirs.vocabulary not in (vocabulary_digest(vocabulary), vocabulary_digest(unpadded)):
            raise ValueError(
                f"The student's tokenizer ({tokenizer.name_or_path}) has another vocabulary than the one of {where}: "
                "its ids are other tokens. Use a student of the teacher's family, or build the cache again if tokens "
                "were added since."
            )
        if theirs.chat_template != tokenizer_identity(tokenizer).chat_template:
            warnings.warn(
                f"The student's tokenizer ({tokenizer.name_or_path}) has another chat template than the one of "
                f"{where}; rows that it makes differently are not found.",
                stacklevel=2,
            )

    def _signals(self, batch: Mapping[str, Any], needs: frozenset[Signal], layers: Layers) -> TeacherSignals:
        if not needs:
            return TeacherSignals()
        self.check_layers(layers)
        ids = batch["input_ids"]
        rows, positions = labelled_rows(batch)
        stored = self._reader.targets(rows).spread(positions, ids.numel())
        if isinstance(stored, SparseLogits):
            return TeacherSignals(stored.to(torch.empty(0, device=ids.device)))
        states = stored.hidden.to(ids.device).view(*ids.shape, -1)
        logits = Projection(states, self._head_on(ids.device, stored.head)) if Signal.LOGITS in needs else None
        return TeacherSignals(logits, dict.fromkeys(layers.hidden, states))

    def _head_on(self, device: torch.device, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The teacher's head, brought to a device once."""
        if not isinstance(head, LMHead):
            return head
        if device not in self._heads:
            bias = None if head.bias is None else head.bias.to(device)
            self._heads[device] = replace(head, weight=head.weight.to(device), bias=bias)
        return self._heads[device]


def labelled_rows(batch: Mapping[str, Any]) -> tuple[list[Row], Tensor]:
    """The sequences of a batch that have labels.

    Args:
        batch: `input_ids` `[B, S]`; `attention_mask` or `position_ids` say where sequences are, as in
            `signals.sequences`. Without `labels` every token that is followed by one of its sequence counts.

    Returns:
        The sequences, whose `kept` positions are those with a label at the next token, and where these positions are
        in the flattened batch, `[M]` int64.

    Raises:
        ValueError: Something other than token ids is read, or a label has no token of its sequence before it.
    """
    if others := sorted(key for key in READ if key in batch and key not in ROW_KEYS):
        raise ValueError(
            f"The batch holds {others}, and rows of a cache are found by their token ids alone; train with a "
            "ModelTeacher."
        )
    batch = {key: batch[key].cpu() for key in ROW_KEYS if batch.get(key) is not None}
    real = real_tokens(batch).to(torch.bool)
    where = real.flatten().nonzero().squeeze(1)
    number = sequences(batch, real).flatten()[where]
    # Of the real tokens, those that the next one in the batch belongs to the same sequence as.
    followed = torch.zeros(real.numel(), dtype=torch.bool)
    followed[where[:-1]] = (where.diff() == 1) & (number.diff() == 0)
    labelled = followed
    if "labels" in batch:
        labelled = torch.zeros_like(followed)
        labelled[Targets.from_labels(batch["labels"], shift=True).index] = True
        if (lost := (labelled & ~followed).nonzero()).numel():
            row, column = divmod(int(lost[0]), real.shape[1])
            raise ValueError(
                f"`labels` has {int(batch['labels'][row, column + 1])} at position {column + 1} of row {row} of the "
                "batch, which is the first token of a sequence: a cache holds what follows a token, and nothing comes "
                "before this one. Pad on the right (`tokenizer.padding_side = 'right'`), or set the label to -100."
            )
    ids, marks = batch["input_ids"].flatten()[where].numpy().astype(np.int32), labelled[where].numpy()
    bounds = [0, *(np.flatnonzero(np.diff(number.numpy())) + 1), len(ids)]
    rows = [Row(ids[start:stop], marks[start : stop - 1]) for start, stop in pairwise(bounds)]
    return [row for row in rows if row.kept.any()], labelled.nonzero().squeeze(1)

"""What passes from models to objectives: projections, hidden states, and the one causal shift and mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from hf_distill.functional.sparse import SparseLogits


IGNORE_INDEX = -100
# Which positions of a language model an objective may compare; see `Tokens.of`.
POSITIONS = ("labelled", "real")


class Signal(str, Enum):
    """Something that an objective can need and a teacher can provide."""

    LOGITS = "logits"
    HIDDEN_STATES = "hidden_states"
    ATTENTION = "attention"


@dataclass(frozen=True)
class Layers:
    """The layers of one model that are looked into.

    Args:
        hidden: Whose hidden states are asked for, from 0 (the embedding) to the depth.
        attention: Whose queries, keys and values are asked for, from 1 to the depth.
        final_norm: Whether the norm between the last layer and the head is asked for.
    """

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    final_norm: bool = False


NO_LAYERS = Layers()


@dataclass(frozen=True)
class ModelShape:
    """What an objective is told of a model before the first step.

    Args:
        name: For messages: "student" or "teacher", and the architecture.
        num_layers: Depth.
        hidden_size: Width of the hidden states between layers.
        kept_layers: Of a student that was cut from a teacher, the teacher's layers (counted from 0) that it is made
            of; None for every other model.
        cut_from: Depth of the model that it was cut from; None for every other model.
        kept_channels: Of a student whose hidden width was pruned, the teacher's channels (counted from 0) that it is
            made of; None for every other model.
        cut_from_width: Hidden width of the model that it was cut from; None for every other model.
        vocab_size: Width of the logits that its head makes of hidden states; None where it makes none, as a
            classifier, or takes another width than that of the layers.
        has_final_norm: Whether it has a norm between its last layer and its head, and it is known.
        is_causal: Whether its tokens see only those before them, as in decoders.
        num_heads: Attention heads of a layer; 0 where they cannot be told.
        num_kv_heads: Heads of keys and values, which groups of query heads share; 0 where they cannot be told.
        head_dim: Width of a head; 0 where it cannot be told.
        no_attention: Layers whose queries, keys and values cannot be had, each with the reason and what to do.
        no_attention_maps: Layers whose attention maps cannot be had, likewise.
    """

    name: str
    num_layers: int
    hidden_size: int
    kept_layers: tuple[int, ...] | None = None
    cut_from: int | None = None
    kept_channels: tuple[int, ...] | None = None
    cut_from_width: int | None = None
    vocab_size: int | None = None
    has_final_norm: bool = False
    is_causal: bool = False
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    no_attention: Mapping[int, str] = field(default_factory=dict)
    no_attention_maps: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Projection:
    """Logits that are not built yet: `head(hidden)` gives them for any slice of rows.

    Args:
        hidden: What enters the head, `[..., H]`. For a classifier these are the logits themselves.
        head: Maps `[n, H]` to logits `[n, V]`: an `LMHead`, a module, or `identity` where `hidden` is logits already.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    def at(self, index: Tensor) -> Projection:
        """Keep the rows `index` ([N], int64) of the flattened `hidden`."""
        return replace(self, hidden=rows_of(self.hidden, index))


def identity(logits: Tensor) -> Tensor:
    """The head of a model whose output is logits already."""
    return logits


@dataclass(frozen=True)
class Targets:
    """The labelled positions of a batch: the only place where labels are shifted and masked.

    Args:
        index: Positions in the flattened batch whose output is trained, `[N]` int64.
        labels: The label at each of them, `[N]` int64, never -100.
    """

    index: Tensor
    labels: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, *, shift: bool) -> Targets:
        """Find the labelled positions.

        Args:
            labels: `[B, S]` (language models) or `[B]` (classifiers); -100 is ignored.
            shift: True for causal models, where position t is trained on the label at t + 1.
        """
        if shift:
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
        flat = labels.reshape(-1)
        index = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        return cls(index=index, labels=flat[index])

    def __len__(self) -> int:
        return self.labels.numel()


@dataclass(frozen=True)
class Tokens:
    """The positions of a batch whose hidden states are compared.

    Args:
        index: Positions in the flattened batch, `[M]` int64.
        is_first: Which of them are the first token of a sequence, `[M]` bool.
        weights: How much each counts, `[M]`; they add up to the number of labels. None: each counts once.
    """

    index: Tensor
    is_first: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(
        cls, targets: Targets, batch: Mapping[str, Tensor], *, per_row: bool, positions: str = "labelled"
    ) -> Tokens:
        """Choose the positions that go with the labels.

        All real tokens of a sequence count together as much as its labels do, each as much as the others: their
        number in an optimizer step is not known to a micro-batch, the number of labels is. So a sequence counts the
        same with whatever others it is batched, and one without labels does not count.

        Args:
            targets: The labelled positions, or rows of a classifier.
            batch: `input_ids` `[B, S]`, and `attention_mask` or `position_ids` where there are any.
            per_row: True for classifiers, whose rows are labelled: all real tokens.
            positions: "labelled" for the labelled positions of a language model, "real" for all real tokens.
        """
        first = _first_tokens(batch)
        if not per_row and positions == "labelled":
            return cls(targets.index, first.flatten()[targets.index])
        real = real_tokens(batch).to(torch.bool)
        numbers = _rows(real) if per_row else sequences(batch, real)
        count = int(numbers.max()) + 1 if numbers.numel() else 0
        labels = torch.bincount(targets.index if per_row else numbers.flatten()[targets.index], minlength=count)
        index = (real & (labels > 0)[numbers]).flatten().nonzero().squeeze(1)
        own, lengths = numbers.flatten()[index], torch.bincount(numbers[real], minlength=count)
        return cls(index, first.flatten()[index], labels[own] / lengths[own])

    def sum(self, values: Tensor) -> Tensor:
        """Add up per-token values `[M]`."""
        return values.sum() if self.weights is None else (values * self.weights).sum()


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a batch are no padding, `[B, S]`, 0 where they are."""
    mask = batch.get("attention_mask")
    return mask if mask is not None and mask.dim() == 2 else torch.ones_like(batch["input_ids"])


def _is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether a row may hold several sequences: it says so by its positions, padded rows have a mask."""
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def _first_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Where sequences begin, `[B, S]` bool."""
    if _is_packed(batch):
        return batch["position_ids"] == 0
    real = real_tokens(batch)
    return (real != 0) & (real.cumsum(-1) == 1)


def _rows(tokens: Tensor) -> Tensor:
    """The row of each token of `[B, S]`."""
    return torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)


def sequences(batch: Mapping[str, Tensor], real: Tensor) -> Tensor:
    """The number of each token's sequence, `[B, S]` int64; no sequence goes on in the next row."""
    if not _is_packed(batch):
        return _rows(real)
    starts = batch["position_ids"] == 0
    starts[:, :1] = True
    return starts.flatten().cumsum(0).sub(1).view_as(starts)


HiddenStates = Mapping[int, Tensor]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Visibility:
    """Which keys each query of a batch sees; what is None or False hides nothing.

    Args:
        mask: `[B, 1 or H, S, S]`: bool, True where the query (third dimension) sees the key, or added to the scores.
        causal: No query sees a later key.
        window: No query sees a key that is this far away or farther.
        padding: `[B, S]` bool, False for keys that nothing sees.
        documents: `[1 or B, S]` int64; no query sees a key of another document.
    """

    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    padding: Tensor | None = None
    documents: Tensor | None = None

    def rows(self, row: int, positions: Tensor, length: int) -> Tensor:
        """What some queries of one row of the batch see.

        Args:
            row: Which row of the batch.
            positions: The queries, `[M]` int64.
            length: S, the number of keys.

        Returns:
            `[1 or H, M, S]`, bool or added to the scores as `mask` is.
        """
        if self.mask is not None:
            return self.mask[row].index_select(1, positions)
        queries, keys = positions[:, None], torch.arange(length, device=positions.device)
        seen = torch.ones(len(positions), length, dtype=torch.bool, device=positions.device)
        if self.causal:
            seen &= keys <= queries
        if self.window is not None:
            seen &= (queries - keys).abs() < self.window
        if self.padding is not None:
            seen &= self.padding[row]
        if self.documents is not None:
            document = self.documents[row if len(self.documents) > 1 else 0]
            seen &= document[positions][:, None] == document
        return seen[None]


@dataclass(frozen=True)
class AttentionStates:
    """What goes into the attention of one layer, for whole sequences.

    Args:
        query: `[B, H, S, d]`, after norms and position embedding.
        key: `[B, H_kv, S, d]`; H is a multiple of H_kv, and head h reads key h // (H / H_kv).
        value: `[B, H_kv, S, d_v]`.
        visibility: Which keys each query sees.
        scaling: Factor of the scores.
        softcap: `softcap * tanh(scores / softcap)` follows the scaling; None for no cap.
        has_maps: False where `softmax(scores)` is not what the model computes: heads and positions are unknown, or
            something else enters its scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visibility: Visibility
    scaling: float
    softcap: float | None = None
    has_maps: bool = True

    def seen(self, row: int, positions: Tensor) -> Tensor:
        """What the queries at `positions` ([M], int64) of one row of the batch see; see `Visibility.rows`."""
        return self.visibility.rows(row, positions, self.key.shape[2])

    def to(self, device: torch.device) -> AttentionStates:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("query", "key", "value")}
        masks = {name: getattr(self.visibility, name) for name in ("mask", "padding", "documents")}
        masks = {name: None if mask is None else mask.to(device) for name, mask in masks.items()}
        return replace(self, visibility=replace(self.visibility, **masks), **moved)


Attention = Mapping[int, AttentionStates]


@dataclass(frozen=True)
class StudentSignals:
    """What the student gives for one batch, already restricted to the labelled positions.

    Args:
        logits: Projection with hidden `[N, H_s]`.
        labels: `[N]` int64.
        hidden: By layer `[M, H_s]`, at `tokens`; layers count from 1, 0 is the embedding, the last is after the final
            norm (as in transformers' `hidden_states`).
        tokens: The positions of `hidden`; None where no layers were asked for.
        attention: By layer from 1, for whole sequences: `tokens.index` are queries in the flattened batch.
        final_norm: What the model applies to its last layer's hidden states, which in `hidden` have passed it; None
            where it was not asked for.
    """

    logits: Projection
    labels: Tensor
    hidden: HiddenStates = field(default_factory=dict)
    tokens: Tokens | None = None
    attention: Attention = field(default_factory=dict)
    final_norm: Norm | None = None

    def at(self, tokens: Tokens) -> StudentSignals:
        """Keep the hidden states, of whole sequences, of `tokens`."""
        return replace(self, hidden=_hidden_at(self.hidden, tokens), tokens=tokens)


@dataclass(frozen=True)
class TeacherSignals:
    """What a teacher gives for one batch; fields that were not needed are None or empty.

    Args:
        logits: Projection with hidden `[B, S, H_t]` (language models) or `[B, C]` (classifiers), or sparse targets of
            the B * S positions of the flattened batch, in which those without a label hold anything.
        hidden: By layer `[B, S, H_t]`; layers count as in `StudentSignals`.
        attention: By layer, for whole sequences.
        final_norm: As in `StudentSignals`.
    """

    logits: Projection | SparseLogits | None = None
    hidden: HiddenStates = field(default_factory=dict)
    attention: Attention = field(default_factory=dict)
    final_norm: Norm | None = None

    def at(
        self, targets: Targets, tokens: Mapping[str, Tokens] | None = None
    ) -> tuple[TeacherSignals, dict[str, TeacherSignals]]:
        """Keep the labelled rows of the logits, and the hidden states that are compared.

        Args:
            targets: The labelled positions.
            tokens: What is compared, by any name.

        Returns:
            The signals without hidden states, and the same with those of each of `tokens`.
        """
        logits = None if self.logits is None else self.logits.at(targets.index)
        cut = replace(self, logits=logits, hidden={})
        named = (tokens or {}).items()
        return cut, {name: replace(cut, hidden=_hidden_at(self.hidden, kept)) for name, kept in named}


def _hidden_at(hidden: HiddenStates, tokens: Tokens) -> HiddenStates:
    return {layer: rows_of(states, tokens.index) for layer, states in hidden.items()}


def rows_of(states: Tensor, index: Tensor) -> Tensor:
    """Positions `index` ([M], int64) of states `[..., H]`, flattened to `[M, H]`."""
    return states.flatten(0, -2).index_select(0, index.to(states.device))

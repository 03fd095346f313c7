"""Which layers, neurons, heads and channels stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.students.families import Axis
from hf_distill.students.resolve import Target
from hf_distill.students.scores import SHAPES, ImportanceScores
from hf_distill.students.shrink import choose_layers
from hf_distill.students.spec import PruneSpec
from hf_distill.students.widths import Widths


@dataclass(frozen=True)
class Kept:
    """What stays of a model, as increasing indices; None where everything does.

    Args:
        layers: The layers.
        neurons: For each layer that stays, the neurons, `[I']` int64.
        heads: For each layer that stays, the query heads, `[H']` int64.
        kv_heads: For each layer that stays, the heads of keys and values, `[KV']` int64.
        channels: Channels of the residual stream, `[D']` int64.
        before: The widths of the model.
    """

    layers: list[int]
    neurons: list[Tensor] | None
    heads: list[Tensor] | None
    kv_heads: list[Tensor] | None
    channels: Tensor | None
    before: Widths

    def index(self, axis: Axis, position: int) -> Tensor | None:
        """What stays along an axis of a weight in the layer at a position of the student; None for all."""
        if axis is Axis.HIDDEN:
            return self.channels
        if axis in (Axis.MLP, Axis.GATE_UP):
            if self.neurons is None:
                return None
            kept = self.neurons[position]
            return kept if axis is Axis.MLP else torch.cat([kept, kept + self.before.neurons])
        if axis is Axis.FREE or self.heads is None or self.kv_heads is None:
            return None
        query, shared = (self._rows(heads[position]) for heads in (self.heads, self.kv_heads))
        keys = self.before.heads * self.before.head_dim
        values = keys + self.before.kv_heads * self.before.head_dim
        return {
            Axis.QUERY: query,
            Axis.KEY_VALUE: shared,
            Axis.QKV: torch.cat([query, shared + keys, shared + values]),
        }[axis]

    def _rows(self, heads: Tensor) -> Tensor:
        """The rows of some heads."""
        return (heads[:, None] * self.before.head_dim + torch.arange(self.before.head_dim)).flatten()


def select(spec: PruneSpec, target: Target, depth: int, before: Widths, scores: ImportanceScores) -> Kept:
    """Keep what has the highest scores.

    Query heads are kept in whole groups that share keys and values: first the groups whose best heads score highest,
    then the best heads of each, as many in every group. Without scores of layers they are evenly spaced.

    Args:
        spec: For the layers it drops by number.
        target: The size to keep.
        depth: Number of layers of the model.
        before: The widths of the model.
        scores: Scores for every width that is cut.

    Raises:
        ValueError: The scores are of another model, or lack what is cut.
    """
    layers = _layers(spec, target.depth, depth, scores)
    after = target.widths
    neurons, channels, heads, kv_heads = None, None, None, None
    if after.neurons != before.neurons:
        mlp = _scores_of("mlp", scores, (depth, before.neurons))
        neurons = [_best(mlp[layer], after.neurons) for layer in layers]
    if after.hidden != before.hidden:
        channels = _best(_scores_of("hidden", scores, (before.hidden,)), after.hidden)
    if (after.heads, after.kv_heads) != (before.heads, before.kv_heads):
        per_head = _scores_of("heads", scores, (depth, before.heads))
        chosen = [_heads(per_head[layer], before, after) for layer in layers]
        heads, kv_heads = [pair[0] for pair in chosen], [pair[1] for pair in chosen]
    return Kept(layers, neurons, heads, kv_heads, channels, before)


def _layers(spec: PruneSpec, keep: int, depth: int, scores: ImportanceScores) -> list[int]:
    if spec.drop_layers is not None:
        return [layer for layer in range(depth) if layer not in spec.drop_layers]
    if keep == depth or scores.layers is None:
        return choose_layers(depth, keep)
    return _best(_scores_of("layers", scores, (depth,)), keep).tolist()


def _heads(scores: Tensor, before: Widths, after: Widths) -> tuple[Tensor, Tensor]:
    """The query heads and the groups of one layer that stay."""
    share, size = after.heads // after.kv_heads, before.heads // before.kv_heads
    grouped = scores.view(before.kv_heads, size)
    best = grouped.sort(descending=True, stable=True)
    groups = _best(best.values[:, :share].sum(1), after.kv_heads)
    members = best.indices[groups, :share].sort().values
    return (groups[:, None] * size + members).flatten(), groups


def _best(scores: Tensor, keep: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:keep].sort().values


def _scores_of(name: str, scores: ImportanceScores, shape: tuple[int, ...]) -> Tensor:
    values: Tensor | None = getattr(scores, name)
    if values is None:
        raise ValueError(
            f"The spec cuts what `scores.{name}` is needed for, and it is None; expected {SHAPES[name]} = "
            f"{list(shape)}. Measure it too, or fill it from the weights: `dataclasses.replace(scores, {name}="
            f"weight_norms(model).{name})`."
        )
    if tuple(values.shape) != shape:
        raise ValueError(
            f"`scores.{name}` has shape {list(values.shape)}, but this model needs {SHAPES[name]} = {list(shape)}: "
            "they were measured on another model. Measure them on this one."
        )
    return values

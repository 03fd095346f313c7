"""Importance without data: the size of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_distill.anatomy import describe
from hf_distill.students.families import Axis, family_of
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.surgery import path_of
from hf_distill.students.widths import Widths


PROVENANCE = "norm of the weights, without data"


@torch.no_grad()
def weight_norms(model: nn.Module) -> ImportanceScores:
    """Score neurons, heads and channels by the Euclidean norm of all weights that they are a row or a column of.

    A poor guide next to activations: at half the MLP it can be worse than chance, which distillation then repairs.
    Layers get no score. Biases and norms do not count.

    Args:
        model: A model of a known family, wrapped or not.

    Returns:
        Scores of neurons, and of heads and channels where the family can cut them; `layers` is None.

    Raises:
        ValueError: The family is unknown.
    """
    parts, family = describe(model), family_of(model)
    widths, depth = Widths.of(parts.model.config, family), parts.num_layers
    prefix = f"{path_of(parts.model, parts.layers)}."
    mlp, heads, hidden = (
        torch.zeros(depth, widths.neurons),
        torch.zeros(depth, widths.heads),
        torch.zeros(widths.hidden),
    )
    for name, parameter in parts.model.named_parameters():
        path, _, kind = name.rpartition(".")
        in_layer, layer = path.startswith(prefix), 0
        if in_layer:
            number, _, path = path.removeprefix(prefix).partition(".")
            layer = int(number)
        axes = family.axes(path, kind, in_layer=in_layer)
        if parameter.dim() != 2 or not axes:
            continue
        squares = parameter.float().square()
        for dimension, axis in enumerate(axes):
            _add(squares.sum(1 - dimension).cpu(), axis, widths, mlp[layer], heads[layer], hidden)
    how = {"mlp": PROVENANCE} | ({"heads": PROVENANCE, "hidden": PROVENANCE} if family.cuts_all else {})
    return ImportanceScores(
        mlp=mlp.sqrt(),
        heads=heads.sqrt() if family.cuts_all else None,
        hidden=hidden.sqrt() if family.cuts_all else None,
        provenance=how,
    )


def _add(sums: Tensor, axis: Axis, widths: Widths, mlp: Tensor, heads: Tensor, hidden: Tensor) -> None:
    """Add sums of squares along an axis to what the axis runs over."""
    if axis is Axis.MLP:
        mlp += sums
    elif axis is Axis.GATE_UP:
        mlp += sums.view(2, -1).sum(0)
    elif axis is Axis.HIDDEN:
        hidden += sums
    elif axis in (Axis.QUERY, Axis.QKV):
        heads += sums[: widths.heads * widths.head_dim].view(widths.heads, -1).sum(1)

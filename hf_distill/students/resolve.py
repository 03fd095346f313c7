"""From what is asked of a pruned model to its exact size, before any weight is touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

from torch import nn

from hf_distill.anatomy import describe
from hf_distill.students.families import Axis, Family, family_of
from hf_distill.students.spec import PruneSpec
from hf_distill.students.surgery import path_of
from hf_distill.students.widths import Widths, choose_widths, grid, refusal


# Neither the MLP, nor the hidden width, nor the depth is cut below this share of it to meet a `params_ratio`.
SMALLEST_SHARE = 0.5


@dataclass(frozen=True)
class Target:
    """What a model is cut to.

    Args:
        depth: Number of layers.
        widths: The widths.
    """

    depth: int
    widths: Widths


def resolve(spec: PruneSpec, model: nn.Module) -> PruneSpec:
    """Make a spec concrete for a model, which may be on the meta device: every size is a number afterwards.

    Args:
        spec: What is asked for.
        model: A model of a known family, wrapped or not.

    Returns:
        A spec with every size and without `params_ratio`; resolving it again changes nothing.

    Raises:
        ValueError: The family is unknown, or the spec cannot be met; the message lists what can.
    """
    return concrete(spec, target_of(spec, model))


def concrete(spec: PruneSpec, target: Target) -> PruneSpec:
    """The spec with the sizes of its target."""
    widths = target.widths
    return PruneSpec(
        num_hidden_layers=target.depth,
        drop_layers=spec.drop_layers,
        intermediate_size=widths.neurons,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.kv_heads,
        hidden_size=widths.hidden,
        round_to=spec.round_to,
    )


def check_cuts(spec: PruneSpec, model: nn.Module, target: Target) -> None:
    """Refuse a target that is the model itself: a run would go on and call it pruned.

    Raises:
        ValueError: The sizes that are asked for are, when rounded, those of the model.
    """
    parts = describe(model)
    before = Target(parts.num_layers, Widths.of(parts.model.config, family_of(model)))
    if target == before:
        raise ValueError(
            f"The spec {spec.asked} cuts nothing: the model has {before.depth} layers, {before.widths.neurons} "
            f"neurons, {before.widths.hidden} channels and {before.widths.heads} heads, and widths are rounded to "
            f"multiples of round_to={spec.round_to}. Give smaller sizes, or a smaller `round_to`."
        )


def target_of(spec: PruneSpec, model: nn.Module) -> Target:
    """As `resolve`, in the terms of the surgery."""
    parts, family = describe(model), family_of(model)
    config = parts.model.config
    target = Target(_depth(spec, parts.num_layers), choose_widths(spec, config, family))
    if spec.params_ratio is None:
        return target
    weights = list(_weights(model, family))
    before = Target(parts.num_layers, Widths.of(config, family))
    free = {
        "depth": spec.num_hidden_layers is None and spec.drop_layers is None,
        "hidden": spec.hidden_size is None and family.cuts_all,
        "neurons": spec.intermediate_size is None,
    }
    depths = grid(target.depth, 1, math.ceil(target.depth * SMALLEST_SHARE))
    hidden = [
        width
        for width in _half_grid(target.widths.hidden, spec.round_to)
        if refusal(config, family, replace(target.widths, hidden=width)) is None
    ]
    neurons = _half_grid(target.widths.neurons, spec.round_to)
    choices = [
        depths if free["depth"] else depths[:1],
        hidden if free["hidden"] else hidden[:1],
        neurons if free["neurons"] else neurons[:1],
    ]
    return _nearest(spec.params_ratio, choices, target, weights, count(weights, before))


def count(weights: list[Weight], target: Target) -> int:
    """The exact number of parameters of a target."""
    return sum((target.depth if weight.in_layer else 1) * weight.size(target.widths) for weight in weights)


@dataclass(frozen=True)
class Weight:
    """A parameter: of one layer, which stands for all, or outside of the layers."""

    in_layer: bool
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]

    def size(self, widths: Widths) -> int:
        """Number of entries at these widths."""
        if not self.axes:
            return math.prod(self.shape)
        return math.prod(widths.size(axis) or now for axis, now in zip(self.axes, self.shape, strict=True))


def _weights(model: nn.Module, family: Family) -> Iterator[Weight]:
    parts = describe(model)
    prefix = f"{path_of(parts.model, parts.layers)}."
    for name, parameter in parts.model.named_parameters():
        path, _, kind = name.rpartition(".")
        in_layer = path.startswith(prefix)
        if in_layer:
            index, _, path = path.removeprefix(prefix).partition(".")
            if index != "0":
                continue
        yield Weight(in_layer, family.axes(path, kind, in_layer=in_layer), tuple(parameter.shape))


def _half_grid(width: int, step: int) -> list[int]:
    return grid(width, step, math.ceil(width * SMALLEST_SHARE))


def _nearest(ratio: float, choices: list[list[int]], fixed: Target, weights: list[Weight], before: int) -> Target:
    """The first target, in the order of preference, that is as near as the innermost free size can come."""
    inner = max((i for i, values in enumerate(choices) if len(values) > 1), default=len(choices) - 1)
    best: tuple[float, Target] | None = None
    for outer in product(*choices[:inner]):
        reached = []
        for rest in product(*choices[inner:]):
            depth, hidden, neurons = outer + rest
            target = Target(depth, replace(fixed.widths, hidden=hidden, neurons=neurons))
            reached.append((count(weights, target) / before, target))
        shares = [share for share, _ in reached]
        step = max((high - low for high, low in pairwise(shares)), default=0.0)
        share, target = min(reached, key=lambda pair: abs(pair[0] - ratio))
        if abs(share - ratio) <= step / 2:
            return target
        if best is None or abs(share - ratio) < abs(best[0] - ratio):
            best = share, target
    assert best is not None  # every choice has a value
    share, target = best
    raise ValueError(
        f"`params_ratio` is {ratio}; the nearest that can be reached here is {share:.4f}, with num_hidden_layers="
        f"{target.depth}, hidden_size={target.widths.hidden} and intermediate_size={target.widths.neurons}. No size "
        f"that is chosen goes below {SMALLEST_SHARE:g} of what it was: cut again after distilling, give smaller sizes "
        "yourself, or a smaller `round_to`."
    )


def _depth(spec: PruneSpec, total: int) -> int:
    dropped = spec.drop_layers or ()
    if any(not 0 <= layer < total for layer in dropped) or len(dropped) >= total:
        raise ValueError(
            f"`drop_layers` is {list(dropped)}; expected layers from 0 to {total - 1}, fewer than all {total}."
        )
    depth = spec.num_hidden_layers
    if depth is None:
        return total - len(dropped)
    if depth > total or (spec.drop_layers is not None and depth != total - len(dropped)):
        raise ValueError(
            f"`num_hidden_layers` is {depth} with drop_layers={spec.drop_layers}; the model has {total} layers. Give "
            "one of both: a number of layers to keep, or the layers to drop."
        )
    return depth

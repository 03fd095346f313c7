"""A large cut in several small ones, with distillation between them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.anatomy import describe
from hf_distill.skeletons import skeleton
from hf_distill.students.families import family_of
from hf_distill.students.resolve import Target, concrete, target_of
from hf_distill.students.spec import PruneSpec
from hf_distill.students.surgery import config_of_depth
from hf_distill.students.widths import Widths, choose_widths, config_of_widths, refusal


# Larger cuts lose what distillation does not bring back (guidelines of NVIDIA ModelOpt).
SMALLEST_RATIO = 2 / 3
MOST_STEPS = 16


def prune_steps(config: PreTrainedConfig, spec: PruneSpec, steps: int | None = None) -> list[PruneSpec]:
    """Cut a large cut into steps that each remove at most a third of the parameters.

    Every size goes down by the same factor in each step, as near as its grid allows. Each spec is for the model that
    the step before it left, distilled and scored anew in between; the last one ends where `spec` asks.

    Args:
        config: Of the model that will be cut; no weight is needed.
        spec: What is asked for in the end. A `params_ratio` may be smaller here than `prune` reaches in one cut.
        steps: How many; the fewest that will do if None.

    Returns:
        Concrete specs, one for each `prune`. Steps that would change nothing are left out.

    Raises:
        ValueError: The spec cannot be met, or a step would cut more than a third.

    Example:
        >>> for step in prune_steps(student.config, PruneSpec(params_ratio=0.4)):
        ...     student, report = prune(student, step, estimate_importance(student, calibration))
        ...     KDTrainer(student, teacher, ...).train()
    """
    if steps is not None and steps < 1:
        raise ValueError(f"`steps` is {steps}; expected a number >= 1, or None for the fewest that will do.")
    numbers = range(1, MOST_STEPS + 1) if steps is None else [steps]
    if steps is None and spec.params_ratio is not None:
        numbers = range(math.ceil(math.log(spec.params_ratio) / math.log(SMALLEST_RATIO) - 1e-9), MOST_STEPS + 1)
    worst = 0.0
    for number in numbers:
        path = _path(config, spec, number)
        worst = min(ratio for _, ratio in path)
        if worst >= SMALLEST_RATIO:
            return [step for step, _ in path]
    asked = f"`steps` is {steps}" if steps is not None else f"`spec` needs more than {MOST_STEPS} steps"
    raise ValueError(
        f"{asked}; one of them would keep {worst:.0%} of the parameters, and at most a third may go at a time. Give "
        "more `steps`, a `spec` that cuts less, or one with a smaller `round_to`."
    )


def _path(config: PreTrainedConfig, spec: PruneSpec, steps: int) -> list[tuple[PruneSpec, float]]:
    """The specs of so many steps, each with the share of the parameters that it keeps."""
    model = skeleton(config)
    whole, before, last = _size(model), _target(model), _last(model, spec)
    dropped = sorted(spec.drop_layers or ())
    path = []
    for number in range(1, steps + 1):
        size = _size(model)
        asked = _asked(model, spec, before, last, number / steps)
        if spec.params_ratio is not None:
            asked = replace(asked, params_ratio=whole * spec.params_ratio ** (number / steps) / size)
        target = target_of(asked, model)
        step = concrete(asked, target)
        if spec.drop_layers is not None:
            # The last layers go first, so that the numbers of the others stay what they are.
            keep = len(dropped) - (describe(model).num_layers - target.depth)
            step, dropped = replace(step, drop_layers=tuple(dropped[keep:]) or None), dropped[:keep]
        if target != _target(model):
            model = _cut(model, target)
            path.append((step, _size(model) / size))
    return path


def _asked(model: PreTrainedModel, spec: PruneSpec, before: Target, last: Target, share: float) -> PruneSpec:
    """What the given sizes are after a share of the way, on a straight line of their logarithms."""

    def between(start: int, end: int) -> float:
        return start * (end / start) ** share

    start, end = before.widths, last.widths
    widths = _nearest_allowed(
        model,
        spec.round_to,
        end,
        wanted=(
            between(start.hidden, end.hidden),
            between(start.heads, end.heads),
            between(start.kv_heads, end.kv_heads),
        ),
    )
    return PruneSpec(
        # Where only `params_ratio` is given, depth and widths stay free for it.
        num_hidden_layers=round(between(before.depth, last.depth)) if last.depth != before.depth else None,
        intermediate_size=round(between(start.neurons, end.neurons)) if spec.intermediate_size is not None else None,
        num_attention_heads=widths.heads if (end.heads, end.kv_heads) != (start.heads, start.kv_heads) else None,
        num_key_value_heads=widths.kv_heads,
        hidden_size=widths.hidden if spec.hidden_size is not None else None,
        params_ratio=None,
        round_to=spec.round_to,
    )


def _nearest_allowed(model: PreTrainedModel, step: int, end: Widths, wanted: tuple[float, float, float]) -> Widths:
    """The hidden size and heads nearest to what is wanted, of those that transformers takes together."""
    family, now = family_of(model), _target(model).widths
    hidden = sorted({now.hidden, end.hidden, *range(math.ceil(end.hidden / step) * step, now.hidden, step)})
    shares = range(end.heads // end.kv_heads, now.heads // now.kv_heads + 1)
    heads = [(share * shared, shared) for shared in range(end.kv_heads, now.kv_heads + 1) for share in shares]
    choices = [replace(now, hidden=size, heads=query, kv_heads=kv) for size, (query, kv) in product(hidden, heads)]
    allowed = [widths for widths in choices if refusal(model.config, family, widths) is None]

    def distance(widths: Widths) -> float:
        sizes = (widths.hidden, widths.heads, widths.kv_heads)
        return sum(abs(math.log(size / goal)) for size, goal in zip(sizes, wanted, strict=True))

    return min(allowed, key=distance)


def _last(model: PreTrainedModel, spec: PruneSpec) -> Target:
    """The sizes that are given; the others stay."""
    if spec.params_ratio is None:
        return target_of(spec, model)
    depth = describe(model).num_layers
    if spec.num_hidden_layers is not None or spec.drop_layers is not None:
        depth = spec.num_hidden_layers or depth - len(spec.drop_layers or ())
    return Target(depth, choose_widths(spec, model.config, family_of(model)))


def _target(model: PreTrainedModel) -> Target:
    return Target(describe(model).num_layers, Widths.of(model.config, family_of(model)))


def _cut(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """The model of another size, without weights; which layers stay does not matter here."""
    config = config_of_depth(describe(model), list(range(target.depth)))
    return skeleton(config_of_widths(config, family_of(model), target.widths))


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

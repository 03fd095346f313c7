"""A large cut in several small ones, with distillation between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.anatomy import describe
from hf_distill.skeletons import skeleton
from hf_distill.students.families import family_of
from hf_distill.students.resolve import Target, concrete, target_of
from hf_distill.students.spec import PruneSpec
from hf_distill.students.surgery import config_of_depth
from hf_distill.students.widths import Widths, config_of_widths, refusal


# Larger cuts lose what distillation does not bring back (guidelines of NVIDIA ModelOpt).
SMALLEST_RATIO = 2 / 3
MOST_STEPS = 16


def prune_steps(config: PreTrainedConfig, spec: PruneSpec, steps: int | None = None) -> list[PruneSpec]:
    """Cut a large cut into steps that each remove at most a third of the parameters.

    Every size goes down by the same factor in each step, as near as its grid allows. Each spec is for the model that
    the step before it left, distilled and scored anew in between; the last one ends where `spec` asks.

    Args:
        config: Of the model that will be cut; no weight is needed.
        spec: What is asked for in the end; a `params_ratio` is made sizes first, as `prune` would in one cut.
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
    worst = 0.0
    for number in range(1, MOST_STEPS + 1) if steps is None else [steps]:
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
    before, last = _target(model), target_of(spec, model)
    dropped = sorted(spec.drop_layers or ())
    path = []
    for number in range(1, steps + 1):
        asked = _asked(model, spec.round_to, before, last, number / steps)
        target = target_of(asked, model)
        step = concrete(asked, target)
        if spec.drop_layers is not None:
            # The last layers go first, so that the numbers of the others stay what they are.
            keep = len(dropped) - (describe(model).num_layers - target.depth)
            step, dropped = replace(step, drop_layers=tuple(dropped[keep:]) or None), dropped[:keep]
        if target != _target(model):
            size, model = _size(model), resized(model, target)
            path.append((step, _size(model) / size))
    return path


def _asked(model: PreTrainedModel, round_to: int, before: Target, last: Target, share: float) -> PruneSpec:
    """The sizes after a share of the way, on a straight line of their logarithms."""

    def between(start: int, end: int) -> float:
        return start * (end / start) ** share

    start, end = before.widths, last.widths
    pairs = [(start.hidden, end.hidden), (start.heads, end.heads), (start.kv_heads, end.kv_heads)]
    widths = _nearest_allowed(model, round_to, end, [between(*pair) for pair in pairs])
    return PruneSpec(
        num_hidden_layers=round(between(before.depth, last.depth)),
        # The step before may have been rounded to fewer.
        intermediate_size=min(round(between(start.neurons, end.neurons)), _target(model).widths.neurons),
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.kv_heads,
        hidden_size=widths.hidden,
        round_to=round_to,
    )


def _nearest_allowed(model: PreTrainedModel, step: int, end: Widths, wanted: Sequence[float]) -> Widths:
    """The hidden size and heads nearest to what is wanted, of those that transformers takes together."""
    family, now = family_of(model), _target(model).widths
    hidden = sorted({now.hidden, end.hidden, *range(math.ceil(end.hidden / step) * step, now.hidden, step)})
    shares = range(end.heads // end.kv_heads, now.heads // now.kv_heads + 1)
    heads = [(share * shared, shared) for shared in range(end.kv_heads, now.kv_heads + 1) for share in shares]
    choices = [replace(now, hidden=size, heads=query, kv_heads=kv) for size, (query, kv) in product(hidden, heads)]

    def distance(widths: Widths) -> float:
        sizes = (widths.hidden, widths.heads, widths.kv_heads)
        return sum(abs(math.log(size / goal)) for size, goal in zip(sizes, wanted, strict=True))

    nearest = sorted(choices, key=distance)
    return next(widths for widths in nearest if refusal(model.config, family, widths) is None)  # the present ones are


def _target(model: PreTrainedModel) -> Target:
    return Target(describe(model).num_layers, Widths.of(model.config, family_of(model)))


def resized(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """The model of another size, without weights; which layers stay does not matter here."""
    config = config_of_depth(describe(model), list(range(target.depth)))
    return skeleton(config_of_widths(config, family_of(model), target.widths))


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

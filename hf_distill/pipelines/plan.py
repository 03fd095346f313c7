"""The steps of a pipeline, each with its own settings."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.pipelines.arguments import DISTIL, PRUNE, CompressConfig, importance_of
from hf_distill.students import PruneSpec, prune_steps
from hf_distill.students.families import family_of
from hf_distill.students.importance import DEFAULT, check_methods
from hf_distill.students.resolve import target_of
from hf_distill.students.widths import Widths


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        kind: P, KD or Q.
        args: The settings of the pipeline, with what this step cuts, or the seed it trains with.
    """

    kind: str
    args: CompressConfig


def plan(args: CompressConfig, config: PreTrainedConfig) -> list[Step]:
    """The steps of `args.order`, where P is as many cuts as `args.steps` asks for, with KD between them.

    Every KD draws its rows with a seed of its own: with one seed all of them would train on the same ones.

    Args:
        args: The settings.
        config: Of the model that is compressed; no weight is needed.

    Raises:
        ValueError: The model cannot be cut as it is asked for, or no cut can be guided.
    """
    steps: list[Step] = []
    for kind in args.kinds:
        if kind == PRUNE:
            for number, spec in enumerate(_cuts(args, config)):
                steps += [_distillation(args, steps)] if number else []
                guided = args.guided and bool(steps or args.adapt_teacher)
                steps.append(Step(PRUNE, _changed(args, prune=spec.to_dict(), guided=guided)))
        else:
            steps.append(_distillation(args, steps) if kind == DISTIL else Step(kind, args))
    if args.guided and not any(step.kind == PRUNE and step.args.guided for step in steps):
        raise ValueError(
            f"`guided` is True, but with `order` {args.order!r} and `steps` {args.steps} nothing is cut but the "
            "teacher itself, whose KL from the teacher is 0; cut in `steps`, or leave `guided` out."
        )
    return steps


def _cuts(args: CompressConfig, config: PreTrainedConfig) -> list[PruneSpec]:
    """What is cut each time."""
    return [args.spec] if args.steps == 1 else prune_steps(config, args.spec, args.steps or None)


def _distillation(args: CompressConfig, before: list[Step]) -> Step:
    number = sum(step.kind == DISTIL for step in before)
    data_seed = None if args.data_seed is None else args.data_seed + number
    return Step(DISTIL, _changed(args, seed=args.seed + number, data_seed=data_seed))


def _changed(args: CompressConfig, **values: object) -> CompressConfig:
    """A copy with other values, which are not checked again: `__post_init__` of the trainer's arguments is costly."""
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def methods_of(args: CompressConfig, model: PreTrainedModel) -> dict[str, str]:
    """How the kinds of units that are cut from a model are scored.

    Args:
        args: Of the step.
        model: The one that is cut; it needs no weights.

    Raises:
        ValueError: A kind is cut and not scored, or none by a method that the teacher can guide.
    """
    cut, known = _cut_kinds(args, model), importance_of(args)
    if missing := sorted(cut - known.keys()):
        raise ValueError(
            f"`importance` is {known}, but `prune` cuts {missing} too; add how they are scored, for example "
            f"{ ({kind: DEFAULT[kind] for kind in missing}) }."
        )
    methods = {kind: method for kind, method in known.items() if kind in cut}
    if args.guided and methods:
        check_methods(methods, model, name="importance")  # any model stands for the teacher here
    return methods


def _cut_kinds(args: CompressConfig, model: PreTrainedModel) -> set[str]:
    """The kinds of units that a spec cuts, of those that have scores: layers given by number need none."""
    target, family = target_of(args.spec, model), family_of(model)
    before, after = Widths.of(model.config, family), target.widths
    kinds = {
        "mlp": before.neurons != after.neurons,
        "heads": (before.heads, before.kv_heads) != (after.heads, after.kv_heads),
        "hidden": before.hidden != after.hidden,
        "layers": target.depth != model.config.num_hidden_layers and args.spec.drop_layers is None,
    }
    return {kind for kind, cut in kinds.items() if cut}

"""`estimate_importance`: how much each neuron, head, channel and layer of a model matters, measured on text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_distill.anatomy import Anatomy, describe
from hf_distill.attention_anatomy import head_shape
from hf_distill.students.calibration import CalibrationLoss, left_as_it_was
from hf_distill.students.families import Family, family_of
from hf_distill.students.measuring import LeaveOneOut, Walk
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.statistics import BlockInfluence, FirstOrder, MeanActivation, Statistic, Units
from hf_distill.students.surgery import check_readable
from hf_distill.students.weight_norms import weight_norms


GRADIENT_METHODS = ("taylor", "fisher")
CHANNEL_METHODS = ("activation", *GRADIENT_METHODS, "weight")
METHODS = dict.fromkeys(("mlp", "heads", "hidden"), CHANNEL_METHODS) | {"layers": ("block_influence", "leave_one_out")}
LOSS_METHODS = (*GRADIENT_METHODS, "leave_one_out")
# Of SmolLM2-135M, 9 heads cut to 6 without training: perplexity 175 and 186 by fisher, 182 and 221 by taylor, 963 and
# 1172 by activation, 235 and 424 at random. For neurons the three are alike, and activation needs no backward pass.
DEFAULT = {"mlp": "activation", "heads": "fisher", "hidden": "activation", "layers": "block_influence"}
# Nats per token: a student this near to its teacher is its teacher, and the rest is rounding.
SAME_MODEL = 1e-6


def estimate_importance(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    methods: Mapping[str, str] = DEFAULT,
    teacher: nn.Module | None = None,
    max_tokens: int | None = None,
    show_progress: bool = True,
) -> ImportanceScores:
    """Score the units of a model on calibration text, for `prune`: the higher, the more it loses without the unit.

    Methods of `mlp` (neurons), `heads` and `hidden` (channels of the residual stream):

    - `activation`: the mean of |a| over the tokens of a sequence, squares of it added up over sequences, as Minitron
      (arXiv 2407.14679). a is what enters the down projection, what enters the output projection (channels of a head
      by their L2 norm), or what leaves the norms (added up over norms). For heads the next two were far better, and
      `fisher` is their default: it needs a backward pass, which other kinds do not.
    - `taylor`: |sum of a * dL/da| of each sequence, the mean over sequences, with the true gradient of the loss
      (arXiv 1906.10771). `fisher`: its square instead (arXiv 2204.09656).
    - `weight`: the L2 norm of the unit's weights, no text needed: what `prune` takes without scores.

    Methods of `layers`: `block_influence`, 1 - cos of what enters a layer and what leaves it (arXiv 2403.03853), and
    `leave_one_out`, the increase of the loss, in nats per label, when the layer is left out: a forward pass each.

    The loss is cross-entropy on `labels` (without labels on all real tokens of a causal model), or, with a teacher,
    the forward KL from it. Every statistic is that of whole sequences, so it does not matter how they are put into
    batches; padding never counts. Scores are added up in fp32. The model, its gradients, modes and hooks, and the
    random generators are left as they were, also where it fails.

    With `teacher` the scores say what the student loses of its teacher. A student that still is its teacher has the
    least possible KL, where every gradient is 0: score the first cut by cross-entropy, or by activations.

    Args:
        model: What will be pruned; a family that `prune` knows, without adapters and not quantised.
        dataloader: Batches of `input_ids` `[B, S]`, `attention_mask`, `labels` and so on, as for the model.
        methods: By kind of unit; kinds that are left out are not scored.
        teacher: Guides the methods that have a loss; a model of the same task and vocabulary.
        max_tokens: Stop after the batch in which so many real tokens have been seen.
        show_progress: Whether to show a bar.

    Returns:
        Scores on the CPU in fp32, with what they were made of.

    Raises:
        ValueError: The model is quantised, has adapters or is sharded; a kind or method is unknown or not one of this
            family's; there is no text or no label; a teacher is given that no method would ask; or scores vanish
            because the student is its teacher.

    Example:
        >>> scores = estimate_importance(model, DataLoader(rows, batch_size=8, collate_fn=collator))
        >>> scores.save("outputs/importance")
    """
    methods = check_methods(methods, teacher)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` is {max_tokens}; expected a number >= 1, or None for all of `dataloader`.")
    parts, family = describe(model), family_of(model)
    check_readable(model, "estimate_importance")
    _check_family(family, methods)
    heard = {kind: method for kind, method in methods.items() if method not in ("weight", "leave_one_out")}
    statistics = {kind: _statistic(parts, family, kind, method) for kind, method in heard.items()}
    loss = CalibrationLoss(parts.model, teacher) if set(methods.values()) & set(LOSS_METHODS) else None
    left_out = LeaveOneOut(parts.layers, loss) if loss and methods.get("layers") == "leave_one_out" else None
    needs_gradient = any(statistic.needs_gradient for statistic in statistics.values())
    walk = Walk(parts, list(statistics.values()), loss if needs_gradient else None, left_out)
    norms = weight_norms(model) if "weight" in methods.values() else ImportanceScores()
    scores = {kind: getattr(norms, kind) for kind, method in methods.items() if method == "weight"}
    if statistics or left_out:
        with left_as_it_was(parts.model, *([] if teacher is None else [teacher])):
            walk.over(dataloader, max_tokens, show_progress)
        _check_walk(walk, needs_gradient, left_out)
    scores |= {kind: statistic.scores() for kind, statistic in statistics.items()}
    if left_out is not None:
        scores["layers"] = left_out.scores()
    if "hidden" in scores:
        scores["hidden"] = scores["hidden"].flatten()  # one row: all layers share the channels
    _check_scores(scores, methods, walk, guided=teacher is not None)
    return ImportanceScores(**scores, provenance=_provenance(methods, walk, loss, norms))


def _statistic(parts: Anatomy, family: Family, kind: str, method: str) -> Statistic:
    """What measures units of one kind by a method that listens to the model."""
    if kind == "layers":
        return BlockInfluence(parts.layers)
    if kind == "mlp":
        units = Units([[family.mlp_output(layer)] for layer in parts.layers])
    elif kind == "heads":
        width = head_shape(parts.model.config)["head_dim"]
        units = Units([[family.attention_output(layer)] for layer in parts.layers], width=width)
    else:
        norms = [norm for layer in parts.layers for norm in family.norms(layer)]
        units = Units([[*norms, parts.final_norm]], reads_input=False)
    return MeanActivation(units) if method == "activation" else FirstOrder(units, method)


def _check_family(family: Family, methods: Mapping[str, str]) -> None:
    if not family.cuts_all and methods.keys() & {"heads", "hidden"}:
        left = {kind: method for kind, method in (DEFAULT | dict(methods)).items() if kind in ("mlp", "layers")}
        raise ValueError(
            f"`methods` has {sorted(methods)}, but of {family.name!r} only neurons and layers can be cut; pass "
            f"`methods={left}`."
        )


def check_methods(
    methods: Mapping[str, str], teacher: nn.Module | None = None, name: str = "methods"
) -> dict[str, str]:
    """Return the methods; `name` is what messages call them.

    Raises:
        ValueError: A kind or method is unknown, or none would ask the teacher.
    """
    unknown = sorted(methods.keys() - METHODS.keys())
    if unknown or not methods:
        raise ValueError(f"`{name}` is {dict(methods)}; expected some of {list(METHODS)}, for example {DEFAULT}.")
    for kind, method in methods.items():
        if method not in METHODS[kind]:
            raise ValueError(f"`{name}` has {kind!r}: {method!r}; expected one of {list(METHODS[kind])}.")
    if teacher is not None and not set(methods.values()) & set(LOSS_METHODS):
        raise ValueError(
            f"`teacher` would be ignored: none of the methods {dict(methods)} has a loss; take 'taylor' or 'fisher' "
            "for neurons, heads or channels, 'leave_one_out' for layers, or leave the teacher out."
        )
    return dict(methods)


def _check_walk(walk: Walk, needs_gradient: bool, left_out: LeaveOneOut | None) -> None:
    if walk.tokens == 0:
        raise ValueError("`dataloader` gave no token; expected some batches of text, for example of 128 sequences.")
    if (needs_gradient and walk.labels == 0) or (left_out is not None and left_out.labels == 0):
        raise ValueError(
            f"`dataloader` gave {walk.tokens} tokens and no label (every label is -100), so there is no loss; look at "
            "the prompt mask, or leave `labels` out to take all tokens."
        )


def _check_scores(scores: Mapping[str, Tensor], methods: Mapping[str, str], walk: Walk, *, guided: bool) -> None:
    broken = sorted(kind for kind, values in scores.items() if not values.isfinite().all())
    if broken:
        raise ValueError(
            f"The scores of {broken} hold infinities or NaN: the loss or its gradient overflows in this precision; "
            'load the model with `dtype="bfloat16"` or "float32".'
        )
    first_order = [scores[kind] for kind, method in methods.items() if method in GRADIENT_METHODS]
    if not guided or not first_order:
        return
    if walk.loss_sum / walk.labels < SAME_MODEL or all(not values.any() for values in first_order):
        raise ValueError(
            f"`teacher` says the same as `model` (KL {walk.loss_sum / walk.labels:.1e} nats per token), so the KL is "
            "at its minimum and its gradient is 0: 'taylor' and 'fisher' would score rounding. For the first cut "
            "leave `teacher` out (cross-entropy) or take 'activation'; guide by the teacher from the second cut on."
        )


def _provenance(
    methods: Mapping[str, str], walk: Walk, loss: CalibrationLoss | None, norms: ImportanceScores
) -> dict[str, str]:
    """How each field was found, in words."""
    text = f"over {walk.tokens} tokens of {walk.sequences} sequences"
    found = {}
    for kind, method in methods.items():
        of_loss = f" of {loss.name}" if loss and method in LOSS_METHODS else ""
        found[kind] = norms.provenance[kind] if method == "weight" else f"{method}{of_loss} {text}"
    return found

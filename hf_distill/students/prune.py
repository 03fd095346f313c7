"""Structural pruning: a smaller plain model from the parts of a model that matter."""

from __future__ import annotations

import warnings

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.anatomy import describe
from hf_distill.students.families import Family, family_of
from hf_distill.students.report import PruneReport
from hf_distill.students.resolve import check_cuts, concrete, target_of
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.selection import Kept, select
from hf_distill.students.spec import PruneSpec
from hf_distill.students.surgery import Cut, check_readable, config_of_depth, origin, rebuild
from hf_distill.students.weight_norms import weight_norms
from hf_distill.students.widths import Widths, config_of_widths


BY_POSITION = "position: evenly spaced, without data"


def prune(
    model: PreTrainedModel, spec: PruneSpec, scores: ImportanceScores | None = None
) -> tuple[PreTrainedModel, PruneReport]:
    """Cut layers, MLP neurons, attention heads and channels out of a model (as Minitron, arXiv:2407.14679).

    The result is a plain model of the same class that computes what the model would with the rest masked: neurons and
    heads set to zero, layers skipped, and channels removed from the residual stream and from the mean that RMSNorm
    divides by. The width of a head never changes. The model is left as it is.

    Gemma multiplies its embeddings by the square root of the hidden size, which is less after the cut. The weights of
    the embedding are enlarged to make up for it; where they are also the head, the final norm is reduced as much. So
    the stream and the logits are those of the masked model, and only the last hidden state, after the final norm, is
    smaller, by sqrt(width after / width before).

    `config.hf_distill` of the result says which layers, and which channels, are the model's: objectives on hidden
    states compare these.

    Args:
        model: A model with real weights of a family in `hf_distill.students.families`: not quantised, without
            adapters, not sharded or offloaded.
        spec: The size of the result.
        scores: What matters, measured on this model. None: weight norms decide, and layers are evenly spaced; this is
            warned of and stands in the report, and is a poor guide for wide cuts.

    Returns:
        The result, in eval mode on the model's device in its dtype, and what was cut.

    Raises:
        ValueError: The family is unknown, the spec cannot be met, the scores do not fit, or the weights cannot be
            copied; nothing was changed.

    Example:
        >>> student, report = prune(teacher, PruneSpec(params_ratio=0.7), scores)
        >>> student.save_pretrained("student")
    """
    family = family_of(model)
    check_readable(model, "prune")
    parts = describe(model)
    target, before = target_of(spec, model), Widths.of(parts.model.config, family)
    check_cuts(spec, model, target)
    if scores is None:
        scores = weight_norms(model)
        warnings.warn(
            "`prune` was given no scores: weight norms and the position of layers decide what stays. Measure scores "
            "on some text for a better student.",
            stacklevel=2,
        )
    kept = select(spec, target, parts.num_layers, before, scores)
    config = config_of_widths(config_of_depth(parts, kept.layers), family, target.widths)
    if kept.channels is not None:
        config.hf_distill = origin(kept.layers, parts.num_layers, kept.channels.tolist(), before.hidden)
    config.validate()
    student = rebuild(parts, config, kept.layers, cut=_cutter(parts.model, family, kept, target.widths))
    return student, _report(
        concrete(spec, target), kept, parts.model, student, _provenance(spec, kept, parts.num_layers, scores)
    )


def _cutter(model: PreTrainedModel, family: Family, kept: Kept, after: Widths) -> Cut:
    """What is kept of a tensor."""
    shrinkage = (after.hidden / kept.before.hidden) ** 0.5 if family.scales_embeddings else 1.0
    tied = model.config.tie_word_embeddings
    final_norm = describe(model).final_norm

    def cut(path: str, kind: str, position: int | None, tensor: Tensor) -> Tensor:
        in_layer = position is not None
        for dimension, axis in enumerate(family.axes(path, kind, in_layer=in_layer)):
            index = kept.index(axis, position or 0)
            if index is not None:
                tensor = tensor.index_select(dimension, index.to(tensor.device))
        if shrinkage == 1.0 or in_layer:
            return tensor
        module = model.get_submodule(path)
        if module is model.get_input_embeddings() or (tied and module is model.get_output_embeddings()):
            return tensor / shrinkage
        if tied and module is final_norm:
            return (1 + tensor.float()) * shrinkage - 1  # stored as the distance from 1
        return tensor

    return cut


def _provenance(spec: PruneSpec, kept: Kept, depth: int, scores: ImportanceScores) -> dict[str, str]:
    """How each choice was made, of what was cut."""
    cut = {"mlp": kept.neurons, "heads": kept.heads, "hidden": kept.channels}
    how = {name: scores.provenance.get(name, "scores given") for name, chosen in cut.items() if chosen is not None}
    if len(kept.layers) == depth:
        return how
    if spec.drop_layers is not None:
        how["layers"] = "given by number"
    elif scores.layers is not None:
        how["layers"] = scores.provenance.get("layers", "scores given")
    else:
        how["layers"] = BY_POSITION
    return how


def _report(
    spec: PruneSpec, kept: Kept, model: PreTrainedModel, student: PreTrainedModel, provenance: dict[str, str]
) -> PruneReport:
    def listed(rows: list[Tensor] | None) -> tuple[tuple[int, ...], ...] | None:
        return None if rows is None else tuple(tuple(row.tolist()) for row in rows)

    return PruneReport(
        spec=spec,
        num_layers_before=describe(model).num_layers,
        hidden_size_before=kept.before.hidden,
        layers=tuple(kept.layers),
        neurons=listed(kept.neurons),
        heads=listed(kept.heads),
        kv_heads=listed(kept.kv_heads),
        channels=None if kept.channels is None else tuple(kept.channels.tolist()),
        parameters_before=_parameters(model),
        parameters_after=_parameters(student),
        bytes_before=_bytes(model),
        bytes_after=_bytes(student),
        provenance=provenance,
    )


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module) -> int:
    """Bytes of the tensors that are saved, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())

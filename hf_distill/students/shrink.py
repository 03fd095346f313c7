"""Depth: a student made of a teacher's own layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_distill.anatomy import describe


# Config attributes that hold one entry for each layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def choose_layers(total: int, keep: int, keep_first: int | None = None, keep_last: int | None = None) -> list[int]:
    """Choose `keep` of `total` layers, evenly spaced between the first and the last ones.

    Args:
        total: Depth of the teacher.
        keep: Depth of the student.
        keep_first: How many layers to take in one block from the start (default: 1).
        keep_last: How many to take in one block from the end (default: 1, where `keep` has room for it).

    Returns:
        Indices into the teacher's layers, increasing.

    Raises:
        ValueError: The counts do not fit into each other.

    Example:
        >>> choose_layers(12, 4)
        [0, 4, 7, 11]
        >>> choose_layers(12, 6, keep_first=2, keep_last=2)
        [0, 1, 4, 7, 10, 11]
    """
    if not 1 <= keep <= total:
        raise ValueError(f"Cannot keep {keep} of {total} layers: expected a number from 1 to {total}.")
    if keep_first is None:
        keep_first = min(1, keep - (keep_last or 0))
    if keep_last is None:
        keep_last = min(1, keep - keep_first)
    if min(keep_first, keep_last) < 0 or keep_first + keep_last > keep:
        raise ValueError(
            f"keep_first={keep_first} and keep_last={keep_last} must not be negative and must add up to at most "
            f"keep={keep}."
        )
    start, end, between = keep_first - 1, total - keep_last, keep - keep_first - keep_last
    # Halves are rounded up in integers: round() would send 0.5 and 1.5 to even neighbours and space unevenly.
    spread = [start + (2 * i * (end - start) + between + 1) // (2 * (between + 1)) for i in range(1, between + 1)]
    return [*range(keep_first), *spread, *range(end, total)]


def shrink(
    teacher: PreTrainedModel,
    num_hidden_layers: int | None = None,
    layers: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build a student of the same class from copies of some of the teacher's layers.

    Embeddings, final norm and head are copied too. The student's config is that of its depth, with
    `hf_distill = {"kept_layers": [...], "teacher_num_hidden_layers": L}` saying where the layers come from. The
    teacher is left as it is, and the student is in eval mode on the teacher's device, as after `from_pretrained`.
    Starting from the teacher's own layers is the initialisation of DistilBERT (Sanh et al., 2019, arXiv:1910.01108).

    Args:
        teacher: A model with real weights: not quantised, without adapters, not sharded or offloaded.
        num_hidden_layers: Depth of the student; the layers are chosen by `choose_layers`.
        layers: The layers to keep instead, increasing.
        dtype: Of the student; the teacher's where not given.

    Returns:
        A model that `save_pretrained` and `from_pretrained` treat like any other.

    Raises:
        ValueError: Both or neither of the depth and the layers are given, layers are out of range, repeated or not
            increasing, or the teacher's layers cannot be copied or moved.

    Example:
        >>> student = shrink(teacher, num_hidden_layers=15)
        >>> student = shrink(teacher, layers=[0, 1, 2, 27, 28, 29])
    """
    _check_readable(teacher)
    source = describe(teacher)
    kept = _kept_layers(source.num_layers, num_hidden_layers, layers)
    config = _config_of_depth(source.model.config, kept, source.num_layers)
    # Uninitialised memory is enough: every weight is copied below. This also leaves the random state alone.
    with no_init_weights(), torch.device(source.model.device):
        student = type(source.model)._from_config(config, dtype=dtype or source.model.dtype)
    student.tie_weights()
    student_layers = describe(student).layers
    _check_layers_move(source.layers, student_layers, kept)
    _copy_weights(source.model, student, _path_of(source.model, source.layers), kept)
    if getattr(source.model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(source.model.generation_config)
    return student.eval()


def _check_readable(teacher: nn.Module) -> None:
    if getattr(teacher, "is_quantized", False):
        raise ValueError(
            "The teacher is quantised, and layers cut from it could not be trained. Load it once without quantisation "
            '(`from_pretrained(name, dtype="bfloat16")`), call `shrink` on that model and train against the '
            "quantised teacher."
        )
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in teacher.modules()):
        raise ValueError("The teacher has adapters. Merge them first: `teacher = teacher.merge_and_unload()`.")
    for name, parameter in teacher.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
            raise ValueError(
                f"The teacher's weight {name!r} is offloaded or sharded. Call `shrink` on a model loaded on one "
                "device, before it is prepared for training."
            )


def _kept_layers(total: int, depth: int | None, layers: Sequence[int] | None) -> list[int]:
    """The layers to keep, checked."""
    if (depth is None) == (layers is None):
        raise ValueError(
            f"Give either `num_hidden_layers` or `layers`, got num_hidden_layers={depth} and layers={layers}. "
            f"For example `shrink(teacher, num_hidden_layers={max(total // 2, 1)})`."
        )
    if depth is not None:
        return choose_layers(total, depth)
    kept = list(layers or [])
    if not kept or any(not 0 <= index < total for index in kept):
        raise ValueError(f"`layers` must be indices from 0 to {total - 1}, at least one; got {kept}.")
    if kept != sorted(set(kept)):
        raise ValueError(f"`layers` must be increasing without repetition; got {kept}. Use {sorted(set(kept))}.")
    return kept


def _config_of_depth(config: PreTrainedConfig, kept: list[int], total: int) -> PreTrainedConfig:
    """A copy of the config for the kept layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])
    if hasattr(config, "max_window_layers"):  # Qwen: layers from this one on slide
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    config.hf_distill = {"kept_layers": kept, "teacher_num_hidden_layers": total}
    return config


def _check_layers_move(theirs: nn.ModuleList, ours: nn.ModuleList, kept: list[int]) -> None:
    """Make sure that a layer built at its new depth computes what it computed at the old one.

    Window, position encoding, scale and the like follow from the depth in some families; what the config cannot
    say about a moved layer shows as a difference in the settings that its modules hold.
    """
    for position, index in enumerate(kept):
        moved = dict(ours[position].named_modules())
        for name, module in theirs[index].named_modules():
            if isinstance(module, nn.Dropout):  # switched off by some trainers
                continue
            settings = vars(moved.get(name, nn.Module()))
            for key, value in vars(module).items():
                if key in ("layer_idx", "training", "gradient_checkpointing") or key.startswith("_"):
                    continue
                if isinstance(value, (bool, int, float, str)) and settings.get(key) != value:
                    raise ValueError(
                        f"Layer {index} of the teacher has {name or 'the layer'}.{key}={value}, but at position "
                        f"{position} of the student it would be {settings.get(key)}: in this family it depends on the "
                        "depth. Keep layers for which both agree, for example the first ones."
                    )


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _copy_weights(teacher: nn.Module, student: nn.Module, layers: str, kept: list[int]) -> None:
    """Copy every tensor of the student's state from its place in the teacher's."""
    state, prefix = teacher.state_dict(), f"{layers}."
    unused = set(state)
    for name, tensor in student.state_dict().items():
        origin = name
        if name.startswith(prefix):
            position, _, rest = name.removeprefix(prefix).partition(".")
            origin = f"{prefix}{kept[int(position)]}.{rest}"
        if origin not in state or state[origin].shape != tensor.shape:
            raise ValueError(
                f"The teacher has no weight {origin!r} of shape {list(tensor.shape)}, which a "
                f"{type(student).__name__} built from its config has: the model was changed after it was built."
            )
        tensor.copy_(state[origin])
        unused.discard(origin)
    dropped = {f"{prefix}{index}." for index in range(len(teacher.get_submodule(layers)))}
    dropped -= {f"{prefix}{index}." for index in kept}
    left = sorted(name for name in unused if not name.startswith(tuple(dropped)))
    if left:
        raise ValueError(
            f"The teacher has weights with no place in a {type(student).__name__} built from its config: {left[:3]}; "
            "the model was changed after it was built."
        )

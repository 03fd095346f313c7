"""From a model to a smaller one of the same class: what `shrink` and `prune` have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_distill.anatomy import Anatomy, describe


# Config attributes that hold one entry for each layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
# What is kept of a tensor, given the path of its module (in its layer, or in the model), its name there, the
# layer's position in the student (None outside of layers), and the teacher's tensor.
Cut = Callable[[str, str, int | None, Tensor], Tensor]


def check_readable(teacher: nn.Module, caller: str) -> None:
    """Make sure that a model's weights can be copied.

    Raises:
        ValueError: It is quantised, has adapters, or is offloaded or sharded; `caller` is named in the message.
    """
    if getattr(teacher, "is_quantized", False):
        raise ValueError(
            "The teacher is quantised, and layers cut from it could not be trained. Load it once without quantisation "
            f'(`from_pretrained(name, dtype="bfloat16")`), call `{caller}` on that model and train against the '
            "quantised teacher."
        )
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in teacher.modules()):
        raise ValueError("The teacher has adapters. Merge them first: `teacher = teacher.merge_and_unload()`.")
    for name, parameter in teacher.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
            raise ValueError(
                f"The teacher's weight {name!r} is offloaded or sharded. Call `{caller}` on a model loaded on one "
                "device, before it is prepared for training."
            )


def origin(
    layers: Sequence[int], depth: int, channels: Sequence[int] | None = None, width: int | None = None
) -> dict[str, Any]:
    """What `config.hf_distill` of a student says of where it was cut from; `shape_of` reads it.

    Args:
        layers: The layers that it is made of.
        depth: How many there were.
        channels: The channels of the residual stream, where not all of them stay.
        width: How many there were.
    """
    record: dict[str, Any] = {"kept_layers": list(layers), "teacher_num_hidden_layers": depth}
    return record if channels is None else record | {"kept_channels": list(channels), "teacher_hidden_size": width}


def config_of_depth(source: Anatomy, kept: list[int]) -> PreTrainedConfig:
    """A copy of a model's config for some of its layers, which says where they come from."""
    config = copy.deepcopy(source.model.config)
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])
    if hasattr(config, "max_window_layers"):  # Qwen: layers from this one on slide
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    config.hf_distill = origin(kept, source.num_layers)
    return config


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module in a model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def rebuild(
    source: Anatomy,
    config: PreTrainedConfig,
    kept: list[int],
    *,
    dtype: torch.dtype | None = None,
    cut: Cut = lambda path, kind, position, tensor: tensor,
) -> PreTrainedModel:
    """Build a model from a config and fill it with what is kept of the source's weights.

    The source is left as it is. The result is in eval mode on its device, with its generation config.

    Args:
        source: A model whose weights can be read; see `check_readable`.
        config: Of the result; `config_of_depth(source, kept)`, with other widths where `cut` cuts them.
        kept: The source's layers that the result is made of, increasing.
        dtype: Of the result; the source's where not given.
        cut: What is kept of a tensor.

    Raises:
        ValueError: Layers cannot move to another depth, or weights have no place in the result.
    """
    model_class = type(source.model)
    with torch.device("meta"):  # whatever is wrong with a config shows before memory is taken
        moved = describe(model_class._from_config(config_of_depth(source, kept))).layers
        model_class._from_config(copy.deepcopy(config))
    _check_layers_move(source.layers, moved, kept)
    # Uninitialised memory is enough: every weight is copied below. This also leaves the random state alone.
    with no_init_weights(), torch.device(source.model.device):
        student = model_class._from_config(config, dtype=dtype or source.model.dtype)
    student.tie_weights()
    _copy_weights(source.model, student, path_of(source.model, source.layers), kept, cut)
    if getattr(source.model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(source.model.generation_config)
    return student.eval()


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


def _copy_weights(teacher: nn.Module, student: nn.Module, layers: str, kept: list[int], cut: Cut) -> None:
    """Copy every tensor of the student's state from its place in the teacher's."""
    state, prefix = teacher.state_dict(), f"{layers}."
    unused = set(state)
    for name, tensor in student.state_dict().items():
        origin, position, rest = name, None, name
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            position = int(number)
            origin = f"{prefix}{kept[position]}.{rest}"
        path, _, kind = rest.rpartition(".")
        remains = cut(path, kind, position, state[origin]) if origin in state else None
        if remains is None or remains.shape != tensor.shape:
            raise ValueError(
                f"The teacher has no weight {origin!r} to fill the shape {list(tensor.shape)}, which a "
                f"{type(student).__name__} built from its config has: the model was changed after it was built."
            )
        tensor.copy_(remains)
        unused.discard(origin)
    dropped = {f"{prefix}{index}." for index in range(len(teacher.get_submodule(layers)))}
    dropped -= {f"{prefix}{index}." for index in kept}
    left = sorted(name for name in unused if not name.startswith(tuple(dropped)))
    if left:
        raise ValueError(
            f"The teacher has weights with no place in a {type(student).__name__} built from its config: {left[:3]}; "
            "the model was changed after it was built."
        )

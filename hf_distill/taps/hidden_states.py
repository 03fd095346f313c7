"""Taps of hidden states between layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_distill.anatomy import Anatomy, describe
from hf_distill.taps.limits import refuse_reentrant_checkpoints
from hf_distill.taps.recorder import Recorder


class HiddenStatesTap(Recorder[Tensor]):
    """Hidden states of one forward call, `[B, S, H]` by layer."""

    opened_by = "tap_hidden_states"

    def _hear(self, layer: int, output: Any) -> None:
        if self._hears():
            self._record(layer, output if isinstance(output, Tensor) else output[0])


# What records the outputs of a module (or, for the embeddings, its input) under the tap that is open there; see
# `last_hidden._open_taps`.
Recorders = WeakKeyDictionary[nn.Module, Callable[[Any], None]]
_open_states: Recorders = WeakKeyDictionary()
_open_embeddings: Recorders = WeakKeyDictionary()


@torch.compiler.disable
def _record_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if module in _open_states:
        _open_states[module](output)


@torch.compiler.disable
def _record_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if module in _open_embeddings:
        _open_embeddings[module](args[0] if args else kwargs["hidden_states"])


@contextmanager
def tap_hidden_states(model: nn.Module, layers: Collection[int]) -> Iterator[HiddenStatesTap]:
    """Record the hidden states of some layers in the model's next forward call, and no others.

    Layers count as in transformers' `hidden_states`: 0 is what enters the first layer, k the output of layer k, and
    the last one is after the final norm. Nothing stays in the model when the context is left; the states live as long
    as the tap. Exact under gradient checkpointing.

    Args:
        model: Any model that `describe` knows, wrapped or not.
        layers: From 0 to the number of layers. Without any, nothing is asked of the model.

    Raises:
        ValueError: A layer does not exist, or gradient checkpointing is reentrant, which would cut the graph at every
            layer: the loss would be right and its gradient lost.
        RuntimeError: The model runs more than once inside the context, or has an open tap on one of the layers.
    """
    if not layers:
        yield HiddenStatesTap(())
        return
    parts = describe(model)
    if outside := sorted(layer for layer in layers if not 0 <= layer <= parts.num_layers):
        raise ValueError(f"`layers` holds {outside}; expected layers from 0 to {parts.num_layers}.")
    refuse_reentrant_checkpoints(parts)
    tap, handles, opened = HiddenStatesTap(layers), [], []
    try:
        for layer in sorted(set(layers)):
            module, registry = _place_of(parts, layer)
            if module in registry:
                raise RuntimeError(f"Layer {layer} has an open `tap_hidden_states` already: leave it first.")
            registry[module] = partial(tap._hear, layer)
            opened.append((registry, module))
            if registry is _open_embeddings:
                handles.append(module.register_forward_pre_hook(_record_input, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_record_output))
        yield tap
    finally:
        for registry, module in opened:
            del registry[module]
        for handle in handles:
            handle.remove()


def _place_of(parts: Anatomy, layer: int) -> tuple[nn.Module, Recorders]:
    """The module that hidden states of a layer come out of (or, for the embeddings, go into), and its open taps."""
    if layer == 0:
        return parts.layers[0], _open_embeddings
    if layer == parts.num_layers and parts.final_norm is not None:
        return parts.final_norm, _open_states
    return parts.layers[layer - 1], _open_states

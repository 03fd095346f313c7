"""Context managers that capture what passes inside a model, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_distill.anatomy import Anatomy, describe, output_head


# torch.compile shares code between models of one class, and that code has the hooks that it was traced with.
COMPILED_BEFORE = (
    "If it was called and is compiled, a model of its class ran compiled without this tap: `torch.compiler.reset()`."
)


class LastHiddenTap:
    """What enters the head of one forward call."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None
        self._grad_mode = torch.is_grad_enabled()

    @property
    def hidden(self) -> Tensor:
        """The last hidden states `[B, S, H]`, part of the model's graph.

        Raises:
            RuntimeError: The model has not been called inside the context.
        """
        if self._hidden is None:
            raise RuntimeError(
                "The tap is empty: call the model inside `with tap_last_hidden(model) as tap:` first. "
                + COMPILED_BEFORE
            )
        return self._hidden

    def _hears(self) -> bool:
        """False for a pass without gradient inside a tap for training: a reference model's, for example."""
        return torch.is_grad_enabled() == self._grad_mode

    def _record(self, hidden: Tensor) -> None:
        if self._hidden is not None:
            raise RuntimeError(
                "The head ran twice inside one `tap_last_hidden`: open a tap for each forward call, and project "
                "hidden states after the context is left."
            )
        self._hidden = hidden

    def _attach_outputs(self, model: nn.Module, args: Any, output: Any) -> None:
        logits = output["logits"] if isinstance(output, Mapping) else output[0]
        if self._hidden is not None and self._hidden.requires_grad and logits.requires_grad:
            self._hidden = _WithOutputs.apply(self._hidden, logits)


class _WithOutputs(torch.autograd.Function):
    """Hidden states whose backward passes through the model's outputs as well, with a gradient of no elements.

    FSDP gathers the weights that it has resharded when a gradient arrives at the outputs of the model. The loss does
    not use them, so without this the last norm would run backward on freed memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.detach())
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        return gradient, torch.zeros_like(logits)


# The open taps by head. A compiled model keeps the hook that it was traced with, so the hook is one function that
# looks its tap up when it runs.
_open_taps: WeakKeyDictionary[nn.Module, LastHiddenTap] = WeakKeyDictionary()


@torch.compiler.disable
def _divert(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    tap = _open_taps.get(head)
    if tap is None or not tap._hears():
        return None
    hidden, *rest = args
    tap._record(hidden)
    # Of the graph, not a new tensor: DDP and FSDP look for the parameters that the outputs depend on.
    return hidden[..., :0, :], *rest


@contextmanager
def tap_last_hidden(model: nn.Module) -> Iterator[LastHiddenTap]:
    """Record what enters a language model's head in its next forward call, and skip the projection.

    The wrapped model (DDP, FSDP2, PEFT) is called as always, without `labels`; the logits that it returns have no
    positions. Hidden states are those that `resolve_head(model)` turns into logits. A compiled model must be called
    under a tap the first time: later hooks are not seen by the code compiled before.

    Example:
        >>> with tap_last_hidden(model) as tap:
        ...     model(input_ids=input_ids, attention_mask=attention_mask)
        >>> logits = resolve_head(model)(tap.hidden[:, -1])

    Args:
        model: A causal or masked language model, wrapped or not: the module that will be called.

    Raises:
        ValueError: The model has no head over the vocabulary.
        RuntimeError: The head runs more than once inside the context, or the model has an open tap already.
    """
    head = output_head(model)
    if head in _open_taps:
        raise RuntimeError("This model has an open `tap_last_hidden` already: leave it before opening another.")
    tap = LastHiddenTap()
    _open_taps[head] = tap
    handles = [head.register_forward_pre_hook(_divert), model.register_forward_hook(tap._attach_outputs)]
    try:
        yield tap
    finally:
        del _open_taps[head]
        for handle in handles:
            handle.remove()


@contextmanager
def tap_head_input(model: nn.Module) -> Iterator[LastHiddenTap]:
    """Record what would enter a language model's head in its next forward call, and change nothing.

    Unlike `tap_last_hidden` it leaves the logits, or a loss that is computed from the head's weight, to the caller.
    Passes without gradient are not recorded where the tap is opened with gradient.

    Args:
        model: A causal or masked language model, wrapped or not.

    Raises:
        ValueError: The model has no head.
        RuntimeError: The model runs more than once inside the context.
    """
    parts, tap = describe(model), LastHiddenTap()

    def of_decoder(module: nn.Module, args: Any, output: Any) -> None:
        if tap._hears():
            tap._record(output[0])

    def of_head(module: nn.Module, args: tuple[Any, ...]) -> None:
        if tap._hears():
            tap._record(args[0])

    # A causal model's head may be read as a weight instead of being called; an encoder's has a transform before it.
    if parts.task == "causal_lm":
        handle = parts.decoder.register_forward_hook(of_decoder)
    else:
        handle = output_head(model).register_forward_pre_hook(of_head)
    try:
        yield tap
    finally:
        handle.remove()


class HiddenStatesTap:
    """Hidden states of one forward call, by layer."""

    def __init__(self, layers: Collection[int]) -> None:
        self._layers = frozenset(layers)
        self._states: dict[int, Tensor] = {}
        self._grad_mode = torch.is_grad_enabled()

    @property
    def states(self) -> dict[int, Tensor]:
        """`[B, S, H]` by layer, part of the model's graph.

        Raises:
            RuntimeError: The model has not been called inside the context, or a layer did not run.
        """
        if missing := self._layers - self._states.keys():
            raise RuntimeError(
                f"The tap has nothing from layers {sorted(missing)}: call the model inside "
                f"`with tap_hidden_states(model, layers) as tap:` first. {COMPILED_BEFORE}"
            )
        return self._states

    def _record(self, layer: int, states: Any) -> None:
        if torch.is_grad_enabled() != self._grad_mode:
            return  # a reference model's pass, for example
        if layer in self._states:
            raise RuntimeError("The model ran twice inside one `tap_hidden_states`: open a tap for each forward call.")
        self._states[layer] = states if isinstance(states, Tensor) else states[0]


# What records the outputs of a module (or, for the embeddings, its input) under the tap that is open there; see
# `_open_taps`.
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
    _refuse_reentrant_checkpoints(parts)
    tap, handles, opened = HiddenStatesTap(layers), [], []
    try:
        for layer in sorted(set(layers)):
            module, registry = _place_of(parts, layer)
            if module in registry:
                raise RuntimeError(f"Layer {layer} has an open `tap_hidden_states` already: leave it first.")
            registry[module] = partial(tap._record, layer)
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


def _refuse_reentrant_checkpoints(parts: Anatomy) -> None:
    for module in parts.model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        enabled = module.training and getattr(module, "gradient_checkpointing", False)
        if enabled and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "The model's gradient checkpointing is reentrant, which cuts the graph between layers; use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )

"""Taps of what enters the head of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_distill.anatomy import describe, output_head
from hf_distill.taps.limits import COMPILED_BEFORE


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

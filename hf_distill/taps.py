"""Context managers that capture what passes inside a model, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_distill.anatomy import output_head


class LastHiddenTap:
    """What enters the head of one forward call."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """The last hidden states `[B, S, H]`, part of the model's graph.

        Raises:
            RuntimeError: The model has not been called inside the context.
        """
        if self._hidden is None:
            raise RuntimeError("The tap is empty: call the model inside `with tap_last_hidden(model) as tap:` first.")
        return self._hidden

    def _record(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        if self._hidden is not None:
            raise RuntimeError(
                "The head ran twice inside one `tap_last_hidden`: open a tap for each forward call, and project "
                "hidden states after the context is left."
            )
        hidden, *rest = args
        self._hidden = hidden
        # Of the graph, not a new tensor: DDP and FSDP look for the parameters that the outputs depend on.
        return hidden[..., :0, :], *rest


@contextmanager
def tap_last_hidden(model: nn.Module) -> Iterator[LastHiddenTap]:
    """Record what enters a language model's head in its next forward call, and skip the projection.

    The wrapped model (DDP, FSDP2, PEFT) is called as always, without `labels`; the logits that it returns have no
    positions. Hidden states are those that `resolve_head(model)` turns into logits.

    Example:
        >>> with tap_last_hidden(model) as tap:
        ...     model(input_ids=input_ids, attention_mask=attention_mask)
        >>> logits = resolve_head(model)(tap.hidden[:, -1])

    Args:
        model: A causal or masked language model, wrapped or not.

    Raises:
        ValueError: The model has no head over the vocabulary.
        RuntimeError: The head runs more than once inside the context.
    """
    tap = LastHiddenTap()
    handle = output_head(model).register_forward_pre_hook(tap._record)
    try:
        yield tap
    finally:
        handle.remove()

"""Layers that are left out of a forward call: what enters them comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn


class SkippableLayers:
    """Lets layers be left out while it is installed; nothing is computed for those that are.

    Exact under gradient checkpointing, as long as `is_skipped` says the same when a layer is computed again.

    Args:
        layers: The transformer layers of a model, in order.
        is_skipped: Whether the layer of this index is left out; asked in every forward call.
    """

    def __init__(self, layers: Sequence[nn.Module], is_skipped: Callable[[int], bool]) -> None:
        self._layers = list(layers)
        self._is_skipped = is_skipped
        self._replaced = [vars(layer).get("forward") for layer in self._layers]  # hooks of accelerate are kept there
        for index, layer in enumerate(self._layers):
            # A hook would come too late: the layer has run by then.
            layer.forward = partial(self._forward, index, layer.forward)

    def _forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_skipped(index):
            return args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Layers of this model ({type(self._layers[index]).__name__}) return a {type(output).__name__}; "
                "only layers that return hidden states alone can be left out."
            )
        return output

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for layer, forward in zip(self._layers, self._replaced, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
        self._layers, self._replaced = [], []

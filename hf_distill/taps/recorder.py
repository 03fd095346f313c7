"""What taps of layers have in common: one forward call, recorded layer by layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Generic, TypeVar

import torch

from hf_distill.taps.limits import COMPILED_BEFORE


S = TypeVar("S")


class Recorder(Generic[S]):
    """What passed at some layers in one forward call.

    Attributes:
        opened_by: The context manager that gives it out, for messages.
    """

    opened_by: ClassVar[str]

    def __init__(self, layers: Collection[int]) -> None:
        self._layers = frozenset(layers)
        self._states: dict[int, S] = {}
        self._grad_mode = torch.is_grad_enabled()

    @property
    def states(self) -> dict[int, S]:
        """By layer, part of the model's graph.

        Raises:
            RuntimeError: The model has not been called inside the context, or a layer did not run.
        """
        if missing := self._layers - self._states.keys():
            raise RuntimeError(
                f"The tap has nothing from layers {sorted(missing)}: call the model inside `with {self.opened_by}("
                f"model, layers) as tap:` first, and name layers that run. {COMPILED_BEFORE}"
            )
        return self._states

    def _hears(self) -> bool:
        """False for a reference model's pass, and for what gradient checkpointing computes again in backward."""
        return torch.is_grad_enabled() == self._grad_mode and torch._C._current_graph_task_id() == -1

    def _record(self, layer: int, states: S) -> None:
        if layer in self._states:
            raise RuntimeError(f"The model ran twice inside one `{self.opened_by}`: open a tap for each forward call.")
        self._states[layer] = states

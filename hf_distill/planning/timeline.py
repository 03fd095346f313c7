"""Bytes of tensors while they live, seen operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


COPIES, GRADIENTS = "bf16 copies of weights", "gradients"


class Timeline(TorchDispatchMode):
    """Bytes of the storages that operations make, by the part of a step that made them.

    `stage` is set by whoever runs the step. `moments` holds, for every stage and amount of gradients (which only grows
    in backward), the fullest moment: bytes by part, the parts being stages, `COPIES` and `GRADIENTS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.moments: dict[tuple[str, int], Counter[str]] = {}
        self._live: Counter[str] = Counter()
        self._homes: dict[int, str] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._weights: dict[int, Any] = {}

    def leave_out(self, model: nn.Module) -> None:
        """Do not count a model's weights and buffers, and tell the copies of its weights from what else is made."""
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            self._weights[storage._cdata] = storage

    def count_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as such."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._live[self._homes[storage._cdata]] -= storage.nbytes()
        self._homes[storage._cdata] = GRADIENTS
        self._live[GRADIENTS] += storage.nbytes()
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            # Only the shape function of bf16 is there, but experts multiply in any precision.
            first, second, *rest = args
            out = func(first.bfloat16(), second.bfloat16(), *rest, **(kwargs or {})).to(first.dtype)
        else:
            out = func(*args, **(kwargs or {}))
        casts = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor, COPIES if casts else self.stage)
        return out

    def add(self, tensor: Tensor, part: str) -> None:
        """Count a tensor whose storage is not known yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or key in self._homes:
            return
        self._homes[key] = part
        self._references[key] = weakref.ref(storage, partial(self._drop, key, size))
        self._live[part] += size
        self._look()

    def _drop(self, key: int, size: int, _: Any) -> None:
        del self._references[key]
        self._live[self._homes.pop(key)] -= size

    def _look(self) -> None:
        moment = self.stage, self._live[GRADIENTS]
        if moment not in self.moments or self._live.total() > self.moments[moment].total():
            self.moments[moment] = self._live.copy()

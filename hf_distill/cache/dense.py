"""Encodings that keep everything: the log-probabilities of all tokens, or what the teacher's head makes them of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache.base import BaseEncoding, LogitsEncoding
from hf_distill.cache.encoding import Arrays, Columns
from hf_distill.cache.observe import Block, log_probs_of
from hf_distill.functional.head import LMHead
from hf_distill.functional.registry import unknown_name
from hf_distill.signals import Projection, Signal, identity


_FP8 = torch.float8_e4m3fn
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": _FP8,
}


@dataclass(kw_only=True)
class Dense(LogitsEncoding):
    """The log-probabilities of the whole vocabulary: for tests, and for vocabularies of a few hundred tokens.

    They can be read at any temperature.

    Args:
        dtype: "float32", which is exact, or "float16".

    Raises:
        ValueError: `dtype` is another one.
    """

    name: ClassVar[str] = "dense"

    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("float32", "float16"):
            raise unknown_name("dtype of the encoding 'dense':", self.dtype, ("float32", "float16"))

    def look(self, block: Block, labels: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """See `LogitsEncoding`."""
        every = torch.arange(self.vocab_size, device=labels.device).expand(len(labels), -1)
        log_probs = log_probs_of(block.logits(every), block.spreads[1.0].log_total)
        return {"log_probs": log_probs.to(_DTYPES[self.dtype])}

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        return {"log_probs": columns["log_probs"].numpy()}

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        return lambda numbers: {"log_probs": torch.from_numpy(arrays["log_probs"][numbers])}

    def targets(self, columns: Columns, labels: Tensor) -> Projection:
        """See `Encoding`."""
        return Projection(columns["log_probs"].float(), identity)


@dataclass(kw_only=True)
class Hidden(BaseEncoding):
    """The teacher's last hidden states, and its head once for all of them.

    They can be read at any temperature. Exact where `dtype` is that in which the teacher computes; reading makes the
    logits again, for which the head has to be in memory.

    Args:
        dtype: "bfloat16", "float16", "float32", or "float8_e4m3" with a scale for each token, which is not exact.

    Raises:
        ValueError: `dtype` is another one.
    """

    name: ClassVar[str] = "hidden"
    provides: ClassVar[frozenset[Signal]] = frozenset({Signal.LOGITS, Signal.HIDDEN_STATES})

    dtype: str = "bfloat16"
    _head: LMHead | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in _DTYPES:
            raise unknown_name("dtype of the encoding 'hidden':", self.dtype, _DTYPES)

    def observe(self, output: Projection, labels: Tensor, uniforms: Tensor | None) -> Columns:
        """See `Encoding`."""
        self.check_output(output)
        hidden, dtype = output.hidden.detach(), _DTYPES[self.dtype]
        if dtype != _FP8:
            return {"hidden": _as_integers(hidden.to(dtype)).cpu()}
        scales = hidden.float().abs().amax(1).div(torch.finfo(_FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
        return {"hidden": _as_integers((hidden.float() / scales[:, None]).to(_FP8)).cpu(), "scales": scales.cpu()}

    def pack(self, columns: Columns) -> Arrays:
        """See `Encoding`."""
        return {name: column.numpy() for name, column in columns.items()}

    def open(self, arrays: Arrays) -> Callable[[np.ndarray], Columns]:
        """See `Encoding`."""
        names = ["hidden"] + ["scales"] * (self.dtype == "float8_e4m3")
        return lambda numbers: {name: torch.from_numpy(arrays[name][numbers]) for name in names}

    def targets(self, columns: Columns, labels: Tensor) -> Projection:
        """See `Encoding`."""
        assert self._head is not None, "attach what `shared_tensors` gave"
        hidden = columns["hidden"].view(_DTYPES[self.dtype])
        if "scales" in columns:
            hidden = hidden.float() * columns["scales"][:, None]
        return Projection(hidden.to(self._head.weight.dtype), self._head)

    def shared_tensors(self, output: Projection) -> dict[str, Tensor]:
        """See `Encoding`.

        Raises:
            ValueError: The head is not a plain linear one, so that it cannot be kept.
        """
        head = output.head
        if not isinstance(head, LMHead):
            raise ValueError(
                f"The encoding 'hidden' keeps the teacher's head, and this one, a {type(head).__name__}, is not a "
                "plain linear one; load the teacher without quantisation, or use the encoding 'topk'."
            )
        softcap = torch.nan if head.softcap is None else head.softcap
        tensors = {"weight": head.weight, "scale_softcap": torch.tensor([head.scale, softcap], dtype=torch.float64)}
        if head.bias is not None:
            tensors["bias"] = head.bias
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def attach(self, shared: Mapping[str, Tensor]) -> None:
        """See `Encoding`."""
        scale, softcap = shared["scale_softcap"].tolist()
        self._head = LMHead(shared["weight"], shared.get("bias"), scale, None if softcap != softcap else softcap)


def _as_integers(values: Tensor) -> Tensor:
    """The same bits as integers, for numpy, which knows neither bfloat16 nor float8."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])

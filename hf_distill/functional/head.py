"""The plain linear language-model head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def finish_logits(logits: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Apply the scale and then the softcap, `softcap * tanh(logits / softcap)`, to projected `logits` `[n, V]`."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@dataclass(frozen=True, eq=False)
class LMHead:
    """A head that is nothing but `softcap(scale * (hidden @ weight.T + bias))`.

    Args:
        weight: `[V, H]`, floating.
        bias: `[V]` or None.
        scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: `softcap * tanh(logits / softcap)` where given (Gemma 2's `final_logit_softcapping`).

    Raises:
        ValueError: For a weight that is not a floating `[V, H]`, a bias of another size, or a softcap <= 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(
                f"`weight` must be a floating tensor [V, H], got {self.weight.dtype} {list(self.weight.shape)}. "
                "Pass a callable (hidden -> logits) for a quantised or packed head."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"`bias` must be [{self.weight.shape[0]}], got {list(self.bias.shape)}.")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"`softcap` must be positive or None, got {self.softcap}.")

    def __call__(self, hidden: Tensor) -> Tensor:
        """Project `hidden` `[n, H]` to logits `[n, V]`."""
        return finish_logits(F.linear(hidden, self.weight, self.bias), self.scale, self.softcap)

    def project_into(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Compute `hidden @ weight.T + bias` of `hidden` `[n, H]` in `out` `[n, V]`, without autograd.

        A product in new memory can take twice as long on a CPU, where each of its pages has to be made first.
        """
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def finish_(self, products: Tensor) -> None:
        """Turn `hidden @ weight.T + bias` `[n, V]` into logits in place, without autograd."""
        if self.softcap is not None:
            products.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            products.mul_(self.scale)

    def rows(self, count: int) -> LMHead:
        """The head of the first `count` tokens of the vocabulary."""
        return replace(self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

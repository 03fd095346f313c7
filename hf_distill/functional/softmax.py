"""A distribution over the vocabulary, in the buffers of its logits, with as few passes over them as its uses need."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the softmax and of all sums: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exponentials(values: Tensor, out: Tensor) -> Tensor:
    """`exp(values)` in `out`, values being 0 or less.

    On a CPU by exp2, which takes a third of the time of exp. The product with log2(e) is off by `2^-24 * abs(value)`
    in fp32, no more than the rounding of the logits themselves.
    """
    if values.device.type != "cpu":
        return torch.exp(values, out=out)
    return torch.mul(values, math.log2(math.e), out=out).exp2_()


def row_dots(a: Tensor, b: Tensor, products: Tensor | None) -> Tensor:
    """`(a * b).sum(-1)`, the products in a buffer: a vecdot would allocate theirs anew for every block."""
    return torch.mul(a, b, out=products).sum(-1)


class Softmax:
    """The softmax of a block of rows, a numerator and a denominator until something reads it token by token.

    Args:
        logits: `[n, V]`, finite; overwritten by what the exponentials were taken of, and by `log_probs` once read.
        exps: `[n, V]`, overwritten by the exponentials, and by `probs` once read.
        top: The greatest logit of each row, `[n, 1]`, where it is known.
        shifted: Whether it was subtracted already.
        products: `[n, V]`, overwritten in sums over the vocabulary; None for a new one each time.
    """

    def __init__(
        self,
        logits: Tensor,
        exps: Tensor,
        top: Tensor | None = None,
        *,
        shifted: bool = False,
        products: Tensor | None = None,
    ) -> None:
        self._products = products
        self._logits = logits if shifted else logits.sub_(logits.amax(-1, keepdim=True) if top is None else top)
        self._exps = exponentials(self._logits, exps)
        total = self._exps.sum(-1, keepdim=True)
        self._scale, self._log_total = total.reciprocal(), total.log()
        self._is_divided = self._is_normalised = False

    @classmethod
    def of(cls, log_probs: Tensor, probs: Tensor) -> Softmax:
        """A distribution that is normalised already."""
        self = cls.__new__(cls)
        self._logits, self._exps, self._products = log_probs, probs, None
        self._scale, self._log_total = probs.new_ones(len(probs), 1), probs.new_zeros(len(probs), 1)
        self._is_divided = self._is_normalised = True
        return self

    @property
    def shape(self) -> torch.Size:
        """`[n, V]`."""
        return self._logits.shape

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities, `[n, V]`."""
        if not self._is_normalised:
            self._logits.sub_(self._log_total)
            self._is_normalised = True
        return self._logits

    @property
    def probs(self) -> Tensor:
        """Probabilities, `[n, V]`."""
        if not self._is_divided:
            self._exps.mul_(self._scale)
            self._is_divided = True
        return self._exps

    @cached_property
    def entropy(self) -> Tensor:
        """In nats, `[n]`."""
        return self.cross_entropy(self)

    def log_prob(self, ids: Tensor) -> Tensor:
        """Log-probabilities of some tokens of each row, `[n, K]` for `[n, K]`."""
        known = self._logits.gather(1, ids)
        return known if self._is_normalised else known - self._log_total

    def cross_entropy(self, other: Softmax) -> Tensor:
        """`-sum p log q`, p being this and q the other, `[n]`."""
        mean = row_dots(self._exps, other._logits, self._products)
        if not self._is_divided:
            mean = mean * self._scale.squeeze(1)
        return -mean if other._is_normalised else other._log_total.squeeze(1) - mean

    def kl(self, other: Softmax) -> Tensor:
        """KL(p || q), p being this and q the other, `[n]`; exactly 0 where they are equal."""
        return self.cross_entropy(other) - self.entropy

    def add_to_(self, pull: Tensor, factor: Tensor | float) -> None:
        """Add the probabilities times a factor, a number or `[n, 1]`, to `pull` `[n, V]`."""
        if self._is_divided and not isinstance(factor, Tensor):
            pull.add_(self._exps, alpha=factor)
        else:
            pull.addcmul_(self._exps, factor if self._is_divided else self._scale * factor)

    def scaled_(self, factor: float) -> Tensor:
        """The probabilities times a factor, `[n, V]`, in their buffer: they cannot be read any more."""
        return self._exps.mul_(factor if self._is_divided else self._scale * factor)

    def at_(self, temperature: float, exps: Tensor) -> Softmax:
        """The distribution at another temperature, in the buffer of the logits and in `exps`.

        Of this one, `scaled_` and `add_to_` may still be called.
        """
        logits, shifted = self._logits.mul_(1 / temperature), not self._is_normalised
        return Softmax(logits, exps, shifted=shifted, products=self._products)

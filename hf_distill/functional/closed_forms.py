"""Value and gradient of every divergence on a tile of logits, written out: what the fused loss runs.

With q = softmax(z / T), every divergence D(q, p) has the gradient `dD/dz = (w - q * sum(w)) / T`, `w = q * dD/dq`.
So each function here returns D and adds `factor * w` to the `pull` that all terms share, and the row sums of it; one
last pass over the tile turns the pull of all terms together into the gradient. A constant in dD/dq drops out and is
left out. The log-probability of an impossible token is finite here (see `TileLoss`):
0 * log 0 = 0 needs no mask.

Arguments of every function: the tile, `pull` `[n, V]` (None where no gradient is wanted), the factor of the term, and
the divergence's own keyword arguments. It returns the value `[n]` and the row sums `[n]`, or a number where all are
equal. The definitions are in `divergences.py`; the tests compare both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_distill.functional.divergences import adaptive_weights, log_interpolated
from hf_distill.functional.softmax import Softmax, exponentials, row_dots


if TYPE_CHECKING:
    from hf_distill.functional.registry import BoundDivergence


Result = tuple[Tensor, Tensor | float]


@dataclass
class Tile:
    """Both distributions of a block of rows, `[n, V]` each, in the precision of the statistics.

    Args:
        student: Its distribution q.
        teacher: Its distribution p.
        spare: Gives the buffer `[n, V]` of a name; its contents are undefined.
        noted: What a term knows beside its value, `[n]` by name of a metric.
    """

    student: Softmax
    teacher: Softmax
    spare: Callable[[str], Tensor]
    noted: dict[str, Tensor] = field(default_factory=dict)

    @property
    def log_q(self) -> Tensor:
        """Student's log-probabilities."""
        return self.student.log_probs

    @property
    def q(self) -> Tensor:
        """Student's probabilities."""
        return self.student.probs

    @property
    def log_p(self) -> Tensor:
        """Teacher's log-probabilities."""
        return self.teacher.log_probs

    @property
    def p(self) -> Tensor:
        """Teacher's probabilities."""
        return self.teacher.probs

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """`(a * b).sum(-1)`, `[n]`."""
        return row_dots(a, b, self.spare("products"))

    @cached_property
    def gap(self) -> Tensor:
        """`log_p - log_q`."""
        return torch.sub(self.log_p, self.log_q, out=self.spare("gap"))

    @cached_property
    def forward_kl(self) -> Tensor:
        """KL(p || q), `[n]`."""
        return self.teacher.kl(self.student)

    @cached_property
    def reverse_kl(self) -> Tensor:
        """KL(q || p), `[n]`."""
        return -self.dots(self.q, self.gap)

    def evaluate(self, divergence: BoundDivergence, pull: Tensor | None, factor: float) -> Result:
        """The value of a divergence and the row sums of what it adds to `pull`."""
        return divergence.in_closed_form(self, pull, factor)

    def complete_(self, pull: Tensor, row_sum: Tensor) -> None:
        """Turn `pull` into the gradient, given the row sums of all pulls, `[n, 1]` or one number."""
        self.student.add_to_(pull, -row_sum)

    def mixture(self, share_of_p: float) -> Tensor:
        """`share_of_p * p + (1 - share_of_p) * q`, never quite 0, in the buffer "mixture"."""
        mixed = torch.lerp(self.q, self.p, share_of_p, out=self.spare("mixture"))
        return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny)


def forward_kl(tile: Tile, pull: Tensor | None, factor: float, /) -> Result:
    """KL(p || q): w = -p."""
    if pull is not None:
        tile.teacher.add_to_(pull, -factor)
    return tile.forward_kl, -factor


def soft_cross_entropy(tile: Tile, pull: Tensor | None, factor: float, /) -> Result:
    """-sum p log q: w = -p."""
    if pull is not None:
        tile.teacher.add_to_(pull, -factor)
    return tile.teacher.cross_entropy(tile.student), -factor


def reverse_kl(tile: Tile, pull: Tensor | None, factor: float, /) -> Result:
    """KL(q || p): w = q * (log q - log p)."""
    if pull is not None:
        pull.addcmul_(tile.q, tile.gap, value=-factor)
    return tile.reverse_kl, factor * tile.reverse_kl


def symmetric_kl(tile: Tile, pull: Tensor | None, factor: float, /, *, weight: float) -> Result:
    """The forward and the reverse KL, weighted."""
    forward, forward_sum = forward_kl(tile, pull, factor * weight)
    reverse, reverse_sum = reverse_kl(tile, pull, factor * (1 - weight))
    return weight * forward + (1 - weight) * reverse, forward_sum + reverse_sum


def jsd(tile: Tile, pull: Tensor | None, factor: float, /, *, beta: float) -> Result:
    """Both KL to the mixture m = beta * p + (1 - beta) * q: w = (1 - beta) * q * (log q - log m)."""
    log_m = tile.mixture(beta).log_()
    teacher = tile.dots(tile.p, torch.sub(tile.log_p, log_m, out=tile.spare("ratio")))
    log_ratio = torch.sub(tile.log_q, log_m, out=log_m)
    student = tile.dots(tile.q, log_ratio)
    if pull is not None:
        pull.addcmul_(tile.q, log_ratio, value=factor * (1 - beta))
    return beta * teacher + (1 - beta) * student, factor * (1 - beta) * student


def skew_kl(tile: Tile, pull: Tensor | None, factor: float, /, *, skew: float) -> Result:
    """KL(p || m), m = skew * p + (1 - skew) * q: w = -(1 - skew) * q * p / m."""
    mixed = tile.mixture(skew)
    row_sum: Tensor | float = 0.0
    if pull is not None:
        ratio = torch.div(tile.p, mixed, out=tile.spare("ratio"))
        pull.addcmul_(tile.q, ratio, value=-factor * (1 - skew))
        row_sum = -factor * (1 - skew) * tile.dots(tile.q, ratio)
    return tile.dots(tile.p, torch.sub(tile.log_p, mixed.log_(), out=mixed)), row_sum


def skew_reverse_kl(tile: Tile, pull: Tensor | None, factor: float, /, *, skew: float) -> Result:
    """KL(q || m), m = skew * q + (1 - skew) * p: w = q * (log q - log m - skew * q / m)."""
    mixed = tile.mixture(1 - skew)
    share = torch.div(tile.q, mixed, out=tile.spare("ratio")).mul_(skew)
    log_ratio = torch.sub(tile.log_q, mixed.log_(), out=mixed)
    value = tile.dots(tile.q, log_ratio)
    if pull is None:
        return value, 0.0
    slope = log_ratio.sub_(share)
    pull.addcmul_(tile.q, slope, value=factor)
    return value, factor * tile.dots(tile.q, slope)


def adaptive_kl(tile: Tile, pull: Tensor | None, factor: float, /, *, mass: float) -> Result:
    """The forward and the reverse KL with weights per row, which carry no gradient."""
    head, tail = adaptive_weights(tile.q, tile.p, mass)
    if pull is not None:
        pull.addcmul_(tile.p, head[:, None], value=-factor)
        pull.addcmul_(torch.mul(tile.q, tile.gap, out=tile.spare("ratio")), tail[:, None], value=-factor)
    reverse = tail * tile.reverse_kl
    return head * tile.forward_kl + reverse, factor * (reverse - head)


def tvd(tile: Tile, pull: Tensor | None, factor: float, /) -> Result:
    """0.5 * sum |p - q|: w = -0.5 * q * sign(p - q)."""
    difference = torch.sub(tile.p, tile.q, out=tile.spare("mixture"))
    sign = torch.sign(difference, out=tile.spare("ratio"))
    value = 0.5 * tile.dots(sign, difference)
    if pull is None:
        return value, 0.0
    pull.addcmul_(tile.q, sign, value=-0.5 * factor)
    return value, -0.5 * factor * tile.dots(tile.q, sign)


def taid(tile: Tile, pull: Tensor | None, factor: float, /, *, t: float) -> Result:
    """KL(p_t || q), p_t fixed: w = -p_t. Notes the entropy of p_t."""
    log_target = log_interpolated(tile.log_q, tile.log_p, t)
    target = exponentials(log_target, tile.spare("mixture"))
    tile.noted["target_entropy"] = -tile.dots(target, log_target)
    if pull is not None:
        pull.sub_(target, alpha=factor)
    return tile.dots(target, torch.sub(log_target, tile.log_q, out=tile.spare("ratio"))), -factor

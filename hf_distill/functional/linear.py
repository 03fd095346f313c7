"""The loss for plain linear heads: every product with a head's weight is done once, and backward does none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.functional.head import LMHead
from hf_distill.functional.recipe import Recipe
from hf_distill.functional.softmax import statistics_dtype
from hf_distill.functional.sparse import SparseLogits
from hf_distill.functional.tile import TileLoss, refuse_double_backward


# Elements of a head's gradient that are converted at once.
_AT_ONCE = 2**19


@dataclass(frozen=True)
class LinearJob:
    """What `linear_loss` needs besides the tensors that get a gradient.

    Args:
        recipe: Terms and metrics.
        labels: `[N]`, inside the vocabulary.
        student_head: Its weight and bias are passed to autograd separately.
        teacher: Hidden states `[N, H_t]` and head, or sparse targets, or None.
        token_weights: `[N]` or None.
        rows: Rows per chunk.
        factor: One over the denominator, 0-dim, in the dtype of the statistics.
    """

    recipe: Recipe
    labels: Tensor
    student_head: LMHead
    teacher: tuple[Tensor, LMHead] | SparseLogits | None
    token_weights: Tensor | None
    rows: int
    factor: Tensor


def linear_loss(job: LinearJob, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, differentiable in `hidden` `[N, H]` and in the head's weight and bias, and the sums of the recipe."""
    weight, bias = job.student_head.weight, job.student_head.bias
    needed = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    if torch.is_grad_enabled() and any(needed):
        loss, sums = _LinearLoss.apply(hidden, weight, bias, job)
        return loss, sums
    with torch.no_grad():
        pass_ = _Pass(job, hidden, (False, False, False))
        return pass_.loss, pass_.sums


class _LinearLoss(torch.autograd.Function):
    """Computes the gradients in forward, where the logits exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: LinearJob
    ) -> tuple[Tensor, Tensor]:
        pass_ = _Pass(job, hidden, ctx.needs_input_grad[:3])
        ctx.save_for_backward(pass_.grad_hidden, pass_.grad_weight, pass_.grad_bias)
        ctx.mark_non_differentiable(pass_.sums)
        ctx.set_materialize_grads(False)
        return pass_.loss, pass_.sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        gradients: tuple[Tensor | None, ...] = ctx.saved_tensors
        if grad_loss is None:
            return None, None, None, None
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:  # free to look at on a CPU only
            gradients = tuple(None if g is None else g * grad_loss.to(g.dtype) for g in gradients)
        return *gradients, None


def _compute_dtype(head: LMHead) -> torch.dtype:
    """The dtype in which a head multiplies: autocast's where it is on, else its weight's."""
    device = head.weight.device.type
    if torch.is_autocast_enabled(device) and head.weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return head.weight.dtype


def _cast(head: LMHead) -> LMHead:
    dtype = _compute_dtype(head)
    return replace(
        head, weight=head.weight.detach().to(dtype), bias=None if head.bias is None else head.bias.detach().to(dtype)
    )


class _Projector:
    """A head in its compute dtype, with one buffer for the products of a chunk."""

    def __init__(self, hidden: Tensor, head: LMHead, rows: int) -> None:
        self.head = _cast(head)
        self.hidden = hidden.detach().to(self.head.weight.dtype)
        self._products = self.hidden.new_empty(rows, self.head.weight.shape[0])

    @property
    def vocab_size(self) -> int:
        """Columns of the products."""
        return self.head.weight.shape[0]

    def at(self, part: slice) -> Tensor:
        """The products of some rows, which the next call overwrites."""
        hidden = self.hidden[part]
        return self.head.project_into(hidden, self._products[: hidden.shape[0]])


class _Pass:
    """One pass over all chunks. `needs` says which of the gradients of hidden, weight and bias are wanted."""

    def __init__(self, job: LinearJob, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        student = _Projector(hidden, job.student_head, job.rows)
        teacher = _Projector(*job.teacher, job.rows) if isinstance(job.teacher, tuple) else job.teacher
        self._start_gradients(student, needs, job.labels.numel())
        # The projectors have taken autocast's dtype; the statistics must not.
        with torch.autocast(hidden.device.type, enabled=False):
            self._run(job, student, teacher, any(needs))
            self._finish_gradients(hidden, job)

    def _run(
        self, job: LinearJob, student: _Projector, teacher: _Projector | SparseLogits | None, differentiate: bool
    ) -> None:
        count = job.labels.numel()
        tiles = TileLoss(
            job.recipe,
            count,
            widths=(student.vocab_size, (student if teacher is None else teacher).vocab_size),
            like=student.hidden,
            token_weights=job.token_weights,
            student_head=student.head,
            teacher_head=teacher.head if isinstance(teacher, _Projector) else None,
        )
        for start in range(0, count, job.rows):
            part = slice(start, min(start + job.rows, count))
            logits = student.at(part)
            gradient = logits if differentiate else None
            tiles.add(start, logits, None if teacher is None else teacher.at(part), job.labels[part], gradient)
            if gradient is not None:
                self._add_gradients(student, part, gradient)
        self.sums = tiles.sums()
        self.loss = tiles.total(self.sums) * job.factor

    def _start_gradients(self, student: _Projector, needs: tuple[bool, bool, bool], count: int) -> None:
        weight = student.head.weight
        dtype = statistics_dtype(weight.dtype)
        self.grad_hidden = torch.zeros_like(student.hidden) if needs[0] else None
        self.grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if needs[2] else None
        # The product of a chunk in low precision, before it is added in fp32; CUDA adds it without rounding it first.
        rounds = dtype != weight.dtype and not weight.is_cuda
        start = weight.new_empty if rounds and count else weight.new_zeros  # the first product is copied
        self.grad_weight = start(weight.shape, dtype=dtype) if needs[1] else None
        self._product = torch.empty_like(weight) if needs[1] and rounds else None

    def _add_gradients(self, student: _Projector, part: slice, gradient: Tensor) -> None:
        if self.grad_hidden is not None:
            torch.mm(gradient, student.head.weight, out=self.grad_hidden[part])
        if self._product is not None and self.grad_weight is not None:
            added = torch.mm(gradient.t(), student.hidden[part], out=self._product)
            add = Tensor.add_ if part.start else Tensor.copy_
            for total, product in _by_rows(self.grad_weight, added):
                add(total, product)
        elif self.grad_weight is not None and gradient.dtype != self.grad_weight.dtype:
            total = self.grad_weight
            torch.addmm(total, gradient.t(), student.hidden[part], out_dtype=total.dtype, out=total)
        elif self.grad_weight is not None:
            self.grad_weight.addmm_(gradient.t(), student.hidden[part])
        if self.grad_bias is not None:
            self.grad_bias.add_(gradient.sum(0, dtype=self.grad_bias.dtype))

    def _finish_gradients(self, hidden: Tensor, job: LinearJob) -> None:
        """Divide, apply the head's scale, and go over to the dtypes of the inputs."""
        factor, head = job.factor * job.student_head.scale, job.student_head
        if self.grad_hidden is not None:
            self.grad_hidden = self.grad_hidden.mul_(factor).to(hidden.dtype)
        if self.grad_weight is not None:
            self.grad_weight = self._result(self.grad_weight, factor, head.weight.dtype)
        if self.grad_bias is not None and head.bias is not None:
            self.grad_bias = self.grad_bias.mul_(factor).to(head.bias.dtype)

    def _result(self, grad_weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient times a factor in its final dtype, in the buffer of the products where that fits."""
        if self._product is None or self._product.dtype != dtype:
            return grad_weight.mul_(factor).to(dtype)
        for total, result in _by_rows(grad_weight, self._product):
            result.copy_(total.mul_(factor))
        return self._product


def _by_rows(*weights: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of `[V, H]` tensors at a time: converting them all at once would make a copy of all."""
    rows = max(_AT_ONCE // weights[0].shape[1], 1)
    return zip(*(weight.split(rows) for weight in weights), strict=True)

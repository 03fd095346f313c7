"""All terms and metrics of a loss, and its gradient in the student's logits, from one visit to a tile of logits."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_distill.functional.closed_forms import Tile
from hf_distill.functional.dense_tile import DenseBlock, at_temperature_, first_max_of_shared, likelihood
from hf_distill.functional.head import LMHead
from hf_distill.functional.recipe import Recipe
from hf_distill.functional.softmax import Softmax, statistics_dtype
from hf_distill.functional.sparse import SparseLogits
from hf_distill.functional.sparse_tile import SparseBlock, SparseTeacher, SparseTile


# Elements of one buffer of a block of rows. On a CPU 4 MB, so that the passes over a block find it in the last cache.
_CPU_BLOCK = 2**20
_DEVICE_BLOCK = 2**24
# Stands for the logit of an impossible token: its probability is 0, and 0 * log 0 = 0 holds by itself.
_IMPOSSIBLE = -1e30

# Of a tile: logits `[n, V_t]` or sparse targets; None where nothing looks at the teacher.
TeacherRows: TypeAlias = Tensor | SparseLogits | None


class TileLoss:
    """Evaluates a recipe tile by tile, in buffers that are allocated once.

    Args:
        recipe: What to compute.
        count: Number of tokens of all tiles together.
        widths: Vocabulary of the student and of the teacher (the student's again where there is none).
        like: A tensor with the dtype and the device of the logits.
        token_weights: `[count]` or None.
        student_head: Its scale and softcap are still to be applied to the student's tiles; None where they are logits.
        teacher_head: As `student_head`.
    """

    def __init__(
        self,
        recipe: Recipe,
        count: int,
        widths: tuple[int, int],
        like: Tensor,
        token_weights: Tensor | None = None,
        student_head: LMHead | None = None,
        teacher_head: LMHead | None = None,
    ) -> None:
        self.recipe = recipe
        self.heads = student_head, teacher_head
        self.shared = min(widths)
        self._like = like.new_empty(0, dtype=statistics_dtype(like.dtype))
        self._weights = None if token_weights is None else token_weights.detach().to(self._like)
        self._block = max((_CPU_BLOCK if like.device.type == "cpu" else _DEVICE_BLOCK) // max(widths), 1)
        self._buffers: dict[str, Tensor] = {}
        self._values = self._like.new_zeros(len(recipe.names), count)
        self._ce_weight = sum(term.weight for term in recipe.terms if term.divergence is None)
        names = set(recipe.names)
        self._full_student = bool(names & {"ce", "student_nll", "student_entropy"})

    def add(
        self,
        first: int,
        student: Tensor,
        teacher: TeacherRows,
        labels: Tensor,
        gradient: Tensor | None,
    ) -> None:
        """Evaluate one tile.

        Args:
            first: Number of the tile's first token.
            student: `[n, V_s]`, what the student's head gives (before scale and softcap where a head was passed, and
                then it may be overwritten).
            teacher: `[n, V_t]`, or sparse targets of the same rows, or None where the recipe needs no teacher.
            labels: `[n]`, inside the vocabulary.
            gradient: `[n, V_s]`, receives the gradient of the weighted sum in `student`, but for the factor `scale` of
                the student's head; may be `student` itself. None where no gradient is wanted.
        """
        rows = SparseTeacher(teacher, self.shared, self._like) if isinstance(teacher, SparseLogits) else teacher
        for start in range(0, labels.numel(), self._block):
            part = slice(start, start + self._block)
            self._add_block(
                slice(first + start, first + start + labels[part].numel()),
                self._load("student", student[part], self.heads[0]),
                self._teacher_block(rows, part),
                labels[part, None],
                None if gradient is None else gradient[part],
            )

    def sums(self) -> Tensor:
        """Sums over tokens of every row of the recipe: terms (times T^2 and token weights), then metrics."""
        sums = self._values.sum(1)
        terms = len(self.recipe.terms)
        if self._weights is not None:
            sums[:terms] = self._values[:terms] @ self._weights
        return sums

    def total(self, sums: Tensor) -> Tensor:
        """The weighted sum of the terms."""
        weights = [term.weight for term in self.recipe.terms]
        return torch.stack([weight * part for weight, part in zip(weights, sums, strict=False) if weight]).sum()

    def _buffer(self, name: str, rows: int, width: int) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < rows * width:
            self._buffers[name] = self._like.new_empty(rows * width)
        return self._buffers[name][: rows * width].view(rows, width)

    def _load(self, name: str, products: Tensor, head: LMHead | None) -> Tensor:
        """Finished logits in the precision of the statistics: in place of a head's products where they have it."""
        if head is not None and products.dtype == self._like.dtype:
            logits = products
        else:
            logits = self._buffer(name, *products.shape).copy_(products)
        if head is not None:
            head.finish_(logits)
        if head is None or head.bias is not None:  # products of finite weights are finite
            logits.clamp_(min=_IMPOSSIBLE)
        return logits

    def _teacher_block(self, teacher: Tensor | SparseTeacher | None, part: slice) -> DenseBlock | SparseBlock | None:
        if isinstance(teacher, Tensor):
            return DenseBlock(self._load("teacher", teacher[part], self.heads[1]), self.shared, self._buffer)
        return None if teacher is None else SparseBlock(teacher, part)

    def _add_block(
        self,
        at: slice,
        student: Tensor,
        teacher: DenseBlock | SparseBlock | None,
        labels: Tensor,
        gradient: Tensor | None,
    ) -> None:
        """Evaluate a block of rows of finished logits, which are overwritten by log-probabilities."""
        metrics = self.recipe.metrics
        softcap = self.heads[0].softcap if self.heads[0] is not None and gradient is not None else None
        slope = None
        if softcap is not None:  # of the softcap: 1 - tanh^2
            slope = torch.square(student, out=self._buffer("slope", *student.shape)).div_(-(softcap**2)).add_(1)
        values: dict[str, Tensor] = {}
        top = None
        if teacher is not None and "top1_agreement" in metrics:
            choice, top = first_max_of_shared(student, self.shared)
            values["top1_agreement"] = choice == teacher.top()
        at_one = None
        if self._full_student:
            probs, products = (self._buffer(name, *student.shape) for name in ("student_probs", "products"))
            at_one = Softmax(student, probs, top, products=products)
            values |= likelihood("student", at_one, metrics, labels)
        if teacher is not None:
            values |= teacher.metrics(metrics, labels)
        tile = None
        if teacher is not None and "kl" in metrics:
            tile = self._tile(student, at_one, teacher, 1.0)
            values["kl"] = tile.forward_kl
        if teacher is not None and self.recipe.divergences and (tile is None or self.recipe.temperature != 1.0):
            tile = self._tile(student, at_one, teacher, self.recipe.temperature)

        pull, row_sum = self._start_pull(student, at_one, tile, labels, gradient is not None)
        for row, term in enumerate(self.recipe.terms):
            if term.divergence is None:
                self._values[row, at] = values["student_nll"]
                continue
            assert tile is not None
            scale = term.divergence.scale(self.recipe.temperature)
            wanted = None if pull is None or not term.weight else pull[:, : self.shared]
            value, added = tile.evaluate(term.divergence, wanted, term.weight * scale / self.recipe.temperature)
            self._values[row, at] = value * scale
            row_sum = row_sum + added if wanted is not None else row_sum
        values |= tile.noted if tile is not None else {}
        for row, name in enumerate(metrics, start=len(self.recipe.terms)):
            self._values[row, at] = values[name]
        if gradient is None or pull is None:
            return
        if tile is not None:
            row_sum = row_sum[:, None] if isinstance(row_sum, Tensor) else pull.new_tensor(row_sum)
            tile.complete_(pull[:, : self.shared], row_sum)
        if slope is not None:
            pull.mul_(slope)
        if self._weights is not None:
            pull.mul_(self._weights[at, None])
        gradient.copy_(pull)

    def _tile(
        self, student: Tensor, at_one: Softmax | None, teacher: DenseBlock | SparseBlock, temperature: float
    ) -> Tile | SparseTile:
        """Both distributions over the shared vocabulary at a temperature; `at_one` is the student's at T = 1."""
        shared = student[:, : self.shared]
        return teacher.compare(at_temperature_(shared, at_one, temperature, self._buffer, "q"), temperature)

    def _start_pull(
        self, student: Tensor, at_one: Softmax | None, tile: Tile | SparseTile | None, labels: Tensor, wanted: bool
    ) -> tuple[Tensor | None, Tensor | float]:
        """The gradient of cross-entropy, and what of it the final pass over the tile still has to complete.

        Where the divergences use the same softmax, cross-entropy is one more pull (-1 at the label). Where they do not
        (T != 1, other widths), its gradient q - 1[label] is complete here, and takes the buffer of q.
        """
        if not wanted:
            return None, 0.0
        weight = self._ce_weight
        same_softmax = tile is not None and tile.student is at_one
        if at_one is None or same_softmax or not weight:
            pull = self._buffer("pull", *student.shape).zero_()
        else:
            pull = at_one.scaled_(weight)
        if weight:
            pull.scatter_add_(1, labels, pull.new_full((1, 1), -weight).expand_as(labels))
        return pull, -weight if same_softmax else 0.0


def refuse_double_backward() -> None:
    """Raise RuntimeError in a backward pass that is itself being recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_distillation_loss cannot be differentiated twice: its gradient is computed in forward. Call "
            "backward without create_graph=True, or use the divergences of hf_distill.functional on full logits."
        )


class _TileGradient(torch.autograd.Function):
    """A tile's weighted sum as a function of logits that autograd goes on from."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        recipe: Recipe,
        teacher: TeacherRows,
        labels: Tensor,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total, sums = _evaluate(recipe, student, teacher, labels, weights, gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), None, None, None, None


def _width(teacher: TeacherRows, default: int) -> int:
    if isinstance(teacher, SparseLogits):
        return teacher.vocab_size
    return default if teacher is None else teacher.shape[1]


def _evaluate(
    recipe: Recipe,
    student: Tensor,
    teacher: TeacherRows,
    labels: Tensor,
    weights: Tensor | None,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    widths = student.shape[1], _width(teacher, student.shape[1])
    with torch.autocast(student.device.type, enabled=False):
        tiles = TileLoss(recipe, labels.numel(), widths, student, weights)
        tiles.add(0, student, teacher, labels, gradient)
        sums = tiles.sums()
        return tiles.total(sums), sums


def tile_loss(
    recipe: Recipe,
    student: Tensor,
    teacher: TeacherRows,
    labels: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of a tile's terms, differentiable in the student's logits, and the sums of the recipe.

    Args:
        recipe: Terms and metrics.
        student: Logits `[n, V_s]`.
        teacher: Logits `[n, V_t]`, or sparse targets, or None where the recipe needs no teacher.
        labels: `[n]`, inside the vocabulary.
        weights: `[n]` or None.
    """
    if torch.is_grad_enabled() and student.requires_grad:
        total, sums = _TileGradient.apply(student, recipe, teacher, labels, weights)
        return total, sums
    with torch.no_grad():
        return _evaluate(recipe, student, teacher, labels, weights, None)

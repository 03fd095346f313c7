"""All terms and metrics of a loss, and its gradient in the student's logits, from one visit to a tile of logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_distill.functional.closed_forms import Tile
from hf_distill.functional.divergences import check_temperature
from hf_distill.functional.head import LMHead
from hf_distill.functional.registry import BoundDivergence, resolve_divergence, unknown_name


METRICS = ("student_nll", "teacher_nll", "top1_agreement", "kl", "student_entropy", "teacher_entropy")
# Metrics that only one term can tell: the entropy of the distribution that the term moves the student to.
TERM_METRICS = {"target_entropy": "taid"}
# Elements of one buffer of a block of rows. On a CPU 4 MB, so that the passes over a block find it in the last cache.
_CPU_BLOCK = 2**20
_DEVICE_BLOCK = 2**24

Terms = Mapping[str, float | tuple[float, Mapping[str, Any]]]


@dataclass(frozen=True)
class Term:
    """One term of the loss; `divergence` is None for cross-entropy."""

    name: str
    weight: float
    divergence: BoundDivergence | None


@dataclass(frozen=True)
class Recipe:
    """What to compute from a tile of logits; `terms` and then `metrics` are the rows of its result."""

    terms: tuple[Term, ...]
    temperature: float
    metrics: tuple[str, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term or metric looks at the teacher."""
        return any(term.divergence for term in self.terms) or bool(
            set(self.metrics) - {"student_nll", "student_entropy"}
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows of the result; a term and a metric may share a name."""
        return tuple(term.name for term in self.terms) + self.metrics


def resolve_recipe(terms: Terms, temperature: float, metrics: Sequence[str]) -> Recipe:
    """Check the terms, the temperature and the metrics of a loss before any tensor is touched.

    Raises:
        ValueError: For unknown names (with near ones), negative or all-zero weights, or a temperature <= 0.
    """
    check_temperature(temperature)
    resolved = []
    for name, value in terms.items():
        weight, kwargs = value if isinstance(value, tuple) else (value, {})
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"The weight of the term {name!r} must be a finite number >= 0, got {weight}.")
        if name == "ce" and kwargs:
            raise ValueError(f"The term 'ce' takes no keyword arguments, got {dict(kwargs)}.")
        resolved.append(Term(name, float(weight), None if name == "ce" else resolve_divergence(name, kwargs)))
    if not any(term.weight for term in resolved):
        raise ValueError(
            f"At least one term must have a positive weight, got {dict(terms)}. Set e.g. terms={{'forward_kl': 1.0}}."
        )
    for name in metrics:
        if name not in METRICS and TERM_METRICS.get(name) not in terms:
            raise unknown_name("metric", name, METRICS)
    return Recipe(tuple(resolved), float(temperature), tuple(metrics))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the softmax and of all sums: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise_(logits: Tensor, probs: Tensor, top: Tensor | None = None) -> None:
    """Turn `logits` `[n, V]` into log-probabilities in place and write the probabilities to `probs`.

    A few light passes: half the time of torch.log_softmax and exp on a CPU. Log-probabilities of -inf become the
    smallest finite number, so that 0 * log 0 = 0 holds by itself in everything that follows. `top` is the greatest
    logit of each row, `[n, 1]`, where it is known.
    """
    normalise_shifted_(logits.sub_(logits.amax(-1, keepdim=True) if top is None else top), probs)


def normalise_shifted_(logits: Tensor, probs: Tensor) -> None:
    """As `normalise_`, for logits whose exponentials can be added up as they are."""
    torch.exp(logits, out=probs)
    total = probs.sum(-1, keepdim=True)
    probs.div_(total)
    logits.sub_(total.log_()).clamp_(min=torch.finfo(logits.dtype).min)


def first_max(values: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """`values.max(-1, keepdim=True)` and its first index, `[n, 1]` each, for `[n, V]`.

    By blocks of columns: many times faster than `max` on a CPU, where only amax is vectorised.
    """
    width = values.shape[1]
    whole = width - width % block
    if whole == 0:
        return values.max(-1, keepdim=True)
    best, where = values[:, :whole].unflatten(1, (-1, block)).amax(-1).max(-1, keepdim=True)
    start = where * block
    index = start + values.gather(1, start + torch.arange(block, device=values.device)).argmax(-1, keepdim=True)
    if whole < width:
        rest, rest_where = values[:, whole:].max(-1, keepdim=True)
        index = torch.where(rest > best, whole + rest_where, index)
        best = torch.maximum(best, rest)
    return best, index


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
        self._full_teacher = bool(names & {"teacher_nll", "teacher_entropy"})
        self._compares = any(term.divergence for term in recipe.terms)

    def add(
        self, first: int, student: Tensor, teacher: Tensor | None, labels: Tensor, gradient: Tensor | None
    ) -> None:
        """Evaluate one tile.

        Args:
            first: Number of the tile's first token.
            student: `[n, V_s]`, what the student's head gives (before scale and softcap where a head was passed).
            teacher: `[n, V_t]`, or None where the recipe needs no teacher.
            labels: `[n]`, inside the vocabulary.
            gradient: `[n, V_s]`, receives the gradient of the weighted sum in `student`, but for the factor `scale` of
                the student's head; may be `student` itself. None where no gradient is wanted.
        """
        for start in range(0, labels.numel(), self._block):
            part = slice(start, start + self._block)
            self._add_block(
                slice(first + start, first + start + labels[part].numel()),
                self._load("student", student[part], self.heads[0]),
                None if teacher is None else self._load("teacher", teacher[part], self.heads[1]),
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
        logits = self._buffer(name, *products.shape).copy_(products)
        if head is not None:
            head.finish_(logits)
        return logits

    def _add_block(
        self, at: slice, student: Tensor, teacher: Tensor | None, labels: Tensor, gradient: Tensor | None
    ) -> None:
        """Evaluate a block of rows of finished logits, which are overwritten by log-probabilities."""
        softcap = self.heads[0].softcap if self.heads[0] is not None and gradient is not None else None
        slope = None
        if softcap is not None:  # of the softcap: 1 - tanh^2
            slope = torch.square(student, out=self._buffer("slope", *student.shape)).div_(-(softcap**2)).add_(1)
        values: dict[str, Tensor] = {}
        tops = (None, None) if teacher is None else self._compare_tops(values, student, teacher)
        q = p = None
        if self._full_student:
            q = self._normalise_at_one("student", values, student, labels, tops[0])
        if teacher is not None and self._full_teacher:
            p = self._normalise_at_one("teacher", values, teacher, labels, tops[1])
        tile = None
        if teacher is not None and "kl" in self.recipe.metrics:
            tile = self._tile(student, teacher, q, p, 1.0)
            values["kl"] = tile.forward_kl
        if teacher is not None and self._compares and (tile is None or self.recipe.temperature != 1.0):
            tile = self._tile(student, teacher, q, p, self.recipe.temperature)

        pull, row_sum = self._start_pull(student, q, tile, labels, gradient is not None)
        for row, term in enumerate(self.recipe.terms):
            if term.divergence is None:
                self._values[row, at] = values["student_nll"]
                continue
            assert tile is not None
            scale = term.divergence.scale(self.recipe.temperature)
            wanted = None if pull is None or not term.weight else pull[:, : self.shared]
            value, added = term.divergence.in_closed_form(tile, wanted, term.weight * scale / self.recipe.temperature)
            self._values[row, at] = value * scale
            row_sum = row_sum + added if wanted is not None else row_sum
        values |= tile.noted if tile is not None else {}
        for row, name in enumerate(self.recipe.metrics, start=len(self.recipe.terms)):
            self._values[row, at] = values[name]
        if gradient is None or pull is None:
            return
        if tile is not None:
            row_sum = row_sum[:, None] if isinstance(row_sum, Tensor) else pull.new_tensor(row_sum)
            pull[:, : self.shared].addcmul_(tile.q, row_sum, value=-1)
        if slope is not None:
            pull.mul_(slope)
        if self._weights is not None:
            pull.mul_(self._weights[at, None])
        gradient.copy_(pull)

    def _compare_tops(
        self, values: dict[str, Tensor], student: Tensor, teacher: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add the agreement where it is asked for; the greatest logits of each side, where they were looked for."""
        if "top1_agreement" not in self.recipe.metrics:
            return None, None
        sides = student, teacher
        (top_q, choice), (top_p, teacher_choice) = (first_max(side[:, : self.shared]) for side in sides)
        values["top1_agreement"] = (choice == teacher_choice).squeeze(1)
        whole_q, whole_p = (side.shape[1] == self.shared for side in sides)
        return top_q if whole_q else None, top_p if whole_p else None

    def _normalise_at_one(
        self, side: str, values: dict[str, Tensor], logits: Tensor, labels: Tensor, top: Tensor | None
    ) -> Tensor:
        """Softmax over the whole width at T = 1; adds the side's likelihood, and its entropy where asked for."""
        probs = self._buffer(f"{side}_probs", *logits.shape)
        normalise_(logits, probs, top)
        values[f"{side}_nll"] = -logits.gather(1, labels).squeeze(1)
        if f"{side}_entropy" in self.recipe.metrics:
            values[f"{side}_entropy"] = -torch.linalg.vecdot(probs, logits)
        return probs

    def _tile(self, student: Tensor, teacher: Tensor, q: Tensor | None, p: Tensor | None, temperature: float) -> Tile:
        """Both distributions over the shared vocabulary at a temperature, reusing those at T = 1 where they fit."""
        sides: list[Tensor] = []
        for side, logits, probs in (("q", student, q), ("p", teacher, p)):
            shared = logits[:, : self.shared]
            normalised = probs is not None and probs.shape == shared.shape
            if probs is None or not normalised or temperature != 1.0:
                if temperature != 1.0:
                    shared.mul_(1 / temperature)
                probs = self._buffer(side, *shared.shape)
                # Log-probabilities over T >= 1 have exponentials that add up to between 1 and V.
                normalise = normalise_shifted_ if normalised and temperature >= 1.0 else normalise_
                normalise(shared, probs)
            sides += [shared, probs]
        log_q, q, log_p, p = sides
        return Tile(log_q, q, log_p, p, spare=partial(self._buffer, rows=student.shape[0], width=self.shared))

    def _start_pull(
        self, student: Tensor, q: Tensor | None, tile: Tile | None, labels: Tensor, wanted: bool
    ) -> tuple[Tensor | None, Tensor | float]:
        """The gradient of cross-entropy, and what of it the final pass over the tile still has to complete.

        Where the divergences use the same softmax, cross-entropy is one more pull (-1 at the label). Where they do not
        (T != 1, other widths), its gradient q - 1[label] is complete here, and takes the buffer of q.
        """
        if not wanted:
            return None, 0.0
        weight = self._ce_weight
        same_softmax = tile is not None and tile.q is q
        if q is None or same_softmax or not weight:
            pull = self._buffer("pull", *student.shape).zero_()
        else:
            pull = q.mul_(weight)
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
        ctx: Any, student: Tensor, recipe: Recipe, teacher: Tensor | None, labels: Tensor, weights: Tensor | None
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


def _evaluate(
    recipe: Recipe,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    widths = student.shape[1], (student if teacher is None else teacher).shape[1]
    with torch.autocast(student.device.type, enabled=False):
        tiles = TileLoss(recipe, labels.numel(), widths, student, weights)
        tiles.add(0, student, teacher, labels, gradient)
        sums = tiles.sums()
        return tiles.total(sums), sums


def tile_loss(
    recipe: Recipe, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of a tile's terms, differentiable in the student's logits, and the sums of the recipe.

    Args:
        recipe: Terms and metrics.
        student: Logits `[n, V_s]`.
        teacher: Logits `[n, V_t]`, or None where the recipe needs no teacher.
        labels: `[n]`, inside the vocabulary.
        weights: `[n]` or None.
    """
    if torch.is_grad_enabled() and student.requires_grad:
        total, sums = _TileGradient.apply(student, recipe, teacher, labels, weights)
        return total, sums
    with torch.no_grad():
        return _evaluate(recipe, student, teacher, labels, weights, None)

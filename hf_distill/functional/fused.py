"""Cross-entropy and divergences from hidden states, without ever building the logits of all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_distill.functional.head import LMHead
from hf_distill.functional.linear import LinearJob, linear_loss
from hf_distill.functional.recipe import Recipe, Terms, resolve_recipe
from hf_distill.functional.reduce import reciprocal, reduce_sum
from hf_distill.functional.softmax import statistics_dtype
from hf_distill.functional.sparse import SparseLogits, check_targets
from hf_distill.functional.tile import TeacherRows, tile_loss


# The layers below `signals` cannot import it; the value is PyTorch's own convention.
IGNORE_INDEX = -100
# A head that trains adds a [V, H] product to its gradient for every chunk, so its chunks are thick; for the others
# thin ones are as fast.
TRAINED_CHUNK_BYTES = 256 * 2**20
FROZEN_CHUNK_BYTES = 96 * 2**20

Head = LMHead | Callable[[Tensor], Tensor]
Projection = tuple[Tensor, Head]
Teacher: TypeAlias = Projection | SparseLogits | None


@dataclass(frozen=True)
class LinearLossOutput:
    """What `linear_distillation_loss` returns.

    Args:
        loss: Scalar, differentiable in the student's hidden states and head.
        parts: Per term the detached sum over labelled tokens (token weights and T^2 applied, the term's weight not):
            `loss = sum(weight * part) / denominator`.
        count: Number of labelled tokens, 0-dim int64.
        metrics: Per requested name the detached, unweighted sum over labelled tokens; divide by `count`.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    count: Tensor
    metrics: dict[str, Tensor]


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_targets: SparseLogits | None = None,
    terms: Terms | None = None,
    temperature: float = 2.0,
    denominator: int | float | Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_bytes: int | None = None,
    metrics: Sequence[str] = (),
) -> LinearLossOutput:
    """Weighted sum of cross-entropy and divergences, `[N, V]` logits existing only a chunk of rows at a time.

    Rows whose label is -100 are dropped before any projection. Vocabularies of different sizes are compared on the
    first `min(V_s, V_t)` tokens; cross-entropy, likelihoods and entropies use each model's full width. A batch without
    labelled tokens gives a zero that still reaches the hidden states and the head, so that distributed ranks agree on
    what takes part in backward. Nothing flows back into the teacher.

    `teacher_targets` take the place of a teacher's hidden states and head. Where they hold sampled masses,
    `forward_kl`, `soft_cross_entropy` and the metric `kl` are estimates that are right on average, in value and in
    gradient (random sampling KD, arXiv 2503.16870). Otherwise both distributions are reduced to the ids and a bucket
    of all other tokens: the value is at most that over the vocabulary, and equal where the ids are all of it. `taid`
    and `adaptive_kl` are made from every probability and refused.

    Example:
        >>> out = linear_distillation_loss(
        ...     hidden, LMHead(student.lm_head.weight), labels,
        ...     teacher_hidden=teacher_hidden, teacher_head=LMHead(teacher.lm_head.weight),
        ...     terms={"ce": 0.5, "jsd": (0.5, {"beta": 0.1})}, temperature=1.0,
        ... )
        >>> out.loss.backward()

    Args:
        student_hidden: `[N, H_s]`, what enters the student's head, already shifted and flattened.
        student_head: `LMHead`, or any callable from `[n, H_s]` to logits `[n, V_s]`.
        labels: `[N]` int64; -100 is ignored.
        teacher_hidden: `[N, H_t]`; needed as soon as a term or metric looks at the teacher.
        teacher_head: As `student_head`.
        teacher_targets: What is known of the teacher's distributions, one row for each label (those at -100 hold
            anything), on the same device; instead of the two above. `temperature` must be one that they declare.
        terms: Name to weight, or to (weight, keyword arguments): "ce" and the names in `DIVERGENCES`. Default: half
            cross-entropy, half forward KL.
        temperature: Of the divergences (cross-entropy and metrics are at 1). Terms that scale with it get T^2.
        denominator: Divides the sum over tokens: `num_items_in_batch`. None takes the number of labelled tokens, or
            the sum of their `token_weights`.
        token_weights: `[N]`, non-negative, factor on each token's terms (not on the metrics); no gradient.
        chunk_bytes: Budget for one chunk's logits, student and teacher together (default 256 MiB where the head's
            weight gets a gradient, else 96 MiB).
        metrics: Names from `METRICS`. `kl` is the forward KL at temperature 1. With the term `taid` also
            "target_entropy", that of its target.

    Raises:
        ValueError: For shapes that do not fit, a missing teacher, labels outside the vocabulary or other than those of
            `teacher_targets`, negative token weights, and everything in `resolve_recipe` and `check_targets`. Labels
            and weights are checked together with the number of labelled rows, which has to come back from the device
            anyway: no extra synchronisation.
    """
    recipe = resolve_recipe({"ce": 0.5, "forward_kl": 0.5} if terms is None else terms, temperature, metrics)
    _check_shapes(student_hidden, labels, token_weights)
    teacher = _check_teacher(recipe, labels, teacher_hidden, teacher_head, teacher_targets)
    widths = [vocabulary_of(student_head, student_hidden)]
    if isinstance(teacher, tuple):
        widths.append(vocabulary_of(teacher[1], teacher[0]))
    index, count = _labelled_rows(
        labels,
        token_weights,
        width=min(widths) if "teacher_nll" in metrics else widths[0],
        expected=teacher.labels if isinstance(teacher, SparseLogits) else None,
    )
    weights = None if token_weights is None else token_weights.detach()
    if index is not None:
        student_hidden, labels = student_hidden.index_select(0, index), labels.index_select(0, index)
        if isinstance(teacher, SparseLogits):
            teacher = teacher.at(index)
        elif teacher is not None:
            teacher = teacher[0].index_select(0, index), teacher[1]
        weights = None if weights is None else weights.index_select(0, index)

    row_bytes = sum(widths) * student_hidden.element_size()
    rows = chunk_rows(count, row_bytes, chunk_bytes, trained_head=is_trained(student_head))
    number = torch.tensor(count, device=labels.device)
    divisor = number if weights is None else weights.sum()
    plain: tuple[Tensor, LMHead] | SparseLogits | None = None if isinstance(teacher, tuple) else teacher
    if isinstance(teacher, tuple) and isinstance(teacher[1], LMHead):
        plain = teacher[0], teacher[1]
    if isinstance(student_head, LMHead) and (teacher is None or plain is not None):
        factor = reciprocal(denominator, divisor, statistics_dtype(student_head.weight.dtype))
        job = LinearJob(recipe, labels, student_head, plain, weights, rows, factor)
        loss, sums = linear_loss(job, student_hidden)
    else:
        total, sums = _checkpointed_sum(recipe, (student_hidden, student_head), teacher, labels, weights, rows)
        loss = reduce_sum(total, denominator, divisor)
    size = len(recipe.terms)
    return LinearLossOutput(
        loss=loss,
        parts=dict(zip(recipe.names[:size], sums[:size], strict=True)),
        count=number,
        metrics=dict(zip(recipe.metrics, sums[size:], strict=True)),
    )


def _check_shapes(student_hidden: Tensor, labels: Tensor, token_weights: Tensor | None) -> None:
    if student_hidden.dim() != 2 or labels.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"`student_hidden` must be [N, H] and `labels` [N], got {list(student_hidden.shape)} and "
            f"{list(labels.shape)}. Shift and flatten first: hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()."
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"`token_weights` must be {list(labels.shape)}, got {list(token_weights.shape)}.")


def _check_teacher(
    recipe: Recipe, labels: Tensor, hidden: Tensor | None, head: Head | None, targets: SparseLogits | None
) -> Teacher:
    """Check that there is one teacher; return its detached form, or None where nothing looks at it."""
    if not recipe.needs_teacher:
        return None
    if targets is not None and (hidden is not None or head is not None):
        raise ValueError(
            "`teacher_targets` and `teacher_hidden` or `teacher_head` are given; pass either the targets, or hidden "
            "states with their head."
        )
    if targets is not None:
        check_targets(targets, recipe)
        if len(targets) != len(labels) or targets.labels.device != labels.device:
            raise ValueError(
                f"`teacher_targets` must hold {len(labels)} tokens on {labels.device}, one for each label (also for "
                f"those at -100), got {len(targets)} on {targets.labels.device}."
            )
        return targets
    if hidden is None or head is None:
        missing = "teacher_hidden" if hidden is None else "teacher_head"
        raise ValueError(
            f"`{missing}` is missing, but these terms or metrics compare with the teacher: pass it, or "
            "`teacher_targets`."
        )
    if hidden.dim() != 2 or hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"`teacher_hidden` must be [{labels.shape[0]}, H_t], got {list(hidden.shape)}.")
    return hidden.detach(), head


def vocabulary_of(head: Head, hidden: Tensor) -> int:
    """How many logits a head gives; a callable is asked with no rows."""
    if isinstance(head, LMHead):
        return head.weight.shape[0]
    with torch.no_grad():
        return head(hidden[:0]).shape[-1]


def _labelled_rows(
    labels: Tensor, token_weights: Tensor | None, width: int, expected: Tensor | None
) -> tuple[Tensor | None, int]:
    """Indices of the labelled rows (None where all are) and their number, with one read from the device."""
    kept = labels != IGNORE_INDEX
    outside = kept & ((labels < 0) | (labels >= width))
    negative = kept if token_weights is None else kept & ~(token_weights >= 0)
    other = kept if expected is None else kept & (labels != expected)
    count, bad, light, strange = torch.stack([kept.sum(), outside.sum(), negative.sum(), other.sum()]).tolist()
    if bad:
        raise ValueError(
            f"{bad} labels lie outside the vocabulary [0, {width}), the first being "
            f"{int(labels[outside][0])}; -100 marks tokens to ignore. Check that the tokenizer belongs to the model."
        )
    if expected is not None and strange:
        row = int(other.nonzero()[0])
        raise ValueError(
            f"`labels` and `teacher_targets` belong to different tokens: {strange} of {count} labels differ, the "
            f"first in row {row}: {int(labels[row])} and {int(expected[row])}. Look the targets up by the same input "
            "ids, and shift both alike."
        )
    if token_weights is not None and light:
        raise ValueError(f"`token_weights` must be >= 0; {light} labelled tokens have a negative or NaN weight.")
    return (None if count == labels.numel() else kept.nonzero().squeeze(1)), count


def is_trained(head: Head) -> bool:
    """Whether a gradient of the weight is added up over chunks."""
    return isinstance(head, LMHead) and head.weight.requires_grad and torch.is_grad_enabled()


def chunk_rows(count: int, bytes_per_row: int, chunk_bytes: int | None, *, trained_head: bool) -> int:
    """Rows per chunk: what the budget allows between 128 (thinner products are slow) and 1024, in even chunks."""
    budget = chunk_bytes
    if budget is None:
        budget = TRAINED_CHUNK_BYTES if trained_head else FROZEN_CHUNK_BYTES
    rows = min(max(budget // bytes_per_row, 128), 1024)
    return max(math.ceil(count / max(math.ceil(count / rows), 1)), 1)


def _checkpointed_sum(
    recipe: Recipe, student: Projection, teacher: Teacher, labels: Tensor, weights: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Weighted sum (differentiable) and the detached sums of the recipe for any heads: backward projects again."""

    def teacher_rows(part: slice) -> TeacherRows:
        if not isinstance(teacher, tuple):
            return None if teacher is None else teacher.at(part)
        with torch.no_grad():
            return teacher[1](teacher[0][part])

    def of_chunk(hidden: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        logits = student[1](hidden)
        return tile_loss(recipe, logits, teacher_rows(part), labels[part], None if weights is None else weights[part])

    # Zero rows give a zero with a path to everything the head owns, also where the loop below does not run.
    total = student[1](student[0][:0]).sum(dtype=statistics_dtype(student[0].dtype))
    sums = total.detach().new_zeros(len(recipe.names))
    for start in range(0, labels.numel(), rows):
        part = slice(start, start + rows)
        if torch.is_grad_enabled():
            chunk, chunk_sums = checkpoint(of_chunk, student[0][part], part, use_reentrant=False)
        else:
            chunk, chunk_sums = of_chunk(student[0][part], part)
        total, sums = total + chunk, sums + chunk_sums
    return total, sums

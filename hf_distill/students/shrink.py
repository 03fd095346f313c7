"""Depth: a student made of a teacher's own layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_distill.anatomy import describe
from hf_distill.students.surgery import check_readable, config_of_depth, rebuild


def choose_layers(total: int, keep: int, keep_first: int | None = None, keep_last: int | None = None) -> list[int]:
    """Choose `keep` of `total` layers, evenly spaced between the first and the last ones.

    Args:
        total: Depth of the teacher.
        keep: Depth of the student.
        keep_first: How many layers to take in one block from the start (default: 1).
        keep_last: How many to take in one block from the end (default: 1, where `keep` has room for it).

    Returns:
        Indices into the teacher's layers, increasing.

    Raises:
        ValueError: The counts do not fit into each other.

    Example:
        >>> choose_layers(12, 4)
        [0, 4, 7, 11]
        >>> choose_layers(12, 6, keep_first=2, keep_last=2)
        [0, 1, 4, 7, 10, 11]
    """
    if not 1 <= keep <= total:
        raise ValueError(f"Cannot keep {keep} of {total} layers: expected a number from 1 to {total}.")
    if keep_first is None:
        keep_first = min(1, keep - (keep_last or 0))
    if keep_last is None:
        keep_last = min(1, keep - keep_first)
    if min(keep_first, keep_last) < 0 or keep_first + keep_last > keep:
        raise ValueError(
            f"keep_first={keep_first} and keep_last={keep_last} must not be negative and must add up to at most "
            f"keep={keep}."
        )
    start, end, between = keep_first - 1, total - keep_last, keep - keep_first - keep_last
    # Halves are rounded up in integers: round() would send 0.5 and 1.5 to even neighbours and space unevenly.
    spread = [start + (2 * i * (end - start) + between + 1) // (2 * (between + 1)) for i in range(1, between + 1)]
    return [*range(keep_first), *spread, *range(end, total)]


def shrink(
    teacher: PreTrainedModel,
    num_hidden_layers: int | None = None,
    layers: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build a student of the same class from copies of some of the teacher's layers.

    Embeddings, final norm and head are copied too. The student's config is that of its depth, with
    `hf_distill = {"kept_layers": [...], "teacher_num_hidden_layers": L}` saying where the layers come from. The
    teacher is left as it is, and the student is in eval mode on the teacher's device, as after `from_pretrained`.
    Starting from the teacher's own layers is the initialisation of DistilBERT (Sanh et al., 2019, arXiv:1910.01108).

    Args:
        teacher: A model with real weights: not quantised, without adapters, not sharded or offloaded.
        num_hidden_layers: Depth of the student; the layers are chosen by `choose_layers`.
        layers: The layers to keep instead, increasing.
        dtype: Of the student; the teacher's where not given.

    Returns:
        A model that `save_pretrained` and `from_pretrained` treat like any other.

    Raises:
        ValueError: Both or neither of the depth and the layers are given, layers are out of range, repeated or not
            increasing, or the teacher's layers cannot be copied or moved.

    Example:
        >>> student = shrink(teacher, num_hidden_layers=15)
        >>> student = shrink(teacher, layers=[0, 1, 2, 27, 28, 29])
    """
    check_readable(teacher, "shrink")
    source = describe(teacher)
    kept = _kept_layers(source.num_layers, num_hidden_layers, layers)
    return rebuild(source, config_of_depth(source, kept), kept, dtype=dtype)


def _kept_layers(total: int, depth: int | None, layers: Sequence[int] | None) -> list[int]:
    """The layers to keep, checked."""
    if (depth is None) == (layers is None):
        raise ValueError(
            f"Give either `num_hidden_layers` or `layers`, got num_hidden_layers={depth} and layers={layers}. "
            f"For example `shrink(teacher, num_hidden_layers={max(total // 2, 1)})`."
        )
    if depth is not None:
        return choose_layers(total, depth)
    kept = list(layers or [])
    if not kept or any(not 0 <= index < total for index in kept):
        raise ValueError(f"`layers` must be indices from 0 to {total - 1}, at least one; got {kept}.")
    if kept != sorted(set(kept)):
        raise ValueError(f"`layers` must be increasing without repetition; got {kept}. Use {sorted(set(kept))}.")
    return kept

"""Feature dynamics: how a model's hidden states move over the vocabulary from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_distill.functional.fused import Head, chunk_rows, is_trained, vocabulary_of
from hf_distill.functional.head import LMHead
from hf_distill.functional.softmax import statistics_dtype


# Norms of differences are kept above this in the cosine, as in the paper.
EPS = 1e-5
# Tensors [n, V] in fp32 that a layer leaves for backward: log-probabilities, the teacher's, and both differences.
SAVED_BYTES = 4 * 4


def feature_dynamics(
    student: Sequence[Tensor],
    student_head: Head,
    teacher: Sequence[Tensor],
    teacher_head: Head,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Distances between the trajectories of two models through their own heads, and between the steps on them.

    With `u_j = log_softmax(head(h_j))` at layer j, the first is the mean over layers of `KL(exp(u_t) || exp(u_s))`,
    the second the mean over steps of one minus the cosine between `u_{j+1} - u_j` of student and teacher. Widths may
    differ; vocabularies are compared on the first `min(V_s, V_t)` tokens. Logits exist for a chunk of tokens at a
    time, and again in backward. Nothing flows back into the teacher; hidden states of no tokens still reach the
    student's head.
    Source: Beyond Logits: Aligning Feature Dynamics, ACL 2025 long.1125.

    Args:
        student: Hidden states `[N, H_s]` of at least two layers, in order.
        student_head: `LMHead`, or any callable from `[n, H_s]` to finite logits `[n, V_s]`.
        teacher: Hidden states `[N, H_t]` of as many layers.
        teacher_head: As `student_head`.
        chunk_bytes: Budget for what a chunk leaves for its backward; see `linear_distillation_loss`.

    Returns:
        Two values for each token, `[N]` each, in fp32 (fp64 for fp64).

    Raises:
        ValueError: There are fewer than two layers, or not as many on both sides.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"`student` holds {len(student)} layers and `teacher` {len(teacher)}; expected as many of both, at least "
            "2, because steps between layers are compared."
        )
    count = len(student[0])
    width = min(vocabulary_of(student_head, student[0]), vocabulary_of(teacher_head, teacher[0]))

    def of_chunk(part: slice, *hidden: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = [_logits(teacher_head, states[part], width) for states in teacher]
        return _compare([_logits(student_head, states, width) for states in hidden], theirs)

    row_bytes, chunks = len(student) * width * SAVED_BYTES, []
    rows = chunk_rows(count, row_bytes, chunk_bytes, trained_head=is_trained(student_head))
    for start in range(0, max(count, 1), rows):
        part = slice(start, start + rows)
        hidden = [states[part] for states in student]
        if torch.is_grad_enabled():
            chunks.append(checkpoint(of_chunk, part, *hidden, use_reentrant=False))
        else:
            chunks.append(of_chunk(part, *hidden))
    trajectory, derivative = torch.cat(chunks, dim=1).unbind()
    return trajectory, derivative


def _logits(head: Head, hidden: Tensor, width: int) -> Tensor:
    if isinstance(head, LMHead):
        hidden = hidden.to(head.weight.dtype)
    return head(hidden)[:, :width]


def _compare(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Trajectory and derivative of a chunk, `[2, n]`, from logits `[n, V]` by layer."""
    divergences, turns = [], []
    previous = None
    with torch.autocast(student[0].device.type, enabled=False):
        for ours, theirs in zip(student, teacher, strict=True):
            log_q, log_p = (side.log_softmax(-1, dtype=statistics_dtype(side.dtype)) for side in (ours, theirs))
            divergences.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
            if previous is not None:
                turns.append(_turn(log_q - previous[0], log_p - previous[1]))
            previous = log_q, log_p
        return torch.stack([torch.stack(divergences).mean(0), torch.stack(turns).mean(0)])


def _turn(ours: Tensor, theirs: Tensor) -> Tensor:
    """`1 - cos` of two steps, `[n, V]` each."""
    norms = [torch.linalg.vecdot(step, step).clamp(min=EPS**2).sqrt() for step in (ours, theirs)]
    return 1 - torch.linalg.vecdot(ours, theirs) / (norms[0] * norms[1])

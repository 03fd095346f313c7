"""Distances between the attention of a student and a teacher, without building the maps of a whole layer.

Student first, then teacher; one value per query, in fp32 (or fp64). A key counts where both models' queries see it, so
that what one of them cannot see has no logarithm and no gradient. Scores are built for a few queries at a time, and
again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# Scores of student and teacher that are held at once: 16 MiB in fp32, and a few times that for what is made of them.
CHUNK = 2**22
# MiniLMv2's relation heads: as many as leave the teacher's this wide (48 and 64 in its models of 768 and 1024).
RELATION_WIDTH = 16
MOST_RELATION_HEADS = 64
# Added to the scores of hidden keys: far below any score, and finite.
HIDDEN = -1e30

Seen = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """The attention scores of one layer, not built yet: `softcap(scaling * query @ key)`.

    Args:
        query: `[B, H, S, d]`.
        key: `[B, H_kv, S, d]`; H is a multiple of H_kv.
        seen: What the queries at some positions (`[M]` int64) of one row of the batch see: `[1 or H, M, S]`, bool, or
            numbers that are added to the scores, the lowest of their type for hidden keys.
        scaling: Factor of the scores.
        softcap: `softcap * tanh(scores / softcap)`; None for no cap.
    """

    query: Tensor
    key: Tensor
    seen: Seen
    scaling: float
    softcap: float | None = None

    def of(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """Scores `[H, M, S]` of some queries `[M, H, d]` of a row with the keys `[H_kv, S, d]` of that row.

        `bias` `[1 or H, M, S]` is added to them.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        # The queries are scaled, which are smaller than the scores.
        grouped = (query.to(dtype) * self.scaling).transpose(0, 1).reshape(len(key), -1, query.shape[-1])
        scores = (grouped @ key.to(dtype).mT).view(query.shape[1], len(query), -1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.add_(bias)


def map_kl(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """KL(teacher, student) of attention maps, a mean over heads: scores `[H_s, M, S]` and `[H_t, M, S]` to `[M]`.

    Source: MiniLM, arXiv 2002.10957, for equal numbers of heads. Where one number divides the other, maps of the model
    with more heads are averaged in groups of neighbours, otherwise over all heads: averages are blunter than any head.
    """
    heads = _common_heads(student, teacher)
    # Hidden keys have logarithms too low for a probability, and no gradient. A softmax takes a fifth of the time that
    # the exponential of such logarithms would.
    difference = _log_maps(teacher, heads) - _log_maps(student, heads)
    return (_maps(teacher, heads) * difference).sum(-1).mean(0)


def map_mse(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """Squared difference of attention maps, a sum over keys and a mean over heads as in `map_kl`: from 0 to 2.

    A mean over keys would vanish in long sequences, where every entry of a map is small.
    """
    heads = _common_heads(student, teacher)
    return (_maps(student, heads) - _maps(teacher, heads)).square().masked_fill(~visible, 0).sum(-1).mean(0)


def score_mse(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """Mean squared difference of scores before the softmax, over visible keys and heads: `[H, M, S]` twice to `[M]`.

    Source: TinyBERT, arXiv 1909.10351.

    Raises:
        ValueError: The numbers of heads differ.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"Scores of {len(student)} heads (student) and {len(teacher)} heads (teacher) cannot be subtracted; use "
            "`map_kl` or `map_mse`, which average heads, or relations."
        )
    squares = (student - teacher).square().masked_fill(~visible, 0)
    return (squares.sum(-1) / visible.sum(-1).clamp(min=1)).mean(0)


SCORE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "map_kl": map_kl,
    "map_mse": map_mse,
    "score_mse": score_mse,
}


def score_distance(student: Scores, teacher: Scores, index: Tensor, loss: str) -> Tensor:
    """One of `SCORE_LOSSES` for some queries of a batch.

    Args:
        student: Scores of the student's layer.
        teacher: Scores of the teacher's, for the same tokens.
        index: Queries in the flattened `[B, S]`, `[M]` int64, ascending.
        loss: A name of `SCORE_LOSSES`.

    Returns:
        `[M]`.
    """
    batch, _, length, _ = student.query.shape
    step = max(1, CHUNK // ((student.query.shape[1] + teacher.query.shape[1]) * length))
    counts = torch.bincount(index // length, minlength=batch).tolist()
    sizes = [(row, min(step, count - start)) for row, count in enumerate(counts) for start in range(0, count, step)]
    queries = [side.query.transpose(1, 2).flatten(0, 1).index_select(0, index) for side in (student, teacher)]
    # Taken apart once: the gradients of the parts are put together once.
    keys = student.key.unbind(0), teacher.key.unbind(0)
    parts = (tensor.split([size for _, size in sizes]) for tensor in (*queries, index % length))
    values = []
    for (row, _), ours, theirs, positions in zip(sizes, *parts, strict=True):
        chunk = partial(_chunk, student, teacher, loss, row)
        inputs = ours, keys[0][row], theirs, keys[1][row], positions
        values.append(checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(values) if values else queries[0].float().sum((1, 2))


def relation_distance(
    student: Tensor, teacher: Tensor, seen: tuple[Seen, Seen], index: Tensor, heads: int | None = None
) -> Tensor:
    """KL of the relations among queries (or keys, or values) of two layers: `[M]`, a mean over relation heads.

    All heads are put side by side and cut into relation heads; the relation of a position is the softmax, over what
    it sees, of its scaled products with the others. Widths and heads of the models may differ, and a rotation inside
    a relation head changes nothing. Source: MiniLMv2, arXiv 2012.15828.

    Args:
        student: `[B, H_s, S, d_s]`.
        teacher: `[B, H_t, S, d_t]`.
        seen: What positions see in the student and in the teacher; see `Scores`.
        index: As in `score_distance`.
        heads: Relation heads, a divisor of both widths; None chooses them, see `relation_heads`.

    Raises:
        ValueError: The number of heads does not divide both widths.
    """
    widths = [states.shape[1] * states.shape[3] for states in (student, teacher)]
    heads = relation_heads(*widths) if heads is None else heads
    if any(width % heads for width in widths):
        raise ValueError(f"`heads` is {heads}; expected a divisor of both widths, {widths[0]} and {widths[1]}.")
    sides = []
    for states, side_seen in zip((student, teacher), seen, strict=True):
        cut = states.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
        sides.append(Scores(cut, cut, side_seen, cut.shape[-1] ** -0.5))
    return score_distance(sides[0], sides[1], index, "map_kl")


def relation_heads(student_width: int, teacher_width: int) -> int:
    """The default number of relation heads: a divisor of both widths, as near to MiniLMv2's as there is."""
    most = min(MOST_RELATION_HEADS, max(1, teacher_width // RELATION_WIDTH))
    common = math.gcd(student_width, teacher_width)
    return max(number for number in range(1, most + 1) if common % number == 0)


def _chunk(
    student: Scores,
    teacher: Scores,
    loss: str,
    row: int,
    ours: Tensor,
    our_keys: Tensor,
    theirs: Tensor,
    their_keys: Tensor,
    positions: Tensor,
) -> Tensor:
    """The values of a few queries of one row of the batch."""
    sides, visible = [], torch.ones((), dtype=torch.bool, device=positions.device)
    for side, query, key in ((student, ours, our_keys), (teacher, theirs, their_keys)):
        bias, seen = None, side.seen(row, positions)
        if seen.dtype != torch.bool:
            bias, seen = seen, seen > torch.finfo(seen.dtype).min / 2
        visible = visible & seen.all(0, keepdim=True)
        sides.append((side, query, key, bias))
    hidden = torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, HIDDEN)
    scores = [
        side.of(query, key, hidden if bias is None else bias.where(visible, hidden))
        for side, query, key, bias in sides
    ]
    return SCORE_LOSSES[loss](scores[0], scores[1], visible)


def _common_heads(student: Tensor, teacher: Tensor) -> int:
    few, many = sorted((len(student), len(teacher)))
    return few if many % few == 0 else 1


def _maps(scores: Tensor, heads: int) -> Tensor:
    """Attention maps, averaged to some number of heads."""
    maps = scores.softmax(-1)
    return maps if len(maps) == heads else maps.unflatten(0, (heads, -1)).mean(1)


def _log_maps(scores: Tensor, heads: int) -> Tensor:
    """Their logarithms, finite everywhere."""
    maps = scores.log_softmax(-1)
    return maps if len(maps) == heads else maps.unflatten(0, (heads, -1)).logsumexp(1) - math.log(len(maps) // heads)

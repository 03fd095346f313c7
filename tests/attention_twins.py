"""Attention in full, `[B, H, S, S]` by plain autograd, for what the package never builds."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.signals import AttentionStates


def naive_scores(states: AttentionStates) -> Tensor:
    """Scores of all heads, with hidden keys as they are."""
    key = states.key.repeat_interleave(states.query.shape[1] // states.key.shape[1], dim=1)
    scores = states.query @ key.transpose(2, 3) * states.scaling
    scores = scores if states.softcap is None else states.softcap * torch.tanh(scores / states.softcap)
    mask = states.visibility.mask
    return scores if mask is None or mask.dtype == torch.bool else scores + mask.clamp(min=-1e4)


def naive_visible(states: AttentionStates) -> Tensor:
    """`[B, 1, S, S]` bool."""
    batch, _, length, _ = states.key.shape
    rows = torch.stack([states.seen(row, torch.arange(length)) for row in range(batch)])
    return rows if rows.dtype == torch.bool else rows > -1e30


def naive_maps(states: AttentionStates, visible: Tensor | None = None) -> Tensor:
    """Attention maps; rows that see nothing are zero."""
    return masked_softmax(naive_scores(states), naive_visible(states) if visible is None else visible)


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over what is visible, zero elsewhere."""
    nothing = ~visible.any(-1, keepdim=True)
    return scores.masked_fill(~(visible | nothing), float("-inf")).softmax(-1) * visible


def naive_kl(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """KL(teacher, student) of every row of maps, `[B, S]`, a mean over heads."""
    logarithms = [maps.masked_fill(~visible, 1.0).log() for maps in (student, teacher)]
    return (teacher * (logarithms[1] - logarithms[0])).sum(-1).mean(1)

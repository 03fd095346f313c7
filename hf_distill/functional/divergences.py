"""Divergences between a student's and a teacher's next-token distributions: the definitions.

Every function takes logits `[..., V]`, student first, and returns one value per token `[...]`: no mask, no mean and no
factor T^2, which belong to the caller. Throughout, q is the student's distribution softmax(z_s / T), p the teacher's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


# First guess for how many of the teacher's largest probabilities hold `mass`; grows eightfold where they do not.
_HEAD_GUESS = 64


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is a positive finite number."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"`temperature` must be a positive finite number, got {temperature}. Set e.g. temperature=1.0."
        )


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax of `logits / temperature`, in fp32 (bf16 moves the KL of close models by several percent)."""
    check_temperature(temperature)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits.to(dtype) / temperature, dim=-1)


def _both(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, after checking that they speak of the same vocabulary."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student and teacher logits must have the same shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}. Vocabularies padded differently are compared on their shared part: "
            "logits[..., :min(V_s, V_t)]."
        )
    return _log_probs(student_logits, temperature), _log_probs(teacher_logits, temperature)


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    """Sum of `probs * values` over the vocabulary with 0 * inf = 0, in value and in gradient."""
    return (probs * torch.where(probs > 0, values, 0.0)).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) from log-probabilities `[..., V]`."""
    return _expected(log_a.exp(), log_a - log_b)


def _log_mixture(log_a: Tensor, log_b: Tensor, share_of_a: float) -> Tensor:
    """Log of `share_of_a * a + (1 - share_of_a) * b`; 0, not -inf, where both are zero."""
    mixture = share_of_a * log_a.exp() + (1 - share_of_a) * log_b.exp()
    return torch.where(mixture > 0, mixture, 1.0).log()


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q), teacher over student: mean seeking. Its gradient in the student's logits is (q - p) / T.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(q || p), student over teacher: mode seeking.

    Source: Gu et al., MiniLLM, arXiv 2306.08543.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return _kl(log_q, log_p)


def symmetric_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, weight: float = 0.5
) -> Tensor:
    """`weight * KL(p || q) + (1 - weight) * KL(q || p)`.

    Source: Ko et al., DistiLLM, arXiv 2402.03898 (as a baseline, with weight 0.9).

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.
        weight: Share of the forward KL, in [0, 1].

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: `beta * KL(p || m) + (1 - beta) * KL(q || m)` with `m = beta * p + (1 - beta) * q`.

    It vanishes as beta goes to 0 or 1 (only JSD / beta tends to a KL), so the ends are not special cases here: ask for
    `forward_kl` or `reverse_kl` instead.

    Source: Agarwal et al., GKD, arXiv 2306.13649.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.
        beta: The teacher's share of the mixture, in (0, 1).

    Returns:
        `[...]`, in nats; at most ln 2 for beta 0.5.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, skew: float = 0.1) -> Tensor:
    """`KL(p || skew * p + (1 - skew) * q)`: a forward KL that is never larger than -ln(skew).

    Source: Ko et al., DistiLLM, arXiv 2402.03898.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.
        skew: The teacher's share of the mixture, in [0, 1).

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """`KL(q || skew * q + (1 - skew) * p)`: a reverse KL that is never larger than -ln(skew).

    Source: Ko et al., DistiLLM, arXiv 2402.03898.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.
        skew: The student's share of the mixture, in [0, 1).

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return _kl(log_q, _log_mixture(log_q, log_p, skew))


@torch.no_grad()
def adaptive_weights(student_probs: Tensor, teacher_probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Shares of forward and reverse KL in `adaptive_kl`: where |p - q| lies, in the teacher's head or in its tail.

    The head is the teacher's most probable tokens whose inclusive cumulative mass stays within `mass`, and always the
    top token. Finding it reads one flag back from the device per growth of the search.

    Args:
        student_probs: `[..., V]`.
        teacher_probs: `[..., V]`.
        mass: In [0, 1].

    Returns:
        Two tensors `[...]` that sum to 1, or to 0 where the distributions are equal.
    """
    width = teacher_probs.shape[-1]
    size = min(_HEAD_GUESS, width)
    top, index = teacher_probs.topk(size, dim=-1)
    while size < width and bool((top.sum(-1) <= mass).any()):
        size = min(8 * size, width)
        top, index = teacher_probs.topk(size, dim=-1)
    in_head = top.cumsum(-1) <= mass
    in_head[..., 0] = True
    gap = (teacher_probs - student_probs).abs()
    total = gap.sum(-1)
    head = (gap.gather(-1, index) * in_head).sum(-1).clamp(max=total)  # rounding must not make the tail negative
    divisor = torch.where(total > 0, total, 1.0)
    return head / divisor, (total - head) / divisor


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, mass: float = 0.5
) -> Tensor:
    """Forward and reverse KL, mixed per token by where student and teacher differ (see `adaptive_weights`).

    Source: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs, arXiv 2404.02657.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.
        mass: Cumulative teacher probability that makes the head, in [0, 1].

    Returns:
        `[...]`, in nats. The mixing weights carry no gradient.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    head, tail = adaptive_weights(log_q.exp(), log_p.exp(), mass)
    return head * _kl(log_p, log_q) + tail * _kl(log_q, log_p)


def tvd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Total variation distance `0.5 * sum |p - q|`, in [0, 1]. It does not take the factor T^2.

    Source: Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv 2307.15190.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.

    Returns:
        `[...]`.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to soft labels, `-sum p log q`: KL(p || q) plus the teacher's entropy, so the same gradient.

    Its smallest value is the teacher's entropy, not 0: never compare it with a KL.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return _expected(log_p.exp(), -log_q)


def log_interpolated(student_log_probs: Tensor, teacher_log_probs: Tensor, t: float) -> Tensor:
    """Log-probabilities of TAID's target: the student's logits at `t` 0, the teacher's at 1, `[..., V]`.

    Interpolating log-probabilities instead of logits shifts each row by a constant, which the softmax removes.
    """
    if t in (0, 1):  # 0 * -inf would be NaN
        return teacher_log_probs if t else student_log_probs
    return torch.log_softmax((1 - t) * student_log_probs + t * teacher_log_probs, dim=-1)  # torch.lerp: inf - inf


def taid(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, t: float) -> Tensor:
    """KL(p_t || q), p_t being the softmax of `(1 - t) * stop_gradient(student) + t * teacher` (logits).

    A pure function of `t`: whoever trains moves t from about 0.4 to 1. t = 1 is `forward_kl`, t = 0 has no gradient.

    Source: Shing et al., TAID, arXiv 2501.16937.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V]`.
        temperature: Divides both logits.
        t: How far the target has moved from student to teacher, in [0, 1].

    Returns:
        `[...]`, in nats.
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return _kl(log_interpolated(log_q.detach(), log_p, t), log_q)

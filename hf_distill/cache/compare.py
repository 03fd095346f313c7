"""How far what a cache gives of some tokens is from the teacher's own distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.functional.sparse import SparseLogits
from hf_distill.signals import Projection


# Logarithm of a mass that rounding made 0 or less.
_NOTHING = -1e30


def kl_from_cache(logits: Tensor, targets: SparseLogits | Projection, temperature: float) -> Tensor:
    """KL(teacher || cache), in nats, `[N]`.

    Of the most likely ids with one bucket for all others: between the two distributions over ids and bucket. Where
    the ids were sampled there is no such thing, and it is instead what a student that is equal to the teacher
    would pay, `-sum(masses * log p) - H(p)`: wrong for each token, and 0 on average.

    Args:
        logits: The teacher's, `[N, V]`.
        targets: What the cache gives for these tokens.
        temperature: T, of both.
    """
    log_p = (logits.double() / temperature).log_softmax(-1)
    if isinstance(targets, Projection):
        log_c = (targets.head(targets.hidden).double() / temperature).log_softmax(-1)
        return _divergence(log_p, log_c)
    ids = targets.ids.clamp(min=0)
    if targets.masses is not None:
        masses = targets.masses_at(temperature).double().where(targets.known, 0.0)
        return -torch.linalg.vecdot(masses, log_p.gather(1, ids)) - targets.entropy_at(temperature).double()
    log_c = targets.log_probs_at(temperature).double().where(targets.known, _NOTHING)
    log_rest = targets.log_rest_at(temperature)
    if log_rest is None:
        log_rest = torch.log1p(-log_c.exp().sum(1)).nan_to_num(nan=_NOTHING, neginf=_NOTHING)
    reduced = log_p.gather(1, ids).where(targets.known, _NOTHING)
    # An unused slot holds any id, also one that another slot uses.
    known = torch.zeros_like(log_p).scatter_add_(1, ids, targets.known.double()) > 0
    bucket = log_p.where(~known, -torch.inf).logsumexp(1, keepdim=True)
    return _divergence(torch.cat([reduced, bucket], 1), torch.cat([log_c, log_rest.double()[:, None]], 1))


def _divergence(log_p: Tensor, log_c: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p - log_c)).where(p > 0, 0.0).sum(1)

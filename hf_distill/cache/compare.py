"""How far what a cache gives of some tokens is from the teacher's own distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.cache.encoding import Encoding
from hf_distill.functional.sparse import SparseLogits
from hf_distill.signals import Projection


# Of log-probabilities in a few bits; of nothing but the order of sums; of hidden states in 8 bits.
QUANTISATION_FLOOR, EXACT_FLOOR, FP8_FLOOR = 2e-3, 1e-6, 2e-2
# Of a teacher that computes in 16 bits, or of what is kept in them.
NOISE_OF_16_BITS = 1e-3
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


@dataclass(frozen=True)
class Comparison:
    """What a cache gives of N tokens, against the teacher.

    Args:
        kl: See `kl_from_cache`, at each of some temperatures, `[N, T]`.
        label_errors: Of the log-probability of the label, `[N]`.
        agrees: Whether the most likely token is the same one, `[N]` bool; None where it is not kept.
    """

    kl: Tensor
    label_errors: Tensor
    agrees: Tensor | None


def join(parts: Sequence[Comparison]) -> Comparison:
    """Several, one after another."""
    agrees = [part.agrees for part in parts if part.agrees is not None]
    return Comparison(
        kl=torch.cat([part.kl for part in parts]),
        label_errors=torch.cat([part.label_errors for part in parts]),
        agrees=torch.cat(agrees) if agrees else None,
    )


def compare(
    logits: Tensor, targets: SparseLogits | Projection, labels: Tensor, temperatures: tuple[float, ...]
) -> Comparison:
    """Compare N tokens.

    Args:
        logits: The teacher's, `[N, V]`.
        targets: What the cache gives.
        labels: The tokens that followed, `[N]` int64.
        temperatures: At which.
    """
    stored, top = _label_and_top(targets, labels)
    exact = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return Comparison(
        kl=torch.stack([kl_from_cache(logits, targets, temperature) for temperature in temperatures], 1),
        label_errors=(stored.double() - exact).abs(),
        agrees=None if top is None else top == logits.argmax(1),
    )


def kl_floor(encoding: Encoding, *, is_16_bit: bool) -> float:
    """What the mean KL of a cache from its own teacher may be, in nats: by rounding alone.

    Args:
        encoding: Of the cache.
        is_16_bit: Whether the teacher computes in 16 bits: it then says something else of a row in another batch.
    """
    noise = NOISE_OF_16_BITS if is_16_bit else 0.0
    kept = encoding.config().get("dtype")
    if kept is None:
        return QUANTISATION_FLOOR + noise
    if kept == "float8_e4m3":
        return FP8_FLOOR + noise
    return EXACT_FLOOR + (noise if kept == "float32" else NOISE_OF_16_BITS)


def _label_and_top(targets: SparseLogits | Projection, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The log-probability of the label that is kept, and the most likely token, if it is."""
    if isinstance(targets, Projection):
        log_probs = targets.head(targets.hidden).double().log_softmax(-1)
        return log_probs.gather(1, labels[:, None])[:, 0], log_probs.argmax(1)
    if targets.log_probs is None:
        return targets.label_log_probs, None
    return targets.label_log_probs, targets.ids.gather(1, targets.log_probs.argmax(1, keepdim=True))[:, 0]

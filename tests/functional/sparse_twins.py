"""Sparse targets of a case's teacher, and the naive twin of what the fused loss makes of them."""

import math

import torch
from torch import Tensor

from hf_distill.functional import DIVERGENCES, SparseLogits


TEMPERATURES = (0.5, 1.0, 2.0)
COARSE = sorted(name for name, row in DIVERGENCES.items() if not row.whole_vocabulary)
SAMPLED = ["forward_kl", "soft_cross_entropy"]


def targets_at(
    ids: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    masses: Tensor | None = None,
    known: Tensor | None = None,
    log_probs: bool = True,
    rests: bool = True,
    dtype: torch.dtype | None = None,
) -> SparseLogits:
    """Targets at some ids `[N, K]` from a teacher's logits `[N, V]`; slots where `known` is False are unused."""
    logits = logits.detach().double()
    kept = torch.log_softmax(logits, -1).gather(1, ids)
    if known is not None:
        kept = kept.masked_fill(~known, -math.inf)
        masses = None if masses is None else masses * known
    full = {t: torch.log_softmax(logits / t, -1) for t in TEMPERATURES}
    at_one = full[1.0]
    used = torch.ones_like(ids, dtype=torch.bool) if known is None else known
    beyond = torch.ones_like(at_one, dtype=torch.bool)
    beyond[used.nonzero(as_tuple=True)[0], ids[used]] = False
    return SparseLogits(
        ids=ids,
        log_probs=kept if log_probs else None,
        masses=masses,
        log_normalisers={t: (at_one / t).logsumexp(-1) for t in TEMPERATURES},
        entropies={t: -(values.exp() * values).sum(-1) for t, values in full.items()},
        labels=labels,
        label_log_probs=at_one.gather(1, labels.clamp(min=0)[:, None]).squeeze(1),
        vocab_size=logits.shape[1],
        knows_top=log_probs,
        log_rests={t: values.masked_fill(~beyond, -math.inf).logsumexp(-1) for t, values in full.items() if rests},
    ).to(torch.empty(0, dtype=dtype or torch.float64))


def top(case, k: int, *, holes: bool = False, **arguments) -> SparseLogits:
    """The k most likely ids; with `holes` some of the later slots are unused and repeat the first id."""
    logits = case.teacher_head(case.teacher_hidden)
    ids, known = logits.topk(k).indices, None
    if holes:
        known = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) > 0.3
        known[:, 0] = True
        ids = torch.where(known, ids, ids[:, :1])
    return targets_at(ids, logits, case.labels, known=known, dtype=case.hidden.dtype, **arguments)


def sampled(
    logits: Tensor, labels: Tensor, *, exact: int = 0, draws: int = 20, seed: int = 3, **arguments
) -> SparseLogits:
    """The `exact` most likely ids, and the rest of p drawn with replacement: an unbiased estimate of p."""
    probs = torch.softmax(logits.detach().double(), -1)
    masses = torch.zeros_like(probs)
    rest = probs.clone()
    if exact:
        head = probs.topk(exact).indices
        masses.scatter_(1, head, probs.gather(1, head))
        rest.scatter_(1, head, 0.0)
    left = rest.sum(-1, keepdim=True)
    drawn = rest.multinomial(draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    masses.scatter_add_(1, drawn, (left / draws).expand_as(drawn).contiguous())
    kept, ids = masses.topk(int((masses > 0).sum(-1).max()))
    known = kept > 0
    return targets_at(ids.where(known, ids[:, :1]), logits, labels, masses=kept, known=known, **arguments)


def sparse_divergence(bound, student: Tensor, targets: SparseLogits, temperature: float) -> Tensor:
    """A divergence as sparse targets know it, per token, for the student's logits over the shared vocabulary."""
    name, log_q = bound.divergence.name, torch.log_softmax(student / temperature, -1)
    if targets.masses is not None and name in SAMPLED:
        value = -(_over_vocabulary(targets, temperature)[:, : student.shape[1]].to(log_q.dtype) * log_q).sum(-1)
        return value - targets.entropies[temperature] if name == "forward_kl" else value
    return bound(*_with_bucket(log_q, targets, temperature))


def _log_probs(targets: SparseLogits, temperature: float) -> Tensor:
    return targets.log_probs / temperature - targets.log_normalisers[temperature][:, None]


def _over_vocabulary(targets: SparseLogits, temperature: float) -> Tensor:
    masses = targets.masses
    if temperature != 1:
        tilt = (_log_probs(targets, temperature) - targets.log_probs).exp()
        masses = torch.where(masses > 0, masses * tilt, 0.0)
    return masses.new_zeros(len(masses), targets.vocab_size).scatter_add(1, targets.ids, masses)


def _with_bucket(log_q: Tensor, targets: SparseLogits, temperature: float) -> tuple[Tensor, Tensor]:
    """Both distributions over the known ids, and one outcome for what is left of the vocabulary, `[n, K + 1]`."""
    log_p, vocabulary = _log_probs(targets, temperature).to(log_q.dtype), log_q.shape[1]
    inside, ids = targets.ids < vocabulary, targets.ids.clamp(max=vocabulary - 1)
    known = (log_p > -math.inf) & inside
    scale = (1 - log_p.exp().masked_fill(inside, 0).sum(1, keepdim=True)).log()
    left = torch.ones_like(log_q, dtype=torch.bool)
    left[known.nonzero(as_tuple=True)[0], ids[known]] = False
    if targets.log_rests:
        rest = targets.log_rests[temperature].to(log_q.dtype)[:, None]
    else:
        rest = (1 - log_p.exp().sum(1, keepdim=True)).log()
    student = log_q.gather(1, ids).masked_fill(~known, -math.inf), log_q.masked_fill(~left, -math.inf)
    return (
        torch.cat([student[0], student[1].logsumexp(1, keepdim=True)], 1),
        torch.cat([log_p.masked_fill(~known, -math.inf), rest], 1) - scale,
    )


def draws(case, **arguments):
    return sampled(case.teacher_head(case.teacher_hidden), case.labels, dtype=case.hidden.dtype, **arguments)


def gradients(out, case):
    return torch.autograd.grad(out.loss, case.leaves)

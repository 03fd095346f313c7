"""Losses as pure functions of tensors: torch only, no mask, no mean, no state."""

from hf_distill.functional.divergences import (
    adaptive_kl,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
    taid,
    tvd,
)
from hf_distill.functional.fused import LinearLossOutput, linear_distillation_loss
from hf_distill.functional.head import LMHead
from hf_distill.functional.recipe import METRICS
from hf_distill.functional.reduce import reduce_sum
from hf_distill.functional.registry import DIVERGENCES, BoundDivergence, Divergence, resolve_divergence
from hf_distill.functional.sparse import SparseLogits


__all__ = [
    "DIVERGENCES",
    "METRICS",
    "BoundDivergence",
    "Divergence",
    "LMHead",
    "LinearLossOutput",
    "SparseLogits",
    "adaptive_kl",
    "forward_kl",
    "jsd",
    "linear_distillation_loss",
    "reduce_sum",
    "resolve_divergence",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "symmetric_kl",
    "taid",
    "tvd",
]

"""Distances between hidden states of a student and a teacher: the definitions.

Student first, then teacher; both in fp32 (or fp64), whatever precision comes in. The first four take vectors of one
width and return one value per token; `cka` and `procrustes` compare two sets of tokens as a whole, of any widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


# A vector or a matrix of zeros has no direction; squared norms are kept above this.
TINY = 1e-12


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the width: `[N, H]` twice to `[N]`.

    A few dimensions of a decoder's first token are hundreds of times larger than the rest and rule this distance;
    `relative_mse` and `cosine` do not have that problem. Source: FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351.
    """
    student, teacher = _same_width(student, teacher)
    return (student - teacher).square().mean(-1)


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference over the teacher's squared norm: `[N, H]` twice to `[N]`; 1 for a student of zeros.

    Source: the latent term in the code of Minixhofer et al., arXiv 2503.20083.
    """
    student, teacher = _same_width(student, teacher)
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=TINY)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of the angle: `[N, H]` twice to `[N]`, from 0 to 2.

    Source: DistilBERT, arXiv 1910.01108.
    """
    student, teacher = _same_width(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=-1, eps=TINY**0.5)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of the smooth L1 difference (quadratic below 1): `[N, H]` twice to `[N]`.

    Source of the function: Girshick, Fast R-CNN, arXiv 1504.08083; it was not made for hidden states.
    """
    student, teacher = _same_width(student, teacher)
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the linear centred kernel alignment of two sets of tokens: `[N, H_s]` and `[N, H_t]` to 0-dim.

    It does not change when either side is rotated, shifted or scaled, so no projector is needed. With fewer tokens
    than dimensions it is biased towards 0: give it many. Source: Kornblith et al., arXiv 1905.00414.
    """
    student, teacher = same_tokens(student, teacher)
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    shared = _gram_product(student, teacher)
    own = _gram_product(student, student) * _gram_product(teacher, teacher)
    return 1 - shared / own.clamp(min=TINY).sqrt()


def procrustes(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance left after the best rotation of one set of tokens onto the other: `[N, H_s]`, `[N, H_t]` to 0-dim.

    Both sets are centred and scaled to norm 1; with unequal widths the narrower one is padded with zeros. The value is
    `1 - sum(singular values of S^T T)`, from 0 to 1. It is zero only where the geometry is the same, which a trained
    projector does not ensure. Source: arXiv 2509.25253.
    """
    student, teacher = same_tokens(student, teacher)
    student, teacher = _unit(student - student.mean(0)), _unit(teacher - teacher.mean(0))
    product = student.t() @ teacher
    # The nuclear norm is the largest <R, product> over orthogonal R; there its gradient is R, which needs no
    # derivative of the decomposition (undefined where singular values meet).
    left, _, right = torch.linalg.svd(product.detach(), full_matrices=False)
    return 1 - ((left @ right) * product).sum()


PER_TOKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "relative_mse": relative_mse,
    "cosine": cosine,
    "smooth_l1": smooth_l1,
}
PER_SET: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cka": cka, "procrustes": procrustes}


def _statistics(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _same_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher features must have the same shape, got {list(student.shape)} and "
            f"{list(teacher.shape)}. Project the student's to the teacher's width first, or use `cka` or `procrustes`."
        )
    return _statistics(student), _statistics(teacher)


def same_tokens(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check two sets of tokens, and return them in the precision of the statistics.

    Raises:
        ValueError: They are no matrices, or not of the same tokens.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(
            f"Features must be [N, H_s] and [N, H_t], one row per token, got {list(student.shape)} and "
            f"{list(teacher.shape)}. Flatten batch and positions, and drop the padding."
        )
    return _statistics(student), _statistics(teacher)


def _gram_product(a: Tensor, b: Tensor) -> Tensor:
    """`||a^T b||_F^2` = <a a^T, b b^T>, by the smaller of the two ways."""
    if len(a) < min(a.shape[1], b.shape[1]):
        return ((a @ a.t()) * (b @ b.t())).sum()
    return (a.t() @ b).square().sum()


def _unit(features: Tensor) -> Tensor:
    return features / features.square().sum().clamp(min=TINY).sqrt()

"""Distances between the relations of tokens: how they lie to each other in the student and in the teacher.

Arguments are `[N, H_s]` and `[N, H_t]`, one row per token, of any widths; results are 0-dim. What one token is in
itself does not matter, so there is no projector: nothing changes when either side is rotated or scaled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.functional.features import TINY, same_tokens


# The weight of angles beside distances in the authors' code.
ANGLE_WEIGHT = 2.0


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 difference of all distances, each model's in units of their mean: a mean over pairs of tokens.

    Source: Relational Knowledge Distillation, arXiv 1904.05068. The mean is over the N (N - 1) ordered pairs of
    different tokens; the authors divide by N^2, which counts every token's distance from itself.
    """
    student, teacher = same_tokens(student, teacher)
    return _distance_loss(_Geometry(student), _Geometry(teacher)).to(student.dtype)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 difference of the cosines of the angles that tokens i, k form at j: a mean over triples.

    The mean is over triples of different tokens; those with no angle, because two of the tokens are equal in one of
    the models, are left out. It builds some ten tensors of 8 N^3 bytes: 20 MB for 64 tokens, 10 GB for 512.
    Source: Relational Knowledge Distillation, arXiv 1904.05068.
    """
    student, teacher = same_tokens(student, teacher)
    return _angle_loss(_Geometry(student), _Geometry(teacher)).to(student.dtype)


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """`rkd_distance` and twice `rkd_angle`, as in the authors' code."""
    student, teacher = same_tokens(student, teacher)
    ours, theirs = _Geometry(student), _Geometry(teacher)
    return (_distance_loss(ours, theirs) + ANGLE_WEIGHT * _angle_loss(ours, theirs)).to(student.dtype)


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """`||G_s - G_t||_F^2 / N^2`, G being the products of all pairs of tokens, every row scaled to length 1.

    Two tokens count as similar as their product says: unlike the RKD losses it is not free of a shift that all tokens
    have in common. It is at most 4 / N, so its weight is large (3000 for images).
    Source: Similarity-Preserving Knowledge Distillation, arXiv 1907.09682.
    """
    student, teacher = same_tokens(student, teacher)
    return (_similarities(student) - _similarities(teacher)).square().sum() / max(len(student), 1) ** 2


RELATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rkd": rkd,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "similarity": similarity,
}


class _Geometry:
    """Products and distances of the tokens of one model.

    Distances are differences of products, which cancel where tokens are close: the products are of centred features
    and, where the device has it, in float64 (N is small). What is left of rounding is below `floor` and counts as a
    distance of zero, without gradient: that of a square root ends there.

    Attributes:
        products: `[N, N]`, of the centred features.
        apart: `[N, N]`, which tokens differ; a token does not differ from itself.
        distances: `[N, N]`, zero where they do not.
    """

    def __init__(self, features: Tensor) -> None:
        features = features if features.device.type == "mps" else features.double()
        features = features - features.mean(0)
        self.products = features @ features.t()
        norms = self.products.diagonal()
        squares = norms[:, None] + norms - 2 * self.products
        floor = norms.detach().mean() * 1024 * torch.finfo(features.dtype).eps
        self.apart = (squares > floor).fill_diagonal_(False)
        self.distances = torch.where(self.apart, squares.where(self.apart, 1.0).sqrt(), 0.0)

    def relative(self) -> Tensor:
        """The distances in units of their mean."""
        mean = self.distances.sum() / self.apart.sum().clamp(min=1)
        return self.distances / mean.clamp(min=TINY)

    def cosines(self, angles: Tensor) -> Tensor:
        """`cos(e_ij, e_kj)` at `[j, i, k]`, e being the way from one token to another; 0 where `angles` is False."""
        at = self.products.diagonal()[:, None, None]
        products = self.products - self.products[:, :, None] - self.products[:, None, :] + at
        lengths = self.distances[:, :, None] * self.distances[:, None, :]
        return torch.where(angles, products / lengths.where(angles, 1.0), 0.0)


def _distance_loss(student: _Geometry, teacher: _Geometry) -> Tensor:
    count = len(student.distances)
    difference = F.smooth_l1_loss(student.relative(), teacher.relative(), reduction="sum")
    return difference / max(count * (count - 1), 1)


def _angle_loss(student: _Geometry, teacher: _Geometry) -> Tensor:
    apart = student.apart & teacher.apart
    angles = apart[:, :, None] & apart[:, None, :]
    angles.diagonal(dim1=1, dim2=2).fill_(False)  # the angle between a way and itself
    difference = F.smooth_l1_loss(student.cosines(angles), teacher.cosines(angles), reduction="sum")
    return difference / angles.sum().clamp(min=1)


def _similarities(features: Tensor) -> Tensor:
    products = features @ features.t()
    return products / products.square().sum(-1, keepdim=True).clamp(min=TINY).sqrt()

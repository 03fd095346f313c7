"""Maps from the student's width to the teacher's, trained beside the student and left behind with the run."""

from __future__ import annotations

import torch
from torch import nn


def build_projectors(student_size: int, teacher_size: int, pairs: int, *, shared: bool) -> nn.ModuleList:
    """One linear map for every pair of layers, or one for all of them; none where the widths agree.

    They have orthonormal rows or columns at first, the same on every rank: lengths and angles are kept as far as the
    widths allow, so that the first loss says how far the models are apart and not how a random map distorts them.

    Returns:
        `Linear(student_size, teacher_size)` modules: `pairs` of them, one if shared, or an empty list.
    """
    if student_size == teacher_size:
        return nn.ModuleList()
    count = 1 if shared else pairs
    projectors = nn.ModuleList(nn.Linear(student_size, teacher_size, bias=False) for _ in range(count))
    generator = torch.Generator().manual_seed(0)
    for projector in projectors:
        nn.init.orthogonal_(projector.weight, generator=generator)
    return projectors

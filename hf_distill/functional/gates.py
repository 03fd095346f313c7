"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with positive probability.

Source: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312, eqs. 10 to 12.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


# The authors' choices: the temperature, and the interval that a concrete variable is stretched to before it is cut.
TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1


def sampled_gates(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Draw gates, differentiable in their parameter.

    Args:
        log_alpha: The location of each gate, any shape.
        uniform: Numbers from [0, 1], of the same shape.

    Returns:
        Gates in [0, 1], of the same shape.
    """
    concrete = torch.sigmoid((torch.logit(uniform, eps=1e-6) + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def settled_gates(log_alpha: Tensor) -> Tensor:
    """The gates of a model that is evaluated, without noise."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not 0; their sum is the expected L0 norm."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))

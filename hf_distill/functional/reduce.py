"""The only place that divides a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def reciprocal(denominator: int | float | Tensor | None, count: Tensor) -> Tensor:
    """One over the denominator of a loss, without reading anything back from the device.

    Args:
        denominator: Usually the trainer's `num_items_in_batch`, the labelled tokens of all micro-batches and ranks;
            None takes `count`. The mean of micro-batch means would be biased.
        count: Labelled tokens (or the sum of their weights) of this batch, 0-dim.

    Returns:
        0-dim, fp32 or float64; 0 where the denominator is 0, so that a batch without labels gives a finite zero.

    Raises:
        ValueError: If `denominator` is a negative number, or a tensor with more than one element.
    """
    value = count if denominator is None else denominator
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"`denominator` must be one number, got a tensor of shape {list(value.shape)}.")
        value = value.detach().reshape(()).to(count.device)
    elif value < 0:
        raise ValueError(f"`denominator` must not be negative, got {value}. Pass the number of labelled tokens.")
    else:
        value = torch.tensor(value, device=count.device)
    value = value if value.dtype == torch.float64 else value.float()
    return torch.where(value > 0, 1 / value, 0.0)


def reduce_sum(total: Tensor, denominator: int | float | Tensor | None, count: Tensor) -> Tensor:
    """Divide a sum over tokens.

    Args:
        total: Sum of per-token values.
        denominator: See `reciprocal`.
        count: See `reciprocal`.

    Returns:
        `total / denominator`; 0, with `total`'s gradient path, where the denominator is 0.
    """
    return total * reciprocal(denominator, count).to(total.dtype)

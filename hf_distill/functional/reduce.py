"""The only place that divides a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def reciprocal(denominator: int | float | Tensor | None, count: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the denominator of a loss, without reading anything back from the device.

    Args:
        denominator: Usually the trainer's `num_items_in_batch`, the labelled tokens of all micro-batches and ranks;
            None takes `count`. The mean of micro-batch means would be biased.
        count: Labelled tokens (or the sum of their weights) of this batch, 0-dim.
        dtype: Of the result.

    Returns:
        0-dim; 0 where the denominator is 0, so that a batch without labels gives a finite zero.

    Raises:
        ValueError: If `denominator` is a negative number, or a tensor with more than one element.
    """
    if isinstance(denominator, Tensor) and denominator.numel() != 1:
        raise ValueError(f"`denominator` must be one number, got a tensor of shape {list(denominator.shape)}.")
    if isinstance(denominator, int | float) and not denominator >= 0:
        raise ValueError(f"`denominator` must not be negative, got {denominator}. Pass the number of labelled tokens.")
    value = torch.as_tensor(count if denominator is None else denominator, dtype=dtype, device=count.device)
    value = value.detach().reshape(())
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
    return total * reciprocal(denominator, count, total.dtype)

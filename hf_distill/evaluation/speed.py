"""How fast a model reads."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn


def tokens_per_second(model: nn.Module, input_ids: Tensor, repeats: int = 3) -> float:
    """Time forward passes in eval mode and return the tokens read per second, the median of the repeats.

    Compare models in one process, on the same rows and in the same dtype: the absolute number is the machine's.

    Args:
        model: Any model that takes `input_ids`; it is left in the mode in which it was.
        input_ids: `[B, S]`, on the model's device.
        repeats: Timed passes, after one that is not.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    seconds = []
    try:
        with torch.no_grad():
            for _ in range(repeats + 1):
                _wait(input_ids)
                started = time.perf_counter()
                model(input_ids=input_ids)
                _wait(input_ids)
                seconds.append(time.perf_counter() - started)
    finally:
        for module in training:
            module.training = True
    return input_ids.numel() / statistics.median(seconds[1:])


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from hf_distill.training.metrics import MetricWindow


def add(window, count, **sums):
    window.add({name: torch.tensor(value) for name, value in sums.items()}, torch.tensor(count))


def test_means_weigh_tokens_not_batches():
    window = MetricWindow(["kl"])
    add(window, 7, kl=21.0)
    add(window, 900, kl=900.0)
    assert window.reduce(Accelerator(cpu=True)) == pytest.approx({"kl": 921 / 907})


def test_a_name_that_some_batches_lack_is_averaged_over_those_that_have_it():
    window = MetricWindow(["kl", "nll"])
    add(window, 2, kl=4.0, nll=2.0)
    add(window, 2, nll=6.0)
    assert window.reduce(Accelerator(cpu=True)) == pytest.approx({"kl": 2.0, "nll": 2.0})


def test_reading_a_window_starts_a_new_one():
    window = MetricWindow(["kl"])
    add(window, 1, kl=1.0)
    window.reduce(Accelerator(cpu=True))
    assert window.reduce(Accelerator(cpu=True)) == {}

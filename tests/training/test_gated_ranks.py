"""Gates and draws of layers are the same on two ranks, which train as one process does."""

from __future__ import annotations

import pytest
import torch

from tests.training import gated_runs
from tests.training.runs import logged, trained
from tests.training.test_invariance import launched


@pytest.mark.slow
def test_two_ranks_train_gates_and_leave_layers_out_as_one(tmp_path):
    runs = launched(tmp_path, {"gates": {}, "layer drop": {}}, "tests.training.gated_runs")
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    for name, (weights, losses, world) in runs.items():
        assert world == 2
        one = gated_runs.make(name, tmp_path / "one", cut)
        one.train()
        assert losses == pytest.approx(logged(one, "loss"), rel=1e-5)
        for key, value in trained(one).items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5, msg=key)

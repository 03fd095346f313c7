"""`RetentionCallback` on two ranks: one result, which is one process's, and one end."""

from __future__ import annotations

import json

import pytest

from tests.training.retention_runs import make, outcome
from tests.training.test_invariance import launch_two_ranks


def test_two_ranks_measure_one_retention_and_stop_together_as_one_process(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    launch_two_ranks("tests.training.retention_runs", str(tmp_path), json.dumps(settings))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))

    assert first == second  # to the last digit, though the second measured other values
    assert first["world"] == 2
    alone = make(tmp_path / "one", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    alone[0].train()
    expected = outcome(*alone)
    assert first["stopped"] == expected["stopped"] < 8
    assert first["best"] == pytest.approx(expected["best"], rel=1e-4)
    for ours, theirs in zip(first["logged"], expected["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(first["report"], expected["report"], strict=True):
        assert ours["student"] == pytest.approx(theirs["student"], rel=1e-4)

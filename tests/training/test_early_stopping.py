"""Stopping on the KL at T=1, as docs/objectives.md says: transformers' own callback does it."""

from __future__ import annotations

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.training.runs import logged, make_trainer, trained


class SpoilsAndRemembers(TrainerCallback):
    """Moves the student away from the teacher after some steps, and keeps what it was after each."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.first:
            model.lm_head.weight.data.mul_(-3)
        self.weights.append(model.lm_head.weight.detach().clone())


def test_training_stops_when_the_student_comes_no_nearer_and_the_nearest_is_loaded(tmp_path):
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl"}
    trainer = make_trainer(
        "kd", tmp_path, max_steps=9, ce_weight=0.0, kd_weight=1.0, temperature=2.0, **best, **each_step
    )
    spoiler = SpoilsAndRemembers(first=4)
    trainer.add_callback(spoiler)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    divergences = logged(trainer, "eval_kl")
    assert len(divergences) == trainer.state.global_step == 5
    assert divergences[0] > divergences[1] > divergences[2] < min(divergences[3:])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert trainer.state.best_metric == divergences[2]
    assert torch.equal(trained(trainer)["lm_head.weight"], spoiler.weights[2])
    assert trainer.evaluate()["eval_kl"] == pytest.approx(divergences[2], rel=1e-6)

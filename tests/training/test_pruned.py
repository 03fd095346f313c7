from __future__ import annotations

import pytest
import torch

from hf_distill.students import ImportanceScores, PruneSpec, prune
from hf_distill.training.card import trainer_card
from tests import tiny
from tests.training.runs import logged, make_trainer


def test_a_pruned_student_is_trained_on_the_layers_and_channels_that_it_kept(tmp_path):
    teacher = tiny.model("llama", layers=4)
    scores = ImportanceScores(
        hidden=torch.rand(32, generator=torch.Generator().manual_seed(0)), layers=torch.tensor([1.0, 0, 3, 2])
    )
    student, report = prune(teacher, PruneSpec(num_hidden_layers=3, hidden_size=24, round_to=8), scores)
    trainer = make_trainer(
        "kd", tmp_path, models=(student, teacher), hidden_weight=0.3, hidden_loss="mse", max_steps=2
    )
    hidden = trainer.objectives[-1]
    assert hidden.pairs == ((1, 1), (2, 3), (3, 4))
    assert hidden.channels.tolist() == list(report.channels)
    trainer.train()
    assert len(logged(trainer, "hidden_loss")) == 2
    card = trainer_card(trainer)
    assert card.student == "3 of the 4 layers: [0, 2, 3]; 24 of the 32 channels"
    assert [loss.settings.get("channels of the teacher") for loss in card.losses] == [None, None, 24]


def test_a_student_pruned_from_another_width_has_projectors(tmp_path):
    with pytest.warns(UserWarning, match="no scores"):
        student, _ = prune(tiny.model("llama"), PruneSpec(hidden_size=24, round_to=8))
    trainer = make_trainer("kd", tmp_path, models=(student, tiny.model("llama", hidden_size=48)), hidden_weight=0.3)
    assert trainer.objectives[-1].channels is None
    assert len(trainer.objectives[-1].projectors) == 2

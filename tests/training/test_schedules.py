from __future__ import annotations

import pytest
from transformers import DataCollatorForSeq2Seq

from hf_distill import DistillationCallback, HiddenStateObjective, KDConfig, KDTrainer, LogitObjective
from hf_distill.objectives import linear, warmup
from hf_distill.training.schedules import scheduled_values
from hf_distill.training.terms import FeatureTerms
from tests import tiny
from tests.training.runs import COMMON, logged, make_models
from tests.training.test_callback import plain_trainer


def scheduled(tmp_path, **config):
    return KDTrainer(
        *make_models(), KDConfig(str(tmp_path), **(COMMON | {"ce_weight": 0.5, "max_steps": 5} | config)),
        objectives=[LogitObjective(warmup(1.0, 0.5), temperature=linear(4.0, 2.0))],
        train_dataset=tiny.tokenized_dataset(24), data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )  # fmt: skip


def test_every_step_is_trained_with_the_values_of_its_own_progress(tmp_path):
    trainer = scheduled(tmp_path)
    trainer.train()
    weights = logged(trainer, "forward_kl_weight")
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert logged(trainer, "forward_kl_temperature") == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0])
    terms = zip(logged(trainer, "ce_loss"), logged(trainer, "forward_kl_loss"), weights, strict=True)
    assert logged(trainer, "loss") == pytest.approx([0.5 * ce + weight * kl for ce, kl, weight in terms], rel=1e-5)
    trainer.create_model_card()
    assert "0 at 0% to 1 at 50% (linear)" in (tmp_path / "README.md").read_text()


def test_a_resumed_run_takes_up_the_schedule_where_it_was(tmp_path):
    scheduled(tmp_path / "whole", save_strategy="steps", save_steps=3).train()
    resumed = scheduled(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed, "forward_kl_temperature")[-2:] == pytest.approx([2.5, 2.0])


def test_the_callback_moves_schedules_too(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=2)
    trainer.add_callback(DistillationCallback(trainer, make_models()[1], [LogitObjective(linear(0.0, 1.0))]))
    trainer.train()
    assert logged(trainer, "forward_kl_weight") == [0.0, 1.0]


def test_a_schedule_goes_by_the_name_of_its_term():
    objectives = [
        HiddenStateObjective(linear(0.0, 1.0)),
        LogitObjective(0.5, temperature=linear(2.0, 1.0)),
        HiddenStateObjective(0.3),
        HiddenStateObjective(linear(0.7, 0.0)),
    ]
    assert FeatureTerms(objectives).weights == {"hidden": 0.0, "hidden_2": 0.3, "hidden_3": 0.7}
    assert scheduled_values(objectives) == {
        "hidden_weight": 0.0,
        "forward_kl_temperature": 2.0,
        "hidden_3_weight": 0.7,
    }

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillationCallback, RetentionCallback
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from hf_distill.training import retention
from tests import tiny
from tests.training.runs import COMMON, logged, make_trainer


def benchmarks():
    dataset = tiny.tokenized_dataset(4, seed=2)
    return [Perplexity(dataset), KLDivergence(dataset), Top1Agreement(dataset)]


def plain_trainer(output_dir, **config):
    settings = COMMON | {"output_dir": str(output_dir), "remove_unused_columns": False} | config
    rows = {"train_dataset": tiny.tokenized_dataset(8), "eval_dataset": tiny.tokenized_dataset(4, seed=1)}
    collator = DataCollatorForSeq2Seq(tiny.tokenizer())
    return Trainer(tiny.model(seed=0, layers=1), TrainingArguments(**settings), data_collator=collator, **rows)


def measured(trainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "eval_student_kl" in entry]


def test_it_measures_every_so_many_steps_and_at_the_end(tmp_path):
    trainer = make_trainer("kd", tmp_path, max_steps=5)
    callback = RetentionCallback(trainer, benchmarks(), every=2, baseline=tiny.model(seed=3, layers=1))
    trainer.add_callback(callback)
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    trainer.add_callback(Tracker())
    trainer.train()

    assert measured(trainer) == [2, 4, 5]
    assert sum("eval_retention" in logs for logs in seen) == 3
    last = [entry for entry in trainer.state.log_history if "eval_retention" in entry][-1]
    row = callback.report.rows[0]
    assert last["eval_retention"] == callback.report.mean_retention
    assert last["eval_retention_ci_low"] <= last["eval_retention"] <= last["eval_retention_ci_high"]
    assert last["eval_retention_perplexity"] == row.retention
    assert last["eval_student_perplexity"] == row.student
    assert "eval_retention_kl" not in last
    assert row.baseline is not None
    assert [item.model for item in callback.report.footprints] == ["teacher", "student", "baseline"]
    assert trainer.retention_report is callback.report


def test_the_results_are_in_the_saved_state_and_go_to_a_tracker(tmp_path):
    trainer = make_trainer("kd", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    callback = RetentionCallback(trainer, benchmarks(), every=2)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_state()

    for folder in (tmp_path / "checkpoint-2", tmp_path):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        found = [entry for entry in history if "eval_retention" in entry]
        assert [entry["step"] for entry in found] == [2] * (1 if folder.name == "checkpoint-2" else 2)
    assert found[-1]["eval_retention"] == callback.report.mean_retention
    for item in callback.report.footprints:
        assert item.parameters > 0
        assert item.weight_bytes > 0
        assert item.peak_bytes > item.weight_bytes
        assert item.tokens_per_second > 0
    assert [item.model for item in callback.report.footprints] == ["teacher", "student"]


def test_training_is_what_it_is_without_it(tmp_path):
    losses = []
    for name in ("with", "without"):
        trainer = make_trainer("kd", tmp_path / name, max_steps=4, models=dropout_models())
        if name == "with":
            trainer.add_callback(RetentionCallback(trainer, benchmarks(), every=1))
        trainer.train()
        losses.append(logged(trainer, "loss"))

    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


def dropout_models():
    return tiny.model("gpt2", layers=1, seed=0, embd_pdrop=0.3), tiny.model("gpt2", layers=2, seed=1)


@pytest.mark.parametrize("order", ["before", "after"])
def test_retention_chooses_the_best_checkpoint_and_stops_early(tmp_path, monkeypatch, order):
    values = iter([0.5, 0.7, 0.6, 0.4, 0.9, 0.9])
    monkeypatch.setattr(retention, "retention_metrics", lambda report: {"eval_retention": next(values)})
    best = {"metric_for_best_model": "retention", "load_best_model_at_end": True, "save_strategy": "steps"}
    trainer = make_trainer("kd", tmp_path, max_steps=9, eval_strategy="steps", eval_steps=1, save_steps=1, **best)
    callbacks = [RetentionCallback(trainer, benchmarks()), EarlyStoppingCallback(2)]
    for callback in callbacks if order == "before" else reversed(callbacks):
        trainer.add_callback(callback)

    trainer.train()

    # The second is the best; two worse ones follow.
    assert trainer.state.global_step == 4
    assert trainer.state.best_metric == 0.7
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    # At the end the loaded checkpoint is measured, which is not the last step's student.
    assert logged(trainer, "eval_retention") == [0.5, 0.7, 0.6, 0.4, 0.9]


def test_real_values_reach_the_metrics_of_the_evaluation(tmp_path):
    best = {"metric_for_best_model": "student_kl", "greater_is_better": False}
    trainer = make_trainer("kd", tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, **best)
    callback = RetentionCallback(trainer, benchmarks(), every=1)
    trainer.add_callback(callback)

    trainer.train()

    values = logged(trainer, "eval_student_kl")
    assert len(values) == 5  # steps 1 to 4, and the end
    assert trainer.state.best_metric == min(values[1], values[3])
    metrics = trainer.evaluate()
    assert metrics["eval_student_kl"] == pytest.approx(values[-1])
    assert "eval_loss" in metrics


def test_an_evaluation_after_training_measures_the_model_as_it_is_then(tmp_path):
    trainer = make_trainer("kd", tmp_path, max_steps=1)
    trainer.add_callback(RetentionCallback(trainer, benchmarks()))
    trainer.train()
    first = trainer.evaluate()["eval_student_kl"]

    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3)

    assert trainer.evaluate()["eval_student_kl"] != first


def test_a_plain_trainer_is_compared_with_the_teacher_that_it_is_given(tmp_path):
    trainer = plain_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    teacher = tiny.model(seed=1, layers=2)
    trainer.add_callback(RetentionCallback(trainer, benchmarks(), teacher=teacher))

    trainer.train()

    assert measured(trainer) == [2, 2]  # the evaluation, and the end
    assert not hasattr(trainer, "retention_report")
    with pytest.raises(ValueError, match="teacher=load_teacher"):
        RetentionCallback(plain_trainer(tmp_path), benchmarks())


def test_the_teacher_of_a_distillation_callback_is_found(tmp_path):
    trainer = plain_trainer(tmp_path, max_steps=1)
    distillation = DistillationCallback(trainer, tiny.model(seed=1, layers=2))
    trainer.add_callback(distillation)

    assert RetentionCallback(trainer, benchmarks()).teacher is distillation.teacher


def test_the_card_shows_the_plots_that_stand_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer("kd", tmp_path, max_steps=1)
    trainer.create_model_card()
    assert not list(tmp_path.glob("*.png"))

    trainer.evaluate_retention(benchmarks(), baseline={"before distillation": tiny.model(seed=3, layers=1)})
    trainer.create_model_card()

    card = (tmp_path / "README.md").read_text()
    for name in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.glob("*.svg")} == {"retention.svg", "tradeoff.svg"}
    assert "| before distillation |" in card
    assert "## Size and speed" in card


def test_without_matplotlib_a_card_has_no_plots(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.cards.render.importlib.util.find_spec", lambda name: None)
    trainer = make_trainer("kd", tmp_path, max_steps=1)
    trainer.evaluate_retention(benchmarks())
    trainer.create_model_card()

    assert "![" not in (tmp_path / "README.md").read_text()


def test_trl_keeps_its_own_window_of_metrics(tmp_path):
    trainers = [make_trainer("sft-callback", tmp_path / str(i), max_steps=4, logging_steps=4) for i in range(2)]
    trainers[0].add_callback(RetentionCallback(trainers[0], benchmarks(), every=1))
    for trainer in trainers:
        trainer.train()

    ours, plain = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers)
    assert ours[0].keys() == plain[0].keys()
    assert [entry["mean_token_accuracy"] for entry in ours] == [entry["mean_token_accuracy"] for entry in plain]


def test_a_best_metric_that_is_not_measured_at_every_evaluation_is_refused(tmp_path):
    best = {"metric_for_best_model": "eval_retention", "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer("kd", tmp_path, max_steps=3, **best)
    trainer.add_callback(RetentionCallback(trainer, benchmarks(), every=2))

    with pytest.raises(ValueError, match="leave `every` out"):
        trainer.train()


@pytest.mark.parametrize(("arguments", "message"), [({"every": 0}, "`every` is 0"), ({"benchmarks": []}, "is empty")])
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    trainer = make_trainer("kd", tmp_path)

    with pytest.raises(ValueError, match=message):
        RetentionCallback(trainer, **({"benchmarks": benchmarks()} | arguments))

"""The callback against the trainer's own loss plus the naive term, from whole models and plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer

from hf_distill import DistillationCallback, HiddenStateObjective, LogitObjective
from tests import tiny
from tests.taps.test_last_hidden import hooks
from tests.training.runs import COMMON, logged, make_models, make_trainer, trained
from tests.training.test_features import assert_projectors_resume, naive_distance
from tests.training.test_trainers import naive_loss


def plain_trainer(task, tmp_path, model=None, **config):
    """A `Trainer` for causal LM or classification, without a teacher."""
    tokenizer = tiny.tokenizer()
    if task == "causal_lm":
        data, collator = tiny.tokenized_dataset(), DataCollatorForSeq2Seq(tokenizer)
    else:
        data, collator = tiny.classification_dataset(), DataCollatorWithPadding(tokenizer)
    return Trainer(
        model or tiny.model("llama", layers=2, task=task, num_labels=3),
        TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **(COMMON | config)),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )


def loss_and_gradients(trainer, batch, parameters):
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    return loss, torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_the_loss_of_a_plain_trainer_gets_the_terms_added(task, tmp_path):
    trainer = plain_trainer(task, tmp_path)
    teacher = tiny.model("qwen3", layers=4, task=task, num_labels=3, seed=1, hidden_size=48)
    batch = next(iter(trainer.get_train_dataloader()))
    own = trainer.compute_loss(trainer.model.train(), dict(batch))
    objectives = [LogitObjective(0.5), HiddenStateObjective(0.3, loss="mse")]
    trainer.add_callback(DistillationCallback(trainer, teacher, objectives))
    hidden = objectives[1]
    weights = dict(trainer.model.named_parameters()) | dict(hidden.named_parameters())
    loss, found = loss_and_gradients(trainer, batch, list(weights.values()))
    expected = (
        own
        + naive_loss(trainer.model, teacher, batch, shift=task == "causal_lm", ce=0.0, kd=0.5)
        + 0.3 * naive_distance(trainer.model, teacher, hidden.projectors, hidden.pairs, batch, task=task)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    for name, ours, theirs in zip(weights, found, gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["sft-callback", "dpo-callback"])
def test_the_loss_of_a_trl_trainer_gets_the_terms_added(kind, tmp_path):
    models = make_models()
    trainer = make_trainer(kind, tmp_path, models=models, per_device_train_batch_size=4)
    plain = make_trainer(kind, tmp_path, models=copy.deepcopy(models), per_device_train_batch_size=4)
    plain.__class__ = plain._distillation._class
    batch = next(iter(trainer.get_train_dataloader()))
    own = plain.compute_loss(plain.model.train(), dict(batch))
    loss, found = loss_and_gradients(trainer, batch, list(trainer.model.parameters()))
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    student = tiny.model("llama", layers=1, seed=0)  # unpatched: TRL's forward returns no logits
    student.load_state_dict(plain.model.state_dict())
    term = naive_loss(student, models[1], inputs, shift=True, ce=0.0, kd=0.5)
    torch.testing.assert_close(loss, own + term, rtol=1e-5, atol=1e-6)
    gradients = zip(
        torch.autograd.grad(own, list(plain.model.parameters())),
        torch.autograd.grad(term, list(student.parameters())),
        strict=True,
    )
    for ours, (first, second) in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, first + second, rtol=1e-4, atol=1e-6)


def test_a_reward_model_takes_the_hidden_states_of_all_tokens(tmp_path):
    student, teacher = (
        tiny.model("llama", layers=2 + i, task="sequence_classification", num_labels=1, seed=i) for i in range(2)
    )
    args = RewardConfig(str(tmp_path), max_steps=2, bf16=False, gradient_checkpointing=False, **COMMON)
    data = tiny.preference_dataset()
    trainer = RewardTrainer(student, args=args, train_dataset=data, processing_class=tiny.tokenizer())
    trainer.add_callback(DistillationCallback(trainer, teacher, [HiddenStateObjective(0.5)]))
    trainer.train()
    assert all(0 < value < 2 for value in logged(trainer, "hidden_loss"))


@pytest.mark.parametrize("kind", ["sft-callback", "dpo-callback"])
def test_weight_zero_changes_no_bit_and_only_watches(kind, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    nothing = [LogitObjective(0.0), HiddenStateObjective(0.0)]
    watched = make_trainer(kind, tmp_path, objectives=nothing, **settings)
    alone = make_trainer(kind, tmp_path, objectives=nothing, **settings)
    alone.remove_callback(DistillationCallback)
    watched.train()
    alone.train()
    assert logged(watched, "loss") == logged(alone, "loss")
    assert logged(watched, "kl")[0] > 0
    assert "kl" not in alone.state.log_history[0]
    for name, value in trained(alone).items():
        assert torch.equal(trained(watched)[name], value), name


def test_it_stays_for_a_second_run_and_leaves_nothing_behind_when_it_is_removed(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=3, logging_steps=2)
    model, before = trainer.model, hooks(trainer.model)
    callbacks = list(trainer.callback_handler.callbacks)
    for way in ("remove_callback", "pop_callback"):
        objectives = [LogitObjective(0.5), HiddenStateObjective(0.3)]
        trainer.add_callback(DistillationCallback(trainer, make_models(wide_teacher=True)[1], objectives))
        assert type(trainer) is not Trainer
        assert type(trainer).__name__ == "Trainer"
        for _ in range(2):
            trainer.train()
            assert hooks(model) == before
            assert len(logged(trainer, "kl")) == 1
            assert "eval_kl" not in trainer.evaluate(tiny.tokenized_dataset(4))
        getattr(trainer, way)(DistillationCallback)
        assert type(trainer) is Trainer
        assert not {"_distillation", "_features", "_run_features", "_objective_lr_multiplier"} & set(vars(trainer))
        assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert logged(trainer, "kl") == []


def test_packed_documents_are_read_apart_by_the_teacher_too(tmp_path):
    runs = []
    for packed in (False, True):
        settings = {"packing": True, "max_length": 256} if packed else {}
        trainer = make_trainer(
            "sft-callback", tmp_path, rows=8, max_steps=1, **settings, per_device_train_batch_size=8
        )
        trainer.train()
        runs.append([logged(trainer, key)[0] for key in ("kl", "teacher_nll", "forward_kl_loss")])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_bf16_autocast_and_the_adapters_own_base(tmp_path):
    models = (tiny.model("llama", layers=2), "base")
    trainer = make_trainer("sft-callback", tmp_path, lora=True, models=models, max_steps=3, bf16=True)
    trainer.train()
    first, *_, last = logged(trainer, "kl")
    assert first == pytest.approx(0.0, abs=1e-5)
    assert last > 0


def test_a_resumed_run_goes_on_with_its_projectors(tmp_path):
    assert_projectors_resume("sft-callback", tmp_path)


def test_a_callback_that_was_removed_is_not_taken_again(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=1)
    callback = DistillationCallback(trainer, make_models()[1])
    trainer.remove_callback(PrinterCallback)  # another one
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="remove_callback"):
        DistillationCallback(trainer, make_models()[1])
    assert trainer.pop_callback(DistillationCallback) is callback
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="make a new one"):
        trainer.train()


class HeadlessTrainer(Trainer):
    """Computes a loss without the student."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return next(model.parameters()).sum() * 0


def test_a_trainer_that_does_not_call_the_student_is_refused(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=1)
    trainer.__class__ = HeadlessTrainer
    trainer.add_callback(DistillationCallback(trainer, make_models()[1]))
    with pytest.raises(ValueError, match=r"HeadlessTrainer.*use KDTrainer"):
        trainer.train()


def test_batches_that_do_not_say_what_is_trained_are_refused_before_the_first_step(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=1)
    trainer.train_dataset = trainer.train_dataset.remove_columns(["labels"])
    trainer.data_collator = DataCollatorWithPadding(tiny.tokenizer())
    trainer.add_callback(DistillationCallback(trainer, make_models()[1]))
    with pytest.raises(ValueError, match="`labels` or `completion_mask`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_distilling_trainer_has_a_teacher_already(tmp_path):
    trainer = make_trainer("kd", tmp_path)
    with pytest.raises(ValueError, match="has a teacher already"):
        DistillationCallback(trainer, make_models()[1])


def test_a_callback_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path)
    attributes = set(vars(trainer))
    with pytest.raises(ValueError, match="which has layers 1 to 2"):
        DistillationCallback(trainer, make_models()[1], [HiddenStateObjective(layer_mapping=[(3, 2)])])
    assert type(trainer) is Trainer
    assert vars(trainer).keys() == attributes
    with pytest.raises(ValueError, match="teacher_model"):
        DistillationCallback(trainer, None)


def test_unequal_classes_are_refused(tmp_path):
    trainer = plain_trainer("sequence_classification", tmp_path)
    teacher = tiny.model("llama", task="sequence_classification", num_labels=4)
    with pytest.raises(ValueError, match="num_labels=4"):
        DistillationCallback(trainer, teacher)


def test_a_term_is_the_divergence_over_all_labels_of_a_step(tmp_path):
    trainer = make_trainer("sft-callback", tmp_path, max_steps=1, per_device_train_batch_size=2,
                           gradient_accumulation_steps=4)  # fmt: skip
    student, teacher = copy.deepcopy(make_models())
    batches = list(trainer.get_train_dataloader())[:4]
    trainer.train()
    total, count = 0.0, 0
    for batch in batches:
        kept = batch["labels"][:, 1:] != -100
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        q, p = (model(**inputs).logits[:, :-1][kept].log_softmax(-1) for model in (student, teacher))
        total, count = total + F.kl_div(q, p, log_target=True, reduction="sum").item(), count + int(kept.sum())
    assert logged(trainer, "forward_kl_loss")[0] == pytest.approx(total / count, rel=1e-4)

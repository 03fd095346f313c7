"""Objectives that look inside both models, in a run: against plain autograd on the outputs of whole models."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, HfArgumentParser

from hf_distill import HiddenStateObjective, KDConfig, KDTrainer, LogitObjective, ModelTeacher
from hf_distill.signals import ModelShape, Signal
from hf_distill.training.terms import build_objectives
from tests import tiny
from tests.training.runs import COMMON, HIDDEN, LORA, logged, make_models, make_trainer, trained
from tests.training.test_checkpoints import EndAtStep, saved_tensors
from tests.training.test_trainers import kd_trainer, naive_loss


def naive_distance(student, teacher, projectors, pairs, batch, *, task):
    """The mean squared distance of hidden states, a mean over the pairs and over what the labels train."""
    features = {key: value for key, value in batch.items() if key != "labels"}
    ours = student(**features, output_hidden_states=True).hidden_states
    theirs = teacher(**features, output_hidden_states=True).hidden_states
    total = 0.0
    for projector, (layer, partner) in zip(projectors, pairs, strict=True):
        distance = F.mse_loss(projector(ours[layer]), theirs[partner].detach(), reduction="none").mean(-1)
        if task == "causal_lm":
            total += distance[:, :-1][batch["labels"][:, 1:] != -100].mean()
        elif task == "masked_lm":
            total += distance[batch["labels"] != -100].mean()
        else:
            mask = batch["attention_mask"]
            total += ((distance * mask).sum(-1) / mask.sum(-1)).mean()
    return total / len(pairs)


@pytest.mark.parametrize(
    ("task", "family", "teacher_family"),
    [
        ("causal_lm", "llama", "qwen3"),
        ("causal_lm", "gpt2", "gemma2"),
        ("masked_lm", "distilbert", "bert"),
        ("sequence_classification", "distilbert", "bert"),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_outputs(task, family, teacher_family, tmp_path):
    student = tiny.model(family, layers=2, task=task, num_labels=3)
    teacher = tiny.model(teacher_family, layers=4, task=task, seed=1, num_labels=3, hidden_size=48)
    trainer = kd_trainer(tmp_path, task, student=student, teacher=teacher, **HIDDEN)
    objective = trainer.objectives[-1]
    assert objective.pairs == ((1, 2), (2, 4))
    batch = next(iter(trainer.get_train_dataloader()))
    weights = dict(student.named_parameters()) | dict(objective.named_parameters())
    loss = trainer.compute_loss(student.eval(), batch)
    found = dict(zip(weights, torch.autograd.grad(loss, weights.values(), allow_unused=True), strict=True))
    expected = naive_loss(student, teacher, batch, shift=task == "causal_lm") + 0.3 * naive_distance(
        student, teacher, objective.projectors, objective.pairs, batch, task=task
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(expected, weights.values(), allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_real_tokens_are_compared_beside_labelled_ones_and_padding_never(tmp_path):
    student, teacher = make_models()
    everywhere = HiddenStateObjective(0.3, loss="mse", layer_mapping=[(1, 1)], positions="real")
    objectives = [everywhere, HiddenStateObjective(0.2, loss="mse", layer_mapping=[(1, 1)])]
    trainer = KDTrainer(
        student, teacher, KDConfig(str(tmp_path), ce_weight=0.0, **COMMON), objectives=objectives,
        train_dataset=tiny.tokenized_dataset(),
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, -100, 12, -100, -100]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    loss = trainer.compute_loss(student.eval(), batch)
    features = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = (model(**features, output_hidden_states=True).hidden_states[1] for model in (student, teacher))
    distance = (ours - theirs.detach()).square().mean(-1)
    real = 3 * distance[0].mean() + 1 * distance[1, :3].mean()  # each text as much as its labels
    labelled = distance[0, 1:4].sum() + distance[1, 1]
    expected = (0.3 * real + 0.2 * labelled) / 4
    torch.testing.assert_close(loss, expected)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(value, weights, allow_unused=True) for value in (loss, expected)]
    for found, gradient in zip(*gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    batch["input_ids"] = ids.masked_fill(ids == 0, 20)
    torch.testing.assert_close(trainer.compute_loss(student, batch), loss)
    assert [term.config().get("positions") for term in objectives] == ["all real tokens", None]


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05], ids=["unclipped", "clipped"])
def test_projectors_are_stepped_clipped_and_reset_with_the_student(max_grad_norm, tmp_path):
    models = make_models(wide_teacher=True)
    student, teacher = copy.deepcopy(models)
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "max_grad_norm": max_grad_norm}
    trainer = make_trainer("kd", tmp_path, models=models, **settings, **HIDDEN)
    [_, objective] = trainer.objectives
    projectors = copy.deepcopy(objective.projectors)
    batches = list(trainer.get_train_dataloader())[:3]
    trainer.train()
    groups = [(list(student.parameters()), 0.5), (list(projectors.parameters()), 0.5 * 0.5)]
    parameters = [parameter for group, _ in groups for parameter in group]
    norms = []
    for batch in batches:
        distance = naive_distance(student, teacher, projectors, objective.pairs, batch, task="causal_lm")
        loss = naive_loss(student, teacher, batch, shift=True) + 0.3 * distance
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))))
        with torch.no_grad():
            for group, rate in groups:
                for parameter in group:
                    parameter -= rate * parameter.grad
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)
    expected = dict(student.named_parameters()) | {
        f"objective.objectives.0.projectors.{name}": value for name, value in projectors.named_parameters()
    }
    found = trained(trainer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)


def resumable(kind: str, folder: Path):
    # The last step is not logged: a second run of the trainer must not begin with it.
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "logging_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 2}
    return make_trainer(kind, folder, rows=24, max_steps=7, **settings, **saving, **HIDDEN)


def assert_projectors_resume(kind: str, tmp_path: Path):
    """Check that a run that is stopped and resumed, once or twice, is the run that was not; return the latter."""
    whole, stopped = resumable(kind, tmp_path / "whole"), resumable(kind, tmp_path / "stopped")
    whole.train()
    stopped.add_callback(EndAtStep(5))
    stopped.train()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-5", ignore_errors=True)
    expected, losses = trained(whole), {key: logged(whole, key) for key in ("loss", "hidden_loss", "kl")}
    resumed = resumable(kind, tmp_path / "stopped")
    for trainer, checkpoint in ((resumed, True), (resumed, str(tmp_path / "stopped" / "checkpoint-2"))):
        trainer.train(resume_from_checkpoint=checkpoint)
        assert {key: logged(trainer, key) for key in losses} == losses
        found = trained(trainer)
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    return whole


def test_a_resumed_run_goes_on_with_its_projectors_and_the_student_never_holds_them(tmp_path):
    whole = assert_projectors_resume("kd", tmp_path)
    saved = load_file(tmp_path / "whole" / "checkpoint-7" / "objective.safetensors")
    assert torch.equal(saved["objectives.0.projectors.0.weight"], whole.objectives[1].projectors[0].weight)
    whole.save_model(str(tmp_path / "final"))
    assert saved_tensors(tmp_path / "final").keys() <= whole.model.state_dict().keys()


@pytest.mark.parametrize("kind", ["kd", "sft-callback"])
def test_a_checkpoint_without_the_projectors_is_refused_by_the_name_of_the_file(kind, tmp_path):
    trainer = resumable(kind, tmp_path)
    trainer.args.max_steps = 2
    trainer.train()
    (tmp_path / "checkpoint-2" / "objective.safetensors").unlink()
    for another in (trainer, resumable(kind, tmp_path)):
        with pytest.raises(ValueError, match=r"checkpoint-2 has no objective\.safetensors"):
            another.train(resume_from_checkpoint=True)


def test_a_term_of_weight_zero_changes_nothing(tmp_path):
    runs = []
    for extra in ([], [HiddenStateObjective(0.0)]):
        trainer = KDTrainer(
            *make_models(), KDConfig(str(tmp_path), max_steps=2, **COMMON), objectives=[LogitObjective(0.5), *extra],
            train_dataset=tiny.tokenized_dataset(), data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        )  # fmt: skip
        trainer.train()
        runs.append(trained(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_base_of_an_adapter_gives_its_own_hidden_states(tmp_path):
    args = KDConfig(str(tmp_path), max_steps=3, ce_weight=0.5, kd_weight=0.0, hidden_weight=0.1, **COMMON)
    trainer = KDTrainer(
        tiny.model("llama"), "base", args, train_dataset=tiny.tokenized_dataset(24),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()), peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    first, *_, last = logged(trainer, "hidden_loss")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert last > 0


@pytest.mark.parametrize("kind", ["kd", "sft"])
def test_hidden_states_alone_train_the_student_towards_the_teacher(kind, tmp_path):
    settings = {"ce_weight": 0.0, "kd_weight": 0.0, **HIDDEN, "hidden_weight": 1.0, "max_steps": 4}
    trainer = make_trainer(kind, tmp_path, **settings, per_device_train_batch_size=8)
    trainer.train()
    losses = logged(trainer, "hidden_loss")
    assert losses[-1] < losses[0]
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_hidden_loss"])


def test_two_terms_of_one_kind_are_logged_apart(tmp_path):
    objectives = [HiddenStateObjective(0.2, loss="cka"), HiddenStateObjective(0.1, layer_mapping=[(1, 2)])]
    trainer = KDTrainer(
        *make_models(), KDConfig(str(tmp_path), max_steps=1, **COMMON), objectives=objectives,
        train_dataset=tiny.tokenized_dataset(), data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )  # fmt: skip
    trainer.train()
    ce, first, second = (logged(trainer, f"{name}_loss")[0] for name in ("ce", "hidden", "hidden_2"))
    assert logged(trainer, "loss")[0] == pytest.approx(0.5 * ce + 0.2 * first + 0.1 * second, rel=1e-5)


def test_the_card_says_which_layers_were_compared(tmp_path):
    trainer = make_trainer("kd", tmp_path, max_steps=1, **HIDDEN)
    trainer.train()
    trainer.create_model_card(dataset_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "hidden" in card
    assert "[[1, 2]]" in card


def test_flags_build_the_objective_that_they_name():
    flags = ["--hidden_weight", "0.2", "--hidden_loss", "mse", "--layer_mapping", json.dumps([[1, 2], [-1, -1]])]
    [args] = HfArgumentParser(KDConfig).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *flags])
    [_, objective] = build_objectives(args, None)
    assert (objective.weight, objective.loss) == (0.2, "mse")
    assert objective.layer_mapping == [[1, 2], [-1, -1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_weight", -1.0),
        ("hidden_loss", "cosin"),
        ("layer_mapping", "unifrom"),
        ("objective_lr_multiplier", -1.0),
    ],
)
def test_a_wrong_flag_is_refused_before_any_model_is_loaded(field, value):
    with pytest.raises(ValueError, match=field.replace("hidden_loss", "hidden-state loss")):
        KDConfig("out", **{field: value})


def test_layers_that_do_not_exist_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"student \(LlamaForCausalLM\), which has layers 1 to 1"):
        make_trainer("kd", tmp_path, hidden_weight=0.1, layer_mapping=[(2, 2)])


def test_a_teacher_without_hidden_states_is_refused_by_name(tmp_path):
    student, teacher = make_models()

    class LogitsOnly(ModelTeacher):
        provides = frozenset({Signal.LOGITS})

    with pytest.raises(ValueError, match=r"HiddenStateObjective needs .*LogitsOnly provides only"):
        make_trainer("kd", tmp_path, models=(student, LogitsOnly(teacher)), hidden_weight=0.1)


def test_an_optimizer_without_groups_is_left_alone_where_no_objective_has_parameters(tmp_path):
    trainer = make_trainer("kd", tmp_path)
    trainer.optimizer = placeholder = object()  # as Accelerate's for an optimizer that DeepSpeed's config names
    assert trainer.create_optimizer() is placeholder


def test_projectors_in_a_run_that_shards_are_refused(tmp_path):
    trainer = make_trainer("kd", tmp_path, **HIDDEN)
    trainer.is_fsdp_enabled = True  # Accelerate makes no FSDP run of processes on a CPU
    with pytest.raises(ValueError, match="cka"):
        trainer._set_up_features(ModelShape("student", 1, 32), ModelShape("teacher", 2, 48))

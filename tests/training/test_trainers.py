"""What a step of each trainer computes, against the naive full-logit loss."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_distill import KDConfig, KDSFTConfig, KDSFTTrainer, KDTrainer, LogitObjective
from tests import tiny
from tests.training.runs import COMMON, LORA, logged, make_trainer, trained


def naive_loss(student, teacher, batch, *, shift, ce=0.5, kd=0.5):
    """Cross-entropy and forward KL at T=1 from full logits, means over the labelled positions."""
    features = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    s, t = student(**features).logits, teacher(**features).logits.detach()
    if shift:
        s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:]
    kept = labels != -100
    s, t, labels = s[kept], t[kept], labels[kept]
    shared = min(s.shape[-1], t.shape[-1])
    p, q = t[:, :shared].log_softmax(-1), s[:, :shared].log_softmax(-1)
    return ce * F.cross_entropy(s, labels) + kd * F.kl_div(q, p, log_target=True, reduction="batchmean")


def kd_trainer(
    tmp_path,
    task,
    family="llama",
    teacher_family=None,
    *,
    dataset=None,
    student=None,
    teacher=None,
    objectives=None,
    **config,
):
    student = student or tiny.model(family, layers=1, task=task, num_labels=3)
    teacher = teacher or tiny.model(teacher_family or family, layers=2, task=task, seed=1, num_labels=3)
    tokenizer = tiny.tokenizer()
    collators = {
        "causal_lm": lambda: DataCollatorForSeq2Seq(tokenizer),
        "masked_lm": lambda: DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, seed=0),
        "sequence_classification": lambda: DataCollatorWithPadding(tokenizer),
    }
    rows = dataset or (
        tiny.classification_dataset() if task == "sequence_classification" else tiny.tokenized_dataset()
    )
    if task == "masked_lm":
        rows = rows.remove_columns(["labels"])
    return KDTrainer(
        student,
        teacher,
        KDConfig(str(tmp_path), per_device_train_batch_size=4, **(COMMON | config)),
        objectives=objectives,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collators[task](),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("task", "family", "teacher_family"),
    [
        ("causal_lm", "llama", "qwen3"),
        ("causal_lm", "gemma2", "llama"),
        ("causal_lm", "gpt2", "opt"),
        ("masked_lm", "bert", "roberta"),
        ("masked_lm", "distilbert", "bert"),
        ("sequence_classification", "distilbert", "bert"),
        ("sequence_classification", "llama", "llama"),
    ],
)
def test_loss_and_gradients_are_those_of_the_full_logits(task, family, teacher_family, tmp_path):
    trainer = kd_trainer(tmp_path, task, family, teacher_family)
    batch = next(iter(trainer.get_train_dataloader()))
    student, teacher = trainer.model.eval(), trainer.teacher.model
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = naive_loss(student, teacher, batch, shift=task == "causal_lm")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_teacher_reads_the_token_types_of_pairs_that_the_student_does_not_take(tmp_path):
    rows = tiny.classification_dataset()
    pairs = rows.map(lambda row: {"token_type_ids": [int(i > 3) for i in range(len(row["input_ids"]))]})
    task = "sequence_classification"
    bert = tiny.model("bert", task=task, seed=1, num_labels=3, initializer_range=0.5)
    trainer = kd_trainer(tmp_path, task, "distilbert", teacher=bert, dataset=pairs)
    batch = next(iter(trainer.get_train_dataloader()))
    student_inputs = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: student_inputs.extend(inputs), with_kwargs=True
    )
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    assert "token_type_ids" not in student_inputs
    types = batch.pop("token_type_ids")
    without = naive_loss(trainer.model, bert, batch, shift=False)
    expected = naive_loss(trainer.model, partial(bert, token_type_ids=types), batch, shift=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert abs(expected - without) > 1e-3


@pytest.mark.parametrize("sizes", [(320, 352), (352, 320)])
def test_vocabularies_padded_to_different_sizes_are_compared_on_their_shared_part(sizes, tmp_path):
    # Sharp distributions: in flat ones a token more or less would go unnoticed.
    student, teacher = (
        tiny.model("qwen2", seed=seed, vocab_size=size, initializer_range=0.5) for seed, size in enumerate(sizes)
    )
    with pytest.warns(UserWarning, match="320"):
        trainer = kd_trainer(tmp_path, "causal_lm", student=student, teacher=teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    torch.testing.assert_close(loss, naive_loss(student, teacher, batch, shift=True), rtol=1e-5, atol=1e-6)


def test_without_distillation_it_is_the_plain_trainer(tmp_path):
    ours = make_trainer("kd", tmp_path, max_steps=2, kd_weight=0.0, ce_weight=1.0)
    plain = Trainer(
        tiny.model("llama", layers=1, seed=0),
        TrainingArguments(**(COMMON | {"output_dir": str(tmp_path), "max_steps": 2})),
        train_dataset=ours.train_dataset,
        data_collator=ours.data_collator,
    )
    ours.train()
    plain.train()
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    for (name, value), reference in zip(trained(ours).items(), trained(plain).values(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "adaptive_kl", "tvd"])
def test_a_student_equal_to_its_teacher_stays_where_it_is(divergence, tmp_path):
    model = tiny.model("llama")
    twin = tiny.model("llama")
    args = KDConfig(str(tmp_path), ce_weight=0.0, divergence=divergence, max_steps=1, **COMMON)
    trainer = KDTrainer(
        model,
        twin,
        args,
        train_dataset=tiny.tokenized_dataset(),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )
    before = trained(trainer)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([0.0], abs=1e-6)
    for name, value in trained(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_prompts_and_pads_change_nothing_for_the_teacher(tmp_path):
    trainer = kd_trainer(tmp_path, "causal_lm")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    pads = batch["attention_mask"] == 0
    assert pads.any()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(pads, 77)}
    torch.testing.assert_close(trainer.compute_loss(trainer.model, other), loss, rtol=0, atol=0)


def test_eval_loss_weighs_tokens_and_agrees_with_one_big_batch(tmp_path):
    means = [kd_trainer(tmp_path, "causal_lm", per_device_eval_batch_size=size).evaluate() for size in (1, 3, 8)]
    for metrics in means[1:]:
        for key in ("loss", "ce_loss", "forward_kl_loss", "student_nll", "teacher_nll", "top1_agreement", "kl"):
            assert metrics[f"eval_{key}"] == pytest.approx(means[0][f"eval_{key}"], rel=1e-5), key


def test_compute_metrics_gets_the_full_logits(tmp_path):
    trainer = kd_trainer(tmp_path, "causal_lm")
    seen = {}
    trainer.compute_metrics = lambda prediction: seen.update(shape=prediction.predictions.shape) or {"ok": 1.0}
    assert trainer.evaluate()["eval_ok"] == 1.0
    assert seen["shape"][0] == len(trainer.eval_dataset)
    assert seen["shape"][-1] == trainer.model.config.vocab_size


def test_a_batch_without_labels_is_a_finite_zero_with_a_gradient_and_one_warning(tmp_path):
    rows = tiny.tokenized_dataset().map(lambda row: {"labels": [-100] * len(row["labels"])})
    trainer = kd_trainer(tmp_path, "causal_lm", dataset=rows, max_steps=2)
    before = trained(trainer)
    with pytest.warns(UserWarning, match="no labelled token") as caught:
        trainer.train()
    assert sum("no labelled token" in str(warning.message) for warning in caught) == 1
    assert logged(trainer, "loss") == [0.0, 0.0]
    for name, value in trained(trainer).items():
        assert torch.equal(value, before[name])


def test_labels_outside_the_vocabulary_are_named(tmp_path):
    rows = tiny.tokenized_dataset().map(lambda row: {"labels": [9999] * len(row["labels"])})
    trainer = kd_trainer(tmp_path, "causal_lm", dataset=rows, max_steps=1)
    with pytest.raises(ValueError, match="9999"):
        trainer.train()


def test_a_batch_without_labels_column_says_what_to_add(tmp_path):
    trainer = kd_trainer(tmp_path, "causal_lm")
    with pytest.raises(ValueError, match="no `labels`"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_teacher_and_student_of_different_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"causal_lm.*masked_lm"):
        KDTrainer(tiny.model("llama"), tiny.model("bert"), KDConfig(str(tmp_path), **COMMON))


def test_the_student_cannot_teach_itself(tmp_path):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="student"):
        KDTrainer(model, model, KDConfig(str(tmp_path), **COMMON))


def test_objectives_replace_the_flags(tmp_path):
    model, teacher = tiny.model("llama", layers=1), tiny.model("llama", seed=1)
    rows, collator = tiny.tokenized_dataset(), DataCollatorForSeq2Seq(tiny.tokenizer())
    losses = []
    for fields, objectives in [
        ({"divergence": "jsd", "kd_weight": 0.3}, None),
        ({}, [LogitObjective(0.3, divergence="jsd")]),
    ]:
        args = KDConfig(str(tmp_path), **(COMMON | fields))
        trainer = KDTrainer(model, teacher, args, objectives=objectives, train_dataset=rows, data_collator=collator)
        losses.append(trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).item())
    assert losses[0] == losses[1]


def test_packed_documents_are_as_separate_for_the_teacher_as_for_the_student(tmp_path):
    """Packing changes how rows are cut, so sums over all tokens of both models must not change."""
    metrics = []
    for fields in ({}, {"packing": True, "max_length": 256}, {"padding_free": True, "max_length": None}):
        trainer = make_trainer("sft", tmp_path, per_device_eval_batch_size=2, **fields)
        metrics.append(trainer.evaluate())
    for other in metrics[1:]:
        for key in ("loss", "ce_loss", "student_nll", "teacher_nll", "kl"):
            assert other[f"eval_{key}"] == pytest.approx(metrics[0][f"eval_{key}"], rel=1e-5), key


@pytest.mark.parametrize("assistant_only", [False, True])
def test_chats_train_on_all_tokens_or_on_the_assistant_alone(assistant_only, tmp_path):
    args = KDSFTConfig(
        str(tmp_path),
        assistant_only_loss=assistant_only,
        **(COMMON | {"bf16": False, "gradient_checkpointing": False}),
    )
    student, teacher = tiny.model("llama", layers=1), tiny.model("llama", seed=1)
    trainer = KDSFTTrainer(
        student, teacher, args, train_dataset=tiny.messages_dataset(), processing_class=tiny.tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert ((batch["labels"] == -100) & (batch["attention_mask"] == 1)).any() == assistant_only
    loss = trainer.compute_loss(student.eval(), batch)
    torch.testing.assert_close(loss, naive_loss(student, teacher, batch, shift=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kd", "sft"])
@pytest.mark.parametrize("extra", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_is_used_and_trained(kind, extra, tmp_path):
    student, teacher = tiny.model("llama", layers=1), tiny.model("llama", seed=1)
    peft_config = LoraConfig(**(LORA | extra))
    tokenizer = tiny.tokenizer()
    if kind == "kd":
        args = KDConfig(str(tmp_path), max_steps=2, **COMMON)
        data = {"train_dataset": tiny.tokenized_dataset(), "data_collator": DataCollatorForSeq2Seq(tokenizer)}
        trainer = KDTrainer(student, teacher, args, peft_config=peft_config, processing_class=tokenizer, **data)
    else:
        args = KDSFTConfig(str(tmp_path), max_steps=2, **(COMMON | {"bf16": False, "gradient_checkpointing": False}))
        data = {"train_dataset": tiny.prompt_completion_dataset()}
        trainer = KDSFTTrainer(student, teacher, args, peft_config=peft_config, processing_class=tokenizer, **data)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    assert any("lm_head" in name and not torch.equal(after[name], before[name]) for name in after)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    expected = naive_loss(trainer.model, teacher, batch, shift=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_of_experts_keeps_its_load_balancing_loss(tmp_path):
    student = tiny.model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = kd_trainer(tmp_path, "causal_lm", student=student)
    batch = next(iter(trainer.get_train_dataloader()))
    features = {key: value for key, value in batch.items() if key != "labels"}
    expected = naive_loss(student, trainer.teacher.model, batch, shift=True) + 0.5 * student(**features).aux_loss
    items = 4 * (batch["labels"][:, 1:] != -100).sum()  # of which this micro-batch has a quarter
    loss = trainer.compute_loss(student, batch, num_items_in_batch=items)
    torch.testing.assert_close(loss, expected / 4, rtol=1e-5, atol=1e-6)
    loss.backward()
    found = student.model.layers[0].mlp.gate.weight.grad.clone()
    student.zero_grad()
    (expected / 4).backward()
    torch.testing.assert_close(found, student.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("fields", "refused"), [({}, True), ({"eval_packing": False}, False)])
def test_packed_evaluation_on_several_ranks_is_refused(fields, refused, tmp_path, monkeypatch):
    trainer = make_trainer("sft", tmp_path, packing=True, max_length=64, **fields)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    if refused:
        with pytest.raises(ValueError, match="eval_packing=False"):
            trainer._check_runtime()
    else:
        trainer._check_runtime()

"""Attention objectives in a run: against plain autograd on the maps that eager models return."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import HfArgumentParser

from hf_distill import AttentionObjective, KDConfig, KDTrainer, ModelTeacher
from hf_distill.signals import Layers, Signal
from hf_distill.teachers import AdapterDisabledTeacher
from hf_distill.training.terms import build_objectives
from tests import tiny
from tests.attention_twins import naive_kl
from tests.training.runs import COMMON, LORA, logged, make_models, make_trainer, trained
from tests.training.test_trainers import kd_trainer, naive_loss


def eager(model: torch.nn.Module) -> torch.nn.Module:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def naive_distance(student, teacher, batch, *, task):
    """The KL of the last layers' maps, a mean over what the labels train."""
    features = {key: value for key, value in batch.items() if key != "labels"}
    ours, theirs = (model(**features, output_attentions=True).attentions[-1] for model in (student, teacher))
    theirs = theirs.detach().unflatten(1, (ours.shape[1], -1)).mean(2)
    mask = batch["attention_mask"]
    values = naive_kl(ours, theirs, (theirs > 0) & mask[:, None, None].bool())
    if task == "causal_lm":
        return values[:, :-1][batch["labels"][:, 1:] != -100].mean()
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


@pytest.mark.parametrize(
    ("task", "family", "teacher_family"),
    [("causal_lm", "llama", "gemma2"), ("sequence_classification", "distilbert", "bert")],
)
def test_loss_and_gradients_are_those_of_whole_maps(task, family, teacher_family, tmp_path):
    student = tiny.model(family, task=task, num_labels=3, initializer_range=0.2)
    teacher = tiny.model(
        teacher_family, layers=3, task=task, seed=1, num_labels=3, num_attention_heads=8, initializer_range=0.2
    )
    trainer = kd_trainer(
        tmp_path, task, student=student, teacher=teacher, attention_weight=3.0, attention_loss="map_kl"
    )
    assert trainer.objectives[-1].pairs == ((2, 3),)
    batch = next(iter(trainer.get_train_dataloader()))
    twin = eager(student)
    loss = trainer.compute_loss(student.eval(), batch)
    loss.backward()
    distance = naive_distance(twin, eager(teacher), batch, task=task)
    expected = naive_loss(twin, teacher, batch, shift=task == "causal_lm") + 3.0 * distance
    expected.backward()
    assert distance > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), copied in zip(student.named_parameters(), twin.parameters(), strict=True):
        if copied.grad is not None:
            torch.testing.assert_close(parameter.grad, copied.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_adapter_that_has_learned_nothing_has_the_relations_of_its_base(tmp_path):
    args = KDConfig(
        str(tmp_path), max_steps=2, ce_weight=0.5, kd_weight=0.0, attention_weight=0.1, gradient_checkpointing=True,
        **COMMON,
    )  # fmt: skip
    trainer = KDTrainer(
        tiny.model("llama"), "base", args, train_dataset=tiny.tokenized_dataset(),
        data_collator=make_trainer("kd", tmp_path).data_collator, peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    first, last = logged(trainer, "attention_loss")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert last > 0
    trainer.create_model_card(dataset_name="tiny")
    assert "2012.15828" in (tmp_path / "README.md").read_text()


def test_the_callback_brings_the_attention_of_packed_rows_nearer(tmp_path):
    student, teacher = make_models()
    trainer = make_trainer(
        "sft-callback", tmp_path, models=(student, teacher), objectives=[AttentionObjective(20.0)], max_steps=2,
        padding_free=True, max_length=None, per_device_train_batch_size=8, learning_rate=0.05,
    )  # fmt: skip
    before = trained(trainer)
    trainer.train()
    first, last = logged(trainer, "attention_loss")
    assert 0 < last < first
    assert any((before[name] - value).abs().max() > 0 for name, value in trained(trainer).items())
    assert {model.config._attn_implementation for model in (student, teacher)} == {"sdpa"}


@pytest.mark.parametrize("kind", ["model", "base"])
def test_teachers_give_the_attention_that_is_asked_for(kind):
    batch = {"input_ids": torch.arange(10, 22).view(2, 6)}
    if kind == "model":
        teacher = ModelTeacher(tiny.model("llama"))
    else:
        from tests.teachers.test_adapter_teacher import adapted

        teacher = AdapterDisabledTeacher(adapted(tiny.model("llama")))
    asked = Layers(hidden=frozenset({1}), attention=frozenset({2}))
    signals = teacher.signals(batch, {Signal.ATTENTION}, asked)
    assert (signals.logits, signals.hidden) == (None, {})
    [(layer, states)] = signals.attention.items()
    assert (layer, states.query.shape, states.key.shape) == (2, (2, 4, 6, 8), (2, 2, 6, 8))
    assert not states.query.requires_grad
    assert states.visibility.causal
    base = ModelTeacher(tiny.model("llama")).signals(batch, {Signal.ATTENTION}, asked)
    torch.testing.assert_close(states.query, base.attention[2].query)
    assert teacher.signals(batch, {Signal.HIDDEN_STATES}, asked).attention == {}


def test_flags_build_the_objective_that_they_name():
    flags = ["--attention_weight", "0.2", "--attention_loss", "map_mse"]
    [args] = HfArgumentParser(KDConfig).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *flags])
    [_, objective] = build_objectives(args, None)
    assert (objective.weight, objective.loss, objective.num_pairs) == (0.2, "map_mse", 1)
    for field, message in ({"attention_weight": -1.0}, "attention_weight"), ({"attention_loss": "maps"}, "'maps'"):
        with pytest.raises(ValueError, match=message):
            KDConfig("out", **field)


def test_heads_that_do_not_fit_are_refused_before_the_first_step(tmp_path):
    models = tiny.model("llama", layers=1), tiny.model("llama", num_attention_heads=8, seed=1)
    with pytest.raises(ValueError, match=r"student \(LlamaForCausalLM\) has 4 and the teacher \(LlamaForCausalLM\) 8"):
        make_trainer("kd", tmp_path, models=models, attention_weight=0.1, attention_loss="score_mse")
    teacher = tiny.model("gptj", seed=1)
    with pytest.raises(ValueError, match=r"cannot be had of the teacher \(GPTJForCausalLM\)"):
        make_trainer("kd", tmp_path, models=(models[0], teacher), attention_weight=0.1, attention_loss="map_kl")
    make_trainer("kd", tmp_path, models=(models[0], teacher), attention_weight=0.1)


def unheard_models():
    """Pairs of models, one of which cannot be tapped, and the loss for which it cannot."""
    flex = tiny.model("llama", layers=1)
    flex.config._attn_implementation_internal = "flex_attention"
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    llama, wide = tiny.model("llama", layers=1), tiny.model("llama", seed=1)
    return {
        "implementation": (flex, wide, "relations", r"of the student .*'flex_attention'.*'sdpa'"),
        "prefix": (get_peft_model(llama, prefix), wide, "relations", r"of the student .*PREFIX_TUNING.*LoraConfig"),
        "family": (llama, tiny.model("bloom"), "relations", r"of the teacher \(Bloom.*match hidden states instead"),
        "sinks": (llama, tiny.model("gpt_oss"), "map_kl", r"of the teacher \(GptOss.*sinks.*loss='relations'"),
    }


@pytest.mark.parametrize("kind", ["kd", "sft-callback"])
@pytest.mark.parametrize("why", ["implementation", "prefix", "family", "sinks"])
def test_attention_that_cannot_be_heard_is_refused_before_the_first_step(why, kind, tmp_path):
    student, teacher, loss, message = unheard_models()[why]
    settings = {"attention_weight": 0.1, "attention_loss": loss}
    if kind != "kd":
        settings = {"objectives": [AttentionObjective(0.1, loss=loss)]}
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, tmp_path, models=(student, teacher), **settings)

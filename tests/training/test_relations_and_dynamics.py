"""Terms beyond pairs of hidden states, in a run: against plain autograd on the outputs of whole models."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, HfArgumentParser

from hf_distill import DistillationCallback, KDConfig, KDTrainer, LogitObjective, RelationObjective
from hf_distill.functional.relations import RELATIONS
from hf_distill.objectives import FeatureDynamicsObjective, HiddenDeltaObjective, RegressorFreeObjective
from hf_distill.students import select_channels
from hf_distill.training.terms import build_objectives
from tests import tiny
from tests.functional.test_dynamics import naive_dynamics
from tests.training.runs import COMMON, logged
from tests.training.test_callback import loss_and_gradients, plain_trainer
from tests.training.test_trainers import kd_trainer, naive_loss


def hidden_states(model, batch) -> tuple[torch.Tensor, ...]:
    """Of all layers, at the positions that predict a labelled token."""
    kept = (batch["labels"][:, 1:] != -100).flatten()
    outputs = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    return tuple(states[:, :-1].flatten(0, 1)[kept] for states in outputs.hidden_states)


def naive_term(objective, student, teacher, batch) -> torch.Tensor:
    """The mean over labels."""
    ours, theirs = hidden_states(student, batch), [states.detach() for states in hidden_states(teacher, batch)]
    if isinstance(objective, RelationObjective):
        picked = (2 * torch.arange(16) + 1) * len(ours[0]) // 32
        return RELATIONS["rkd"](ours[-1][picked], theirs[-1][picked])
    if isinstance(objective, FeatureDynamicsObjective):
        trajectory, derivative = naive_dynamics(ours[1:3], student.lm_head, theirs[2:6:2], teacher.lm_head)
        return (trajectory + derivative).mean()
    if isinstance(objective, HiddenDeltaObjective):
        step = objective.projectors[0](ours[2] - ours[1])
        return (1 - torch.cosine_similarity(step, theirs[4] - theirs[2], dim=-1)).mean()
    pairs = [(ours[i], theirs[i + 3][:, objective.channels]) for i in (2, 3)]
    return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()


def make(kind: type, teacher):
    if kind is RegressorFreeObjective:
        batch = {"input_ids": torch.arange(5, 45)[None]}
        return kind(0.3, channels=select_channels(teacher, [batch], 32))
    return kind(0.3, num_tokens=16) if kind is RelationObjective else kind(0.3)


@pytest.mark.parametrize(
    "kind", [RelationObjective, FeatureDynamicsObjective, HiddenDeltaObjective, RegressorFreeObjective]
)
def test_loss_and_gradients_are_those_of_the_whole_outputs_and_it_trains(kind, tmp_path):
    student, teacher = tiny.model("llama", layers=3), tiny.model("qwen3", layers=6, seed=1, hidden_size=48)
    objective = make(kind, teacher)
    trainer = KDTrainer(
        student, teacher, KDConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, **COMMON),
        objectives=[LogitObjective(0.5), objective], train_dataset=tiny.tokenized_dataset(),
        eval_dataset=tiny.tokenized_dataset(4, seed=1), data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    weights = dict(student.named_parameters()) | dict(objective.named_parameters())
    loss = trainer.compute_loss(student.eval(), batch)
    term = naive_term(objective, student, teacher, batch)
    expected = naive_loss(student, teacher, batch, shift=True) + 0.3 * term
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found, gradients = (
        torch.autograd.grad(total, list(weights.values()), allow_unused=True) for total in (loss, expected)
    )
    for name, ours, theirs in zip(weights, found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    trainer.train()
    assert logged(trainer, f"{objective.name}_loss")[0] == pytest.approx(term.item(), rel=1e-4)
    with torch.no_grad():
        batches = [(batch, naive_term(objective, student, teacher, batch)) for batch in trainer.get_eval_dataloader()]
    counts = torch.tensor([float((batch["labels"][:, 1:] != -100).sum()) for batch, _ in batches])
    mean = (counts * torch.stack([value for _, value in batches])).sum() / counts.sum()
    assert trainer.evaluate()[f"eval_{objective.name}_loss"] == pytest.approx(mean.item(), rel=1e-4)


def test_a_callback_without_logit_objectives_gives_the_heads_to_those_that_need_them(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path)
    student, teacher = trainer.model, tiny.model("qwen3", layers=4, seed=1, hidden_size=48)
    batch = next(iter(trainer.get_train_dataloader()))
    own = trainer.compute_loss(student.train(), dict(batch))
    objective = FeatureDynamicsObjective(0.3, layer_mapping=[(1, 2), (2, 4)])
    trainer.add_callback(DistillationCallback(trainer, teacher, [objective]))
    loss, found = loss_and_gradients(trainer, batch, list(student.parameters()))
    ours, theirs = hidden_states(student, batch), hidden_states(teacher, batch)
    trajectory, derivative = naive_dynamics(ours[1:], student.lm_head, theirs[2:5:2], teacher.lm_head)
    expected = own + 0.3 * (trajectory + derivative).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def vocabulary_head(model):
    """The logits of hidden states that have passed the final norm."""
    config = model.config
    if config.model_type == "gemma2":
        cap = config.final_logit_softcapping
        return lambda hidden: cap * torch.tanh(model.lm_head(hidden) / cap)
    return lambda hidden: config.logit_scale * model.lm_head(hidden)


@pytest.mark.parametrize("families", [("gemma2", "cohere"), ("cohere", "gemma2")])
@pytest.mark.parametrize("way", ["trainer", "callback"])
def test_the_final_norms_scales_and_softcaps_are_each_models_own(way, families, tmp_path):
    special = {"gemma2": {"final_logit_softcapping": 2.0}, "cohere": {"logit_scale": 0.5}}
    student = tiny.model(families[0], layers=3, **special[families[0]], initializer_range=0.3)
    teacher = tiny.model(families[1], layers=5, seed=1, hidden_size=48, **special[families[1]], initializer_range=0.3)
    for model in (student, teacher):
        torch.nn.init.normal_(
            model.model.norm.weight, generator=torch.Generator().manual_seed(model.config.hidden_size)
        )
    objective = FeatureDynamicsObjective(0.3, layer_mapping=[(1, 2), (2, 3), (3, 5)], final_norm=True)
    if way == "trainer":
        trainer = kd_trainer(
            tmp_path, "causal_lm", student=student, teacher=teacher, objectives=[LogitObjective(0.5), objective]
        )
        batch = next(iter(trainer.get_train_dataloader()))
        rest = naive_loss(student, teacher, batch, shift=True)
    else:
        trainer = plain_trainer("causal_lm", tmp_path, student)
        batch = next(iter(trainer.get_train_dataloader()))
        rest = trainer.compute_loss(student.train(), dict(batch))
        trainer.add_callback(DistillationCallback(trainer, teacher, [objective]))
    loss, found = loss_and_gradients(trainer, batch, list(student.parameters()))
    ours, theirs = hidden_states(student, batch), hidden_states(teacher, batch)
    ours = [student.model.norm(ours[1]), student.model.norm(ours[2]), ours[3]]
    theirs = [teacher.model.norm(theirs[2]), teacher.model.norm(theirs[3]), theirs[5]]
    trajectory, derivative = naive_dynamics(ours, vocabulary_head(student), theirs, vocabulary_head(teacher))
    expected = rest + 0.3 * (trajectory + derivative).mean()
    assert trajectory.min() > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    for name, mine, naive in zip(dict(student.named_parameters()), found, gradients, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_without_a_final_norm_is_refused_before_the_first_step(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path)
    teacher = tiny.model("opt", layers=4, seed=1, do_layer_norm_before=False)
    with pytest.raises(ValueError, match=r"but teacher \(OPTForCausalLM\) has none that is known"):
        DistillationCallback(
            trainer, teacher, [FeatureDynamicsObjective(layer_mapping=[(1, 2), (2, 4)], final_norm=True)]
        )


def test_a_classifier_has_no_dynamics_over_a_vocabulary(tmp_path):
    trainer = plain_trainer("sequence_classification", tmp_path)
    teacher = tiny.model("llama", layers=4, task="sequence_classification", num_labels=3, seed=1)
    with pytest.raises(ValueError, match=r"student \(LlamaForSequenceClassification\) and teacher \(Llama"):
        DistillationCallback(trainer, teacher, [FeatureDynamicsObjective()])


def test_the_flag_builds_the_relation_objective():
    flags = ["--output_dir", "out", "--use_cpu", "--relation_weight", "0.2"]
    [args] = HfArgumentParser(KDConfig).parse_args_into_dataclasses(flags)
    [_, objective] = build_objectives(args, None)
    assert isinstance(objective, RelationObjective)
    assert objective.weight == 0.2
    with pytest.raises(ValueError, match="relation_weight"):
        KDConfig("out", relation_weight=-1.0)

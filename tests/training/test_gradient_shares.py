"""The share of each term in the gradient, against plain autograd, and training as it is without it."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from hf_distill import (
    DistillationCallback,
    GradientShareCallback,
    HiddenStateObjective,
    KDConfig,
    KDTrainer,
    LogitObjective,
)
from tests import tiny
from tests.training.runs import COMMON, logged, make_models, make_trainer, trained
from tests.training.test_callback import plain_trainer
from tests.training.test_features import naive_distance
from tests.training.test_trainers import naive_loss


def kd(tmp_path, *, objectives=None, models=None, every=1, **config):
    objectives = objectives or [LogitObjective(0.5), HiddenStateObjective(0.3, loss="mse")]
    trainer = KDTrainer(
        *(models or make_models(wide_teacher=True)),
        KDConfig(str(tmp_path), per_device_train_batch_size=4, **(COMMON | config)),
        objectives=objectives,
        train_dataset=tiny.tokenized_dataset(24),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )
    if every:
        trainer.add_callback(GradientShareCallback(every))
    return trainer


def shares_of(trainer, *names) -> list[float]:
    return [logged(trainer, f"{name}_gradient_share")[0] for name in names]


def norm_of(loss, model) -> float:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item()


def test_shares_are_those_of_plain_autograd_on_the_first_micro_batch(tmp_path):
    models = make_models(wide_teacher=True)
    trainer = kd(tmp_path, models=models, max_steps=1, gradient_accumulation_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    student, teacher = models
    hidden = trainer.objectives[1]
    norms = [
        norm_of(naive_loss(student, teacher, batch, shift=True, ce=0.5, kd=0.0), student),
        norm_of(naive_loss(student, teacher, batch, shift=True, ce=0.0, kd=0.5), student),
        norm_of(
            0.3 * naive_distance(student, teacher, hidden.projectors, hidden.pairs, batch, task="causal_lm"), student
        ),
    ]
    trainer.train()
    found = shares_of(trainer, "ce", "forward_kl", "hidden")
    assert found == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-4)


def test_twice_the_weight_is_twice_the_norm_and_none_is_none(tmp_path):
    ratios = []
    for weight in (0.2, 0.4):
        trainer = kd(tmp_path, max_steps=1, objectives=[LogitObjective(weight), HiddenStateObjective(0.0, loss="mse")])
        trainer.train()
        ce, kl, hidden = shares_of(trainer, "ce", "forward_kl", "hidden")
        assert ce + kl == pytest.approx(1)
        assert hidden == 0
        ratios.append(kl / ce)
    assert ratios[1] == pytest.approx(2 * ratios[0], rel=1e-5)


def noisy_models():
    """A student with dropout, and an objective's own randomness beside it."""
    student = tiny.model("gpt2", layers=1, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    return student, tiny.model("gpt2", layers=2, seed=1, n_embd=48)


class Sampled(HiddenStateObjective):
    """Draws at random, as objectives on sampled tokens do."""

    def forward(self, student, teacher):
        return super().forward(student, teacher) * torch.rand(())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_not_changed_by_a_bit(checkpointing, tmp_path):
    runs = []
    for every in (0, 2):
        trainer = kd(
            tmp_path,
            models=noisy_models(),
            objectives=[LogitObjective(0.5), Sampled(0.3, loss="mse")],
            every=every,
            max_steps=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        trainer.train()
        runs.append(trained(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    found = logged(trainer, "hidden_gradient_share")
    assert len(found) == 2  # in the steps 0 and 2
    assert all(0 < share < 1 for share in found)


def test_a_log_has_the_mean_of_what_was_measured_since_the_last(tmp_path):
    each, together = kd(tmp_path, max_steps=2), kd(tmp_path, max_steps=2, logging_steps=2)
    for trainer in (each, together):
        trainer.train()
    values = logged(each, "ce_gradient_share")
    assert values[0] != values[1]
    assert logged(together, "ce_gradient_share") == pytest.approx([sum(values) / 2], rel=1e-6)


def test_sft_runs_in_bf16_are_measured(tmp_path):
    trainer = make_trainer("sft", tmp_path, lora=True, max_steps=1, bf16=True)
    trainer.add_callback(GradientShareCallback())
    trainer.train()
    assert sum(shares_of(trainer, "ce", "forward_kl")) == pytest.approx(1)


@pytest.mark.parametrize("divides_by_labels", [True, False])
def test_beside_a_trainers_own_loss_the_terms_stand_as_they_are_added(divides_by_labels, tmp_path):
    teacher = make_models()[1]
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=1, gradient_accumulation_steps=2)
    trainer.train_dataset = tiny.tokenized_dataset(7)
    trainer.model_accepts_loss_kwargs = divides_by_labels  # otherwise it takes the mean of its micro-batches' means
    trainer.add_callback(DistillationCallback(trainer, teacher, [LogitObjective(0.5)]))
    trainer.add_callback(GradientShareCallback())
    batches = list(trainer.get_train_dataloader())
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    share = counts[0] / sum(counts)
    assert abs(share - 0.5) > 0.01
    own, term = (
        norm_of(naive_loss(trainer.model, teacher, batches[0], shift=True, ce=ce, kd=kd), trainer.model)
        for ce, kd in ((1.0, 0.0), (0.0, 0.5))
    )
    norms = [own * (share if divides_by_labels else 0.5), term * share]
    trainer.train()
    assert shares_of(trainer, "own", "forward_kl") == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-4)


def test_a_trl_trainers_own_loss_can_be_measured_without_changing_it(tmp_path):
    runs = []
    for measured in (False, True):
        trainer = make_trainer("sft-callback", tmp_path, max_steps=2, per_device_train_batch_size=4)
        if measured:
            trainer.add_callback(GradientShareCallback(1))
        trainer.train()
        runs.append(trained(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert sum(shares_of(trainer, "own", "forward_kl")) == pytest.approx(1)


def measure(trainer):
    callback = GradientShareCallback()
    callback.on_step_begin(trainer.args, trainer.state, trainer.control)
    callback.measure(trainer, dict)


def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="every"):
        GradientShareCallback(0)
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = kd(tmp_path, max_steps=1)
        setattr(trainer, name, True)  # Accelerate makes no sharded run of one process on a CPU
        with pytest.raises(ValueError, match="which FSDP and DeepSpeed shard"):
            measure(trainer)
    trainer = kd(tmp_path, max_steps=1)
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="torch_compile=False"):
        measure(trainer)
    plain = plain_trainer("causal_lm", tmp_path, max_steps=1)
    plain.add_callback(GradientShareCallback())
    with pytest.raises(ValueError, match="no teacher"):
        plain.train()

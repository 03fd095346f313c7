from __future__ import annotations

import pytest

from hf_distill import DistillationCallback, LogitObjective
from tests.training.runs import TAID, logged, make_models, make_trainer, trained
from tests.training.test_callback import plain_trainer


def ts(tmp_path, **config):
    trainer = make_trainer("kd", tmp_path, **(TAID | config))
    trainer.train()
    return logged(trainer, "taid_t")


def test_t_follows_the_loss_of_an_optimizer_step_however_it_is_cut_and_evaluated(tmp_path):
    whole = ts(tmp_path, per_device_train_batch_size=4)
    cut = ts(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1
    )
    still = ts(tmp_path, divergence_kwargs={"alpha": 1.5, "momentum": 0.999}, per_device_train_batch_size=4)
    assert cut == pytest.approx(whole, rel=1e-6)
    assert whole[:2] == pytest.approx([0.4, 0.6]) == still[:2]
    assert whole[2] != pytest.approx(still[2], rel=1e-6)  # the losses are seen
    assert whole == sorted(whole)


@pytest.mark.parametrize("kind", ["kd", "sft-callback"])
def test_a_resumed_run_goes_on_with_its_t(kind, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "gradient_accumulation_steps": 2}
    if kind == "kd":
        saving |= {key: value for key, value in TAID.items() if key != "max_steps"}
    else:
        saving["objectives"] = [LogitObjective(divergence="taid", divergence_kwargs=TAID["divergence_kwargs"])]
    whole = make_trainer(kind, tmp_path, **saving)
    whole.train()
    if kind != "kd":
        saving["objectives"] = [LogitObjective(divergence="taid", divergence_kwargs=TAID["divergence_kwargs"])]
    resumed = make_trainer(kind, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed, "taid_t")[-2:] == logged(whole, "taid_t")[-2:]
    assert logged(whole, "taid_t")[3] > 0.86  # the line alone is at 0.85
    for name, value in trained(whole).items():
        assert value.equal(trained(resumed)[name]), name


def test_the_callback_moves_t_by_the_loss_too(tmp_path):
    trainer = plain_trainer("causal_lm", tmp_path, max_steps=4)
    settings = {"t_start": 0.4, "t_end": 0.5, "alpha": 0.9}
    objectives = [LogitObjective(divergence="taid", divergence_kwargs=settings)]
    trainer.add_callback(DistillationCallback(trainer, make_models()[1], objectives))
    trainer.train()
    assert logged(trainer, "taid_t") == pytest.approx([0.4, 0.4 + 0.1 / 3, 0.5, 0.5])  # the line alone is at 0.467

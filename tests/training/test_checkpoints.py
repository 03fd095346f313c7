"""What a run writes: the student or its adapter, nothing of the teacher, and enough to go on after a kill."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_distill import KDConfig, KDTrainer
from tests import tiny
from tests.processes import exit_code
from tests.training.runs import COMMON, LORA, logged, make_trainer, trained


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("kind", ["kd", "sft"])
def test_a_saved_student_holds_no_teacher_and_loads_as_a_plain_model(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        tensors = saved_tensors(folder)
        assert tensors.keys() <= trainer.model.state_dict().keys()
        assert not any("layers.1." in name for name in tensors)  # the student has one layer, the teacher two
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], value), name
    optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert optimized == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("kind", ["kd", "sft"])
def test_a_lora_student_saves_its_adapter_alone(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, lora=True, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    tensors = saved_tensors(tmp_path / "final")
    assert tensors
    assert all("lora_" in name for name in tensors)
    reloaded = PeftModel.from_pretrained(tiny.model("llama", layers=1, seed=0), tmp_path / "final")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(reloaded.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_the_base_as_teacher_is_the_student_without_its_adapter_and_no_second_copy(tmp_path):
    student = tiny.model("llama", layers=2, seed=0)
    twin = tiny.model("llama", layers=2, seed=0)
    runs = []
    for teacher in ("base", twin):
        model = student if teacher == "base" else tiny.model("llama", layers=2, seed=0)
        count = sum(p.numel() for p in model.parameters())
        trainer = KDTrainer(
            model,
            teacher,
            KDConfig(str(tmp_path), max_steps=3, **COMMON),
            train_dataset=tiny.tokenized_dataset(24),
            data_collator=make_trainer("kd", tmp_path).data_collator,
            peft_config=LoraConfig(**LORA),
        )
        trainer.train()
        base_parameters = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
        assert base_parameters == count
        runs.append((logged(trainer, "loss"), logged(trainer, "kl"), trained(trainer)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5, abs=1e-7)
    assert runs[0][1][0] == pytest.approx(0.0, abs=1e-6)
    assert runs[0][1][2] > 0
    for name, value in runs[1][2].items():
        torch.testing.assert_close(runs[0][2][name], value)


def test_the_base_as_teacher_needs_an_adapter(tmp_path):
    student = tiny.model("llama")
    with pytest.raises(ValueError, match="peft_config"):
        KDTrainer(student, "base", KDConfig(str(tmp_path), **COMMON))


class EndAtStep(TrainerCallback):
    """Stops a run, or kills its process as a lost node would: no cleanup, no exception."""

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step = step
        self.kill = kill

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        control.should_training_stop |= state.global_step == self.step


def resumable(kind: str, folder: Path, lora: bool):
    # Adam has state, the schedule is not constant, and data are shuffled: all three must come back.
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    return make_trainer(
        kind, folder, lora=lora, rows=24, max_steps=6, save_strategy="steps", save_steps=2, **settings,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip


def assert_resumes_as_if_nothing_had_happened(kind: str, lora: bool, interrupted: Path, whole_folder: Path) -> None:
    whole, resumed = resumable(kind, whole_folder, lora), resumable(kind, interrupted, lora)
    whole.train()
    assert get_last_checkpoint(str(interrupted)).endswith("checkpoint-4")
    resumed.train(resume_from_checkpoint=True)
    for key in ("loss", "ce_loss", "forward_kl_loss", "kl"):
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    for name, value in trained(whole).items():
        torch.testing.assert_close(trained(resumed)[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(("kind", "lora"), [("kd", False), ("sft", False)], ids=["KDTrainer", "KDSFTTrainer"])
def test_a_stopped_run_resumes_as_if_nothing_had_happened(kind, lora, tmp_path):
    stopped = resumable(kind, tmp_path / "stopped", lora)
    stopped.add_callback(EndAtStep(5))
    stopped.train()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-5", ignore_errors=True)
    assert_resumes_as_if_nothing_had_happened(kind, lora, tmp_path / "stopped", tmp_path / "whole")


def train_until_killed(folder: Path) -> None:
    victim = resumable("sft", folder, lora=True)
    victim.add_callback(EndAtStep(5, kill=True))
    victim.train()


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path):
    assert exit_code(train_until_killed, tmp_path / "killed") == -signal.SIGKILL
    assert_resumes_as_if_nothing_had_happened("sft", True, tmp_path / "killed", tmp_path / "whole")

"""DeepSpeed's ZeRO-3, for real: two ranks on the CPU, every weight partitioned, train as one process does."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.processes import run_on_two_ranks
from tests.training.runs import logged, make_models, make_trainer, trained


pytestmark = pytest.mark.slow

KINDS = {"KDTrainer": ("kd", False), "KDSFTTrainer-LoRA": ("sft", True), "KDTrainer, tied, by name": ("kd", False)}
KEYS = ["loss", "ce_loss", "forward_kl_loss", "teacher_nll", "kl", "grad_norm"]
ZERO3 = {
    # By default weights as small as these are not partitioned.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,
}


def train_partitioned(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    import deepspeed
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from hf_distill.functional import fused

    # It would compile a faster all-reduce.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    # Trainer gives DeepSpeed the backend of a GPU; this state is there first.
    PartialState(backend="gloo")
    state = {"use_cpu": False, "deepspeed": ZERO3, "accelerator_config": {"use_configured_state": True}}
    # Chunks of three rows: the ranks have different numbers of labelled tokens, so of chunks, and must not wait.
    fused.chunk_rows = lambda *_, **__: 3
    for name, (kind, lora) in KINDS.items():
        AcceleratorState._reset_state()  # the second plugin of a process is refused
        unset_hf_deepspeed_config()  # else the second student would be made in parts
        # Loaded by the trainer, models are in parts from the start.
        models = [str(folder / "student"), str(folder / "teacher")] if name.endswith("by name") else make_models()
        size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
        trainer = make_trainer(kind, folder / name, lora=lora, models=models, **size, **state)
        assert all(parameter.numel() == 0 for parameter in trainer.teacher.model.parameters())
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        model = trainer.accelerator.unwrap_model(trainer.model)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = trained(trainer)
        facts = trainer.teacher.config_for_card()
        torch.save([weights, trainer.state.log_history, metrics, facts], folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    for name, model in zip(("student", "teacher"), make_models(tied=True), strict=True):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    run_on_two_ranks(partial(train_partitioned, folder=folder), folder)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_of_zero3_train_and_evaluate_as_one_process(name, partitioned, tmp_path):
    kind, lora = KINDS[name]
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    one = make_trainer(kind, tmp_path, lora=lora, models=make_models(tied="tied" in name), **size)
    one.train()
    weights, history, metrics, facts = torch.load(partitioned / f"{name}-0.pt")
    for key in KEYS:
        values = [entry[key] for entry in history if key in entry]
        assert values == pytest.approx(logged(one, key), rel=1e-5, abs=1e-5), key
    expected = trained(one)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5, msg=key)
    evaluated = one.evaluate()
    for key in ("loss", "teacher_nll", "kl"):
        assert metrics[f"eval_{key}"] == pytest.approx(evaluated[f"eval_{key}"], rel=1e-5, abs=1e-5), key
    assert facts["parameters"] == one.teacher.config_for_card()["parameters"]


def test_the_folder_of_a_partitioned_run_holds_the_student_alone(partitioned):
    weights, *_ = torch.load(partitioned / "KDTrainer-0.pt")
    saved = load_file(partitioned / "KDTrainer" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, weights[name], msg=name)

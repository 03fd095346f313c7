"""One optimizer step is the same however its batch is cut: 8x1 = 2x4 = 1x8 = two ranks, under plain SGD."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.training.runs import logged, make_trainer, trained


KINDS = [("kd", False), ("kd", True), ("sft", False), ("sft", True)]
KIND_IDS = ["KDTrainer", "KDTrainer-LoRA", "KDSFTTrainer", "KDSFTTrainer-LoRA"]
KEYS = ["loss", "ce_loss", "forward_kl_loss", "student_nll", "teacher_nll", "top1_agreement", "kl"]


def assert_same_weights(weights, reference) -> None:
    assert weights.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=KIND_IDS)
def test_the_cut_of_the_batch_changes_neither_losses_nor_student(kind, lora, tmp_path):
    runs = []
    for size, steps in [(8, 1), (2, 4), (1, 8)]:
        trainer = make_trainer(
            kind, tmp_path, lora=lora, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2
        )
        before = trained(trainer)
        trainer.train()
        after = trained(trainer)
        assert any((before[name] - after[name]).abs().max() > 1e-4 for name in before)
        runs.append(({key: logged(trainer, key) for key in KEYS}, after))
    for losses, weights in runs[1:]:
        for key in KEYS:
            assert losses[key] == pytest.approx(runs[0][0][key], rel=1e-5, abs=1e-5), key
        assert_same_weights(weights, runs[0][1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=KIND_IDS)
def test_two_ranks_train_and_evaluate_as_one(kind, lora, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [
        *launch,
        "-m",
        "tests.training.runs",
        kind,
        "lora" if lora else "full",
        str(tmp_path),
        json.dumps(settings),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world"] == 2

    one = make_trainer(kind, tmp_path / "one", lora=lora, **(settings | {"per_device_train_batch_size": 4}))
    one.train()
    for key in KEYS:
        values = [entry[key] for entry in report["history"] if key in entry]
        assert values == pytest.approx(logged(one, key), rel=1e-5, abs=1e-5), key
    assert_same_weights(torch.load(tmp_path / "weights.pt"), trained(one))
    # Five rows on two ranks: the sampler repeats some, and none may be counted twice.
    expected = one.evaluate()
    for key in KEYS:
        assert report["eval"][f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-5, abs=1e-5), key

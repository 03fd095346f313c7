"""One optimizer step is the same however its batch is cut: 8x1 = 2x4 = 1x8 = two ranks, under plain SGD."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.training.runs import HIDDEN, TAID, logged, make_trainer, taid_states, trained


KINDS = {
    "KDTrainer": {"kind": "kd"},
    "KDTrainer-taid": {"kind": "kd", **TAID, "ce_weight": 0.1},
    "KDTrainer-LoRA-projectors": {"kind": "kd", "lora": True, **HIDDEN},
    "KDSFTTrainer-attention": {"kind": "sft", "attention_weight": 2.0},
    "KDSFTTrainer-LoRA-projectors": {"kind": "sft", "lora": True, **HIDDEN},
    "SFTTrainer-callback-projectors": {"kind": "sft-callback", "positions": "real", **HIDDEN},
    "DPOTrainer-callback-projectors": {"kind": "dpo-callback", **HIDDEN},
}
KEYS = ["loss", "ce_loss", "forward_kl_loss", "student_nll", "teacher_nll", "top1_agreement", "kl"]


def assert_same_weights(weights, reference) -> None:
    assert weights.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


def keys_of(name: str) -> list[str]:
    own = [key for key in KEYS if key != "ce_loss"] if "callback" in name else KEYS
    if "taid" in name:
        own = [key.replace("forward_kl", "taid") for key in own]
    return own + ["hidden_loss"] * ("projectors" in name) + ["attention_loss"] * ("attention" in name)


@pytest.mark.parametrize("name", KINDS)
def test_the_cut_of_the_batch_changes_neither_losses_nor_student(name, tmp_path):
    runs = []
    for size, steps in [(8, 1), (2, 4), (1, 8)]:
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(output_dir=tmp_path, **({"max_steps": 2} | KINDS[name] | cut))
        before = trained(trainer)
        trainer.train()
        after = trained(trainer)
        moved = {key for key in before if (before[key] - after[key]).abs().max() > 1e-4}
        assert moved
        assert all(key in moved for key in before if key.startswith("objective."))
        runs.append(({key: logged(trainer, key) for key in keys_of(name)}, after, taid_states(trainer)))
    for losses, weights, states in runs[1:]:
        assert states == [pytest.approx(state, rel=1e-6, abs=1e-6) for state in runs[0][2]]
        for key, values in runs[0][0].items():
            assert losses[key] == pytest.approx(values, rel=1e-5, abs=1e-5), key
        assert_same_weights(weights, runs[0][1])


# What accelerate shards layer by layer; parameters of objectives are refused there.
SHARDED = {"KDTrainer": {"kind": "kd"}, "KDSFTTrainer-attention": {"kind": "sft", "attention_weight": 2.0}}
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo ranks give for every kind."""
    return launched(tmp_path_factory.mktemp("two_ranks"), KINDS, "tests.training.runs")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two gloo ranks give that hold half of every weight, of the student and of the teacher."""
    return launched(tmp_path_factory.mktemp("sharded"), SHARDED, "tests.training.sharded_runs", *FSDP2)


def launched(folder, kinds, module, *flags):
    """Start two ranks by `accelerate launch` and read what every kind gave."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    launch_two_ranks(module, str(folder), json.dumps(settings), json.dumps(kinds), flags=flags)
    return {name: torch.load(folder / f"{name}.pt") for name in kinds}


def launch_two_ranks(module, *arguments, flags=()):
    """Run a module on two gloo ranks by `accelerate launch`."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        # With --cpu accelerate starts one process, whatever their number; the config keeps to the CPU.
        *(flags or ["--multi_gpu"]),
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run([*launch, "-m", module, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_train_and_evaluate_as_one(name, two_ranks, tmp_path):
    assert_as_one_process(name, two_ranks[name], tmp_path)


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_of_fsdp2_train_and_evaluate_as_one(name, sharded, tmp_path):
    assert sharded[name]["report"]["kind"] == "FSDP"
    assert_as_one_process(name, sharded[name], tmp_path)


def assert_as_one_process(name, run, tmp_path) -> None:
    report = run["report"]
    assert report["world"] == 2
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one = make_trainer(output_dir=tmp_path, **({"max_steps": 2} | KINDS[name] | cut))
    one.train()
    first, second = report["taid_states"]
    assert first == second  # every bit: the ranks train towards one target
    assert first == [pytest.approx(state, rel=1e-6, abs=1e-6) for state in taid_states(one)]
    assert len(first) == ("taid" in name)
    for key in [*keys_of(name), "taid_t"]:
        values = [entry[key] for entry in report["history"] if key in entry]
        assert values == pytest.approx(logged(one, key), rel=1e-5, abs=1e-5), key
    assert_same_weights(run["weights"], trained(one))
    if one.eval_dataset is None:  # a callback leaves evaluation to its trainer
        return
    # Five rows on two ranks: the sampler repeats some, and none may be counted twice.
    expected = one.evaluate()
    for key in keys_of(name):
        assert report["eval"][f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-5, abs=1e-5), key

"""`hf-distill plan` says from two configs what a run needs and which ways of it fit."""

import pytest

from hf_distill.cli.main import main
from hf_distill.planning import plan, ways
from tests.planning.llama import llama_8b, llama_70b, tiny_config


LLAMA_8B, LLAMA_70B = llama_8b(), llama_70b()


@pytest.fixture
def configs(tmp_path):
    for name, config in (("teacher", LLAMA_70B), ("student", LLAMA_8B)):
        config.save_pretrained(tmp_path / name)
    return ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student")]


def test_the_first_way_that_fits_is_shown_with_its_flags_hours_and_bytes(configs, capsys):
    assert main(["plan", *configs, "--gpus", "8", "--tokens", "1e9"]) == 0
    said = capsys.readouterr().out
    assert "The first that fits: accelerate launch --config_file recipes/accelerate/fsdp2.yaml RECIPE" in said
    assert "--gradient_accumulation_steps 8 --max_length 2048 --gradient_checkpointing true --bf16 true" in said
    assert "most of all: teacher weights (bf16, frozen), 131.4 GiB" in said  # 70.55e9 * 2 bytes
    assert "8.79 : 1" in said  # 70.55 B to 8.03 B
    needs = plan(LLAMA_70B, LLAMA_8B, world_size=8, sharding="fsdp2")
    assert f"{needs.flops_per_token * 1e9 / 400e12 / 3600:,.3g} GPU hours" in said
    assert "nano 40 GB, small 64 GB, base 130 GB, large 260 GB" in said


def test_one_small_gpu_is_told_to_train_an_adapter_from_soft_labels(configs, capsys):
    # 8.03 B parameters in bf16 are 15 GiB; even in 4 bits the teacher alone is over 33 GiB, and a whole student has
    # 16 bytes a parameter, 120 GiB. 24 GiB leave 21.6.
    assert main(["plan", *configs, "--gpu-memory", "24"]) == 0
    said = capsys.readouterr().out
    assert said.count("  fits") == 1
    assert "RECIPE --teacher_cache FOLDER --lora_rank 16" in said
    assert "hf-distill cache build --teacher" in said
    assert "Making the soft labels, once: 142 EFLOP" in said  # 2 * 69.5e9 * 1e9, and attention


def test_what_fits_nowhere_ends_with_the_exit_status_1_and_a_way_out(configs, capsys):
    assert main(["plan", *configs, "--gpu-memory", "14"]) == 1
    said = capsys.readouterr().out
    assert "Nothing fits. adapter of rank 16, soft labels from disk, DDP comes nearest" in said
    # The student's 15 GiB of bf16 are spread over two GPUs.
    assert "this fits: adapter of rank 16, soft labels from disk, FSDP2" in said


def test_a_wide_gap_names_the_candidate_in_between(tmp_path, capsys):
    sizes = {"teacher": 16, "between": 3, "student": 1}
    for name, times in sizes.items():
        tiny_config(layers=4, hidden_size=64 * times, vocab_size=512).save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in sizes]
    given = ["--teacher", names[0], "--student", f"{names[2]}/config.json", "--length", "64"]
    assert main(["plan", *given, "--candidates", names[1]]) == 0
    assert f"the teacher into {names[1]} (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpus", "0"], "`--gpus` is 0"),
        (["--tokens", "0"], "`--tokens` is 0"),
        (["--length", "0"], "`--length` is 0; expected a whole number of at least 1"),
    ],
)
def test_wrong_numbers_are_said_in_a_line(configs, given, message, capsys):
    assert main(["plan", *configs, *given]) == 2
    assert message in capsys.readouterr().err


def test_ways_save_more_and_more_and_are_what_plan_says():
    found = {way.name: way for way in ways(LLAMA_70B, LLAMA_8B, gpus=1, gpu_memory=80)}
    assert list(found) == [
        *("whole student, DDP", "whole student, nf4 teacher, DDP", "whole student, soft labels from disk, DDP"),
        *("adapter of rank 16, DDP", "adapter of rank 16, nf4 teacher, DDP"),
        "adapter of rank 16, soft labels from disk, DDP",
    ]
    needs = plan(LLAMA_70B, LLAMA_8B, teacher_quantization="nf4").bytes_per_rank
    assert found["whole student, nf4 teacher, DDP"].plan.bytes_per_rank == needs
    fitting = found["adapter of rank 16, nf4 teacher, DDP"]
    assert fitting.fits == (fitting.plan.bytes_per_rank <= 0.9 * 80 * 2**30)
    assert (
        fitting.flags == "--config_file recipes/accelerate/ddp.yaml RECIPE --teacher_quantization nf4 --lora_rank 16"
    )

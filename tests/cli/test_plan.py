"""`hf-distill plan` says from two configs what a run needs and which ways of it fit."""

import pytest

from hf_distill.cli.main import main
from hf_distill.planning import plan, ways
from tests.planning.llama import llama_8b, llama_70b


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
    assert "whole student, DDP" in said
    assert "does not fit: teacher weights (bf16)" in said
    needs = plan(LLAMA_70B, LLAMA_8B, world_size=8, sharding="fsdp2")
    assert f"{needs.flops_per_token * 1e9 / 400e12 / 3600:,.3g} GPU hours at 400 TFLOP/s" in said
    assert "nano 40 GB, small 64 GB, base 130 GB, large 260 GB" in said


def test_what_fits_nowhere_ends_with_the_exit_status_1(configs, capsys):
    assert main(["plan", *configs, "--gpu-memory", "8"]) == 1
    assert (
        "Nothing fits into 8 GiB; adapter of rank 16, soft labels from disk, DDP comes nearest"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpus", "0"], "`gpus` is 0"),
        (["--tokens", "0"], "`--tokens` is 0"),
        (["--length", "0"], "must be at least 1"),
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

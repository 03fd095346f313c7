"""The plan: how the parts come together, and its table."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from hf_distill.planning import parameter_count, plan
from hf_distill.planning.memory import GIB
from tests import tiny
from tests.planning.llama import llama_8b, llama_70b, tiny_config


def tiny_plan(teacher_layers=4, **kwargs):
    configs = tiny_config(layers=teacher_layers), tiny_config()
    return plan(*configs, sequence_length=64, **kwargs)


@pytest.fixture(scope="module")
def llama_run():
    return plan(llama_70b(), llama_8b(), world_size=8, sharding="fsdp2")


def test_sharded_70b_teacher_and_8b_student_fit_into_80_gb(llama_run):
    assert llama_run.memory["teacher weights (bf16, frozen)"] / GIB == pytest.approx(70.55e9 * 2 / 8 / GIB, rel=0.001)
    assert 40 < llama_run.bytes_per_rank / GIB < 60
    assert llama_run.trained == llama_run.student.total
    assert llama_run.flops["teacher forward"] * 2048 / 1e12 == pytest.approx(290.2, abs=0.05)


def test_quantised_teacher_is_whole_on_every_rank():
    alone, eight = (tiny_plan(world_size=ranks, sharding="fsdp2", teacher_quantization="nf4") for ranks in (1, 8))
    assert eight.memory["teacher weights (nf4, frozen)"] == alone.memory["teacher weights (nf4, frozen)"]
    assert eight.memory["AdamW moments"] == alone.memory["AdamW moments"] / 8


def test_table_states_units_parts_and_totals(llama_run):
    text = str(llama_run)
    for expected in ("70.55 B", "8.03 B", "GFLOP/token", "TFLOP/seq", "8 ranks, fsdp2", "GiB", *llama_run.memory):
        assert expected in text
    assert f"{llama_run.bytes_per_rank / GIB:.2f}" in text
    assert max(map(len, text.split("\n\nNote")[0].splitlines())) < 90


def test_cached_teacher_costs_nothing():
    cached, live = tiny_plan(teacher_cached=True), tiny_plan()
    assert cached.flops["teacher forward"] == 0
    assert not any(part.startswith("teacher") for part in cached.memory)
    assert cached.bytes_per_rank < live.bytes_per_rank


def test_adapter_trains_little_and_freezes_the_rest():
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    full, adapter = tiny_plan(), tiny_plan(peft_config=lora)
    assert adapter.trained < full.trained
    assert adapter.memory["AdamW moments"] == 8 * adapter.trained
    assert adapter.memory["student weights (bf16, frozen)"] == 2 * full.student.total
    four_bit = tiny_plan(peft_config=lora, student_quantization="nf4")
    assert four_bit.memory["student weights (nf4, frozen)"] < adapter.memory["student weights (bf16, frozen)"]


def test_recomputation_trades_flops_for_memory():
    on, off = tiny_plan(gradient_checkpointing=True), tiny_plan(gradient_checkpointing=False)
    assert on.bytes_per_rank < off.bytes_per_rank
    assert on.flops_per_token > off.flops_per_token
    assert off.flops["student recomputation"] == 0


def test_gradients_stay_between_micro_batches():
    # 2.4 M parameters of embedding and head: their gradients weigh more than what 64 tokens keep.
    configs = tiny_config(hidden_size=256, vocab_size=4096), tiny_config(hidden_size=256, vocab_size=4096)
    one, two = (plan(*configs, sequence_length=64, gradient_accumulation_steps=steps) for steps in (1, 2))
    assert two.memory["gradients"] >= 4 * two.trained
    assert two.bytes_per_rank > one.bytes_per_rank


def test_wide_gap_is_noted_and_a_narrow_one_is_not():
    assert any("capacity gap" in note for note in tiny_plan(teacher_layers=60).notes)
    assert tiny_plan().notes == ()


def test_ratio_is_that_of_all_parameters():
    made = tiny_plan(teacher_layers=4)
    assert made.ratio == made.teacher.total / made.student.total
    assert f"{made.ratio:.2f} : 1" in str(made)


@pytest.mark.parametrize("family", [*tiny.OTHERS, "gemma2"])
def test_every_family_has_a_plan(family):
    config = tiny_config(family)
    assert plan(config, config, sequence_length=64, device="cpu").bytes_per_rank > 16 * parameter_count(config).total


def test_sharding_a_teacher_names_the_host_memory_that_loading_takes():
    notes = {kind: " ".join(tiny_plan(world_size=2, sharding=kind).notes) for kind in ("ddp", "fsdp2", "zero3")}
    assert notes["ddp"] == ""
    assert "rank 0 reads" in notes["fsdp2"]
    assert "rank 0 reads" in notes["zero3"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sharding": "fsdp"}, "`sharding` must be one of"),
        ({"world_size": 0}, "`world_size` is 0; expected a whole number of at least 1"),
        ({"teacher_quantization": "int4"}, "got 'int4'"),
        ({"student_quantization": "nf4"}, "peft_config=LoraConfig"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_plan(**kwargs)

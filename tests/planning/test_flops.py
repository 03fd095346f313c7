"""FLOPs: published numbers, and what a profiler counts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from hf_distill.planning import parameter_count
from hf_distill.planning.flops import attention_flops, forward_flops, training_flops
from tests import tiny
from tests.planning.llama import config_of, count_8b, count_70b, llama_8b, llama_70b, tiny_config


SHAPE = {"hidden_size": 128, "intermediate_size": 256}


def counted(model, length, train):
    """FLOPs per token that PyTorch counts; eager attention computes the full square of scores."""
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        if train:
            logits.sum().backward()
    return counter.get_total_flops() / length


def test_nominal_70b_to_8b_gives_the_published_numbers():
    teacher = forward_flops(70 * 10**9) * 2048
    student = training_flops(8 * 10**9) * 2048
    assert teacher / 1e12 == pytest.approx(286.7, abs=0.05)
    assert student / 1e12 == pytest.approx(98.3, abs=0.05)
    assert (teacher + student) / student == pytest.approx(3.92, abs=0.005)
    assert (teacher + student) / 2048 * 20e9 == pytest.approx(3.76e21, rel=0.002)


def test_exact_llama_counts_leave_out_the_embedding_and_add_attention():
    teacher = forward_flops(count_70b().multiplied, attention_flops(llama_70b(), 2048))
    student = training_flops(count_8b().multiplied, attention_flops(llama_8b(), 2048))
    assert teacher * 2048 / 1e12 == pytest.approx(290.2, abs=0.05)
    assert student * 2048 / 1e12 == pytest.approx(95.5, abs=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bert"])
def test_forward_and_backward_are_what_pytorch_counts(family):
    model = tiny.model(family, **SHAPE)
    length = 64
    # The mask saves nothing in eager attention.
    attention = attention_flops(config_of(model), length) * (1 if family == "bert" else 2)
    parameters = parameter_count(model.config).multiplied
    assert counted(model, length, train=False) == pytest.approx(forward_flops(parameters, attention), rel=0.02)
    assert counted(model, length, train=True) == pytest.approx(training_flops(parameters, attention), rel=0.02)


def test_lora_student_needs_four_flops_per_frozen_parameter():
    model = tiny.model("llama", layers=6, **SHAPE)
    parameters = parameter_count(model.config).multiplied
    attention = 2 * attention_flops(model.config, 64)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = adapted.get_nb_trainable_parameters()[0]
    expected = training_flops(parameters, attention, adapter=adapter)
    assert expected < 0.8 * training_flops(parameters, attention)
    assert counted(adapted.get_base_model(), 64, train=True) == pytest.approx(expected, rel=0.05)


def test_head_size_that_is_not_hidden_size_over_heads_is_respected():
    config = tiny_config("qwen3", num_attention_heads=4, head_dim=16)
    assert attention_flops(config, 10) == 2 * 2 * 10 * 4 * 16

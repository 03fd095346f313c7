"""Parameter counts are exact."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig

from hf_distill.planning import parameter_count
from hf_distill.planning.parameters import adapter_count
from tests import tiny
from tests.planning.llama import config_of, count_8b, count_70b, tiny_config


def test_llama_70b_is_counted_exactly():
    count = count_70b()
    assert count.total == 70_553_706_496
    assert count.embedding == count.head == 128256 * 8192
    assert not count.tied
    assert count.linear == 68_451_041_280
    assert count.total == count.linear + count.embedding + count.head + 161 * 8192  # the norms
    assert count.multiplied == count.total - count.embedding
    assert count.block * count.layers == count.linear + 160 * 8192


def test_llama_8b_is_counted_exactly():
    count = count_8b()
    assert count.total == 8_030_261_248
    assert count.non_embedding == 8_030_261_248 - 2 * 128256 * 4096


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.OTHERS])
def test_total_is_that_of_the_real_model(family):
    model = tiny.model(family)
    count = parameter_count(config_of(model))
    assert count.total == model.num_parameters() == sum(p.numel() for p in model.parameters())
    if count.head:
        assert count.non_embedding < count.total


def test_tied_head_counts_once_in_the_total_and_is_still_multiplied():
    tied = parameter_count(tiny_config("llama", tie_word_embeddings=True))
    untied = parameter_count(tiny_config("llama", tie_word_embeddings=False))
    assert tied.tied
    assert untied.total - tied.total == tied.head == 320 * 32
    assert tied.non_embedding == untied.non_embedding
    assert tied.multiplied == untied.multiplied


def test_classifier_has_no_head_over_the_vocabulary():
    count = parameter_count(tiny_config("bert", task="sequence_classification"))
    assert count.head == 0
    assert count.embedding == (320 + 256 + 2) * 32  # tokens, positions, token types


def test_a_token_passes_two_of_eight_experts():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = [
        parameter_count(MixtralConfig(num_local_experts=experts, num_experts_per_tok=2, **shape, **heads))
        for experts in (2, 8)
    ]
    router = 2 * 6 * 32
    assert sizes[0].idle == 0
    assert sizes[1].idle == 2 * 6 * 3 * 32 * 64
    assert sizes[1].multiplied == sizes[0].multiplied + router


def test_adapter_parameters_are_those_that_peft_trains():
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny.model("llama")
    expected = adapter_count(config_of(model), lora)
    assert expected == get_peft_model(model, lora).get_nb_trainable_parameters()[0] > 0


def test_counting_leaves_the_configs_as_they_were():
    config, lora = tiny_config(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    before = str(config.to_dict()), str(lora.to_dict())
    parameter_count(config)
    adapter_count(config, lora)
    assert (str(config.to_dict()), str(lora.to_dict())) == before

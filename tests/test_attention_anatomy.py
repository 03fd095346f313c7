"""What is known of a model's attention before its first forward is what its taps answer in it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_distill.anatomy import shape_of
from hf_distill.taps import tap_attention
from tests import tiny


IDS = torch.tensor([[5, 6, 7, 8]])


def with_implementation(name: str | None, family: str = "llama") -> nn.Module:
    model = tiny.model(family)
    model.config._attn_implementation_internal = name
    return model


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "cohere", "cohere2", "gemma", "granite", "mixtral"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_all_layers_of_the_usual_families_have_maps(family, implementation):
    shape = shape_of(with_implementation(implementation, family), "student")
    assert (shape.no_attention, shape.no_attention_maps) == ({}, {})


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa", None])
def test_an_implementation_that_is_not_known_is_known_to_be_none(name):
    model = with_implementation(name)
    reasons = shape_of(model, "student").no_attention
    assert reasons.keys() == {1, 2}
    assert "attn_implementation='sdpa'" in reasons[1]
    assert repr(str(name)) in reasons[1]
    assert_refused(model, 2, reasons[2])


def test_a_layer_without_attention_is_told_from_one_that_has_it():
    model = tiny.model("lfm2")
    reasons = shape_of(model, "student").no_attention
    assert reasons.keys() == {1}
    assert_refused(model, 1, reasons[1])
    with tap_attention(model, [2]) as tap:
        model(input_ids=IDS)
    assert tap.states[2].has_maps


def test_one_projection_for_all_gives_no_attention():
    model = tiny.model("bloom")
    reasons = shape_of(model, "teacher").no_attention
    assert reasons.keys() == {1, 2}
    assert_refused(model, 1, reasons[1])


def assert_refused(model: nn.Module, layer: int, reason: str) -> None:
    with pytest.raises(ValueError) as raised, tap_attention(model, [layer]):
        pass
    assert str(raised.value) == reason


@pytest.mark.parametrize(("family", "reason"), [("gpt_oss", "GptOssDecoderLayer has learned sinks"), ("gptj", "GPTJ")])
def test_attention_without_maps_is_known_for_it(family, reason):
    model = tiny.model(family)
    shape = shape_of(model, "teacher")
    assert shape.no_attention == {}
    assert shape.no_attention_maps.keys() == {1, 2}
    assert reason in shape.no_attention_maps[1]
    with tap_attention(model, [1, 2]) as tap:
        model(input_ids=IDS)
    assert not any(states.has_maps for states in tap.states.values())


def test_a_prefix_is_known_and_an_adapter_in_the_layers_is_none():
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    reasons = shape_of(get_peft_model(tiny.model("llama"), prefix), "student").no_attention
    assert reasons.keys() == {1, 2}
    assert "PREFIX_TUNING" in reasons[1]
    adapted = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    assert shape_of(adapted, "student").no_attention == {}


class DerivedAttention(LlamaAttention):
    """As FSDP2 and users derive classes."""


def test_a_derived_class_is_tapped_as_its_base():
    model = tiny.model("llama")
    model.model.layers[1].self_attn.__class__ = DerivedAttention
    assert shape_of(model, "student").no_attention_maps == {}
    with tap_attention(model, [2]) as tap:
        model(input_ids=IDS)
    assert tap.states[2].has_maps

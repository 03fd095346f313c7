"""Taps of queries, keys and values: the maps that they rebuild are those that eager attention returns."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from hf_distill.anatomy import describe
from hf_distill.taps import tap_attention, tap_head_input, tap_hidden_states, tap_last_hidden
from tests import tiny
from tests.attention_twins import naive_maps
from tests.taps.test_last_hidden import IDS, assert_same_gradients, gradients, hooks


FAMILIES = [*tiny.FAMILIES, "cohere", "cohere2", "gemma", "granite", "mixtral"]
PADDED = {
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
    "none": torch.ones(2, 7, dtype=torch.int64),
}
WINDOWS = {
    "mistral": {"sliding_window": 3},
    "mixtral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 3, "no_rope_layers": [1, 0]},
    "cohere2": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 3},
    "gemma3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 3},
}
SOFTCAPS = {"gemma2": {"attn_logit_softcapping": 0.5}}
EAGER_ONLY = ("gemma2",)  # transformers' SDPA has no softcap
SHARP = {family: {"query_pre_attn_scalar": 8} for family in ("gemma2", "gemma3")}
PACKED = {"input_ids": IDS.view(1, -1), "position_ids": torch.tensor([[*range(4), *range(3), *range(7)]])}


def build(family: str, **config) -> nn.Module:
    """A model whose attention is far from uniform."""
    model = tiny.model(family, **SHARP.get(family, {}), **config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def eager_maps(model: nn.Module, **inputs) -> dict[int, torch.Tensor]:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return dict(enumerate(twin(**inputs, output_attentions=True).attentions, start=1))


def tapped(model: nn.Module, layers=(1, 2), **inputs):
    with tap_attention(model, layers) as tap:
        model(**inputs)
    return tap.states


def assert_same_maps(model: nn.Module, real: torch.Tensor, **inputs) -> None:
    """Compare the rows of real tokens; what padding attends to differs between implementations."""
    with torch.no_grad():
        expected = eager_maps(model, **inputs)
        states = tapped(model, **inputs)
    for layer, maps in expected.items():
        rows = real[:, None, :, None].bool()
        torch.testing.assert_close(naive_maps(states[layer]) * rows, maps * rows, atol=1e-5, rtol=0)
        assert (maps * rows)[:, :, -2:].std() > 0.05  # far from uniform


def implementations(families) -> list[tuple[str, str]]:
    names = {family: ["eager"] if family in EAGER_ONLY else ["eager", "sdpa"] for family in families}
    return [(family, name) for family in families for name in names[family]]


@pytest.mark.parametrize(("family", "implementation"), implementations(FAMILIES))
def test_rebuilt_maps_are_those_of_eager_attention(family, implementation):
    model = build(family)
    model.set_attn_implementation(implementation)
    for mask in PADDED.values():
        assert_same_maps(model, mask, input_ids=IDS, attention_mask=mask)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(("family", "implementation"), implementations(WINDOWS))
def test_sliding_windows_and_softcaps_are_those_of_the_layer(family, implementation):
    model = build(family, **WINDOWS[family], **SOFTCAPS.get(family, {}))
    model.set_attn_implementation(implementation)
    for mask in PADDED.values():
        assert_same_maps(model, mask, input_ids=IDS, attention_mask=mask)
    maps = {layer: naive_maps(states) for layer, states in tapped(model, input_ids=IDS).items()}
    assert any((value[:, :, 6, :4] == 0).all() for value in maps.values())
    if family in SOFTCAPS:
        assert tapped(model, input_ids=IDS)[1].softcap == 0.5


@pytest.mark.parametrize(("family", "implementation"), implementations(["llama", "gemma2", "gpt_neox"]))
def test_packed_documents_do_not_see_each_other(family, implementation):
    model = build(family)
    model.set_attn_implementation(implementation)
    assert_same_maps(model, torch.ones(1, 14), **PACKED, use_cache=False)
    maps = naive_maps(tapped(model, **PACKED, use_cache=False)[2])
    assert (maps[0, :, 4:7, :4] == 0).all()
    assert (maps[0, :, 7:, :7] == 0).all()
    assert (maps[0, :, 6, 4:7] > 0).all()


def flash_like(seen_names: list[str]):
    """What FlashAttention computes, on the CPU: padding as `[B, S]`, or positions, and a window."""

    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, position_ids=None, **kwargs):
        seen_names.append(module.config._attn_implementation)
        place = torch.arange(query.shape[2])
        seen = (place <= place[:, None])[None]
        if sliding_window is not None:
            seen = seen & (place[:, None] - place < sliding_window)
        if mask is not None:
            seen = seen & mask[:, None].bool()
        elif len(query) == 1:
            document = (position_ids[0] == 0).cumsum(0)
            seen = seen & (document == document[:, None])
        return sdpa_attention_forward(module, query, key, value, seen[:, None], scaling=scaling, is_causal=False)

    return attention


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flash_attention_is_called_by_its_name_and_its_arguments_say_what_is_seen(family, monkeypatch):
    names: list[str] = []
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_like(names))
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_attention_2", flash_attention_mask)
    model = build(family, **WINDOWS.get(family, {}))
    model.config._attn_implementation_internal = "flash_attention_2"
    for mask in PADDED.values():
        assert_same_maps(model, mask, input_ids=IDS, attention_mask=mask)
    assert_same_maps(model, torch.ones(1, 14), **PACKED, use_cache=False)
    bounds = torch.tensor([0, 4, 7, 14], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    by_bounds = tapped(model, **PACKED, **lengths, use_cache=False)
    by_positions = tapped(model, **PACKED, use_cache=False)
    torch.testing.assert_close(naive_maps(by_bounds[1]), naive_maps(by_positions[1]))
    assert set(names) == {"flash_attention_2"}


def loss_of(maps: dict[int, torch.Tensor]) -> torch.Tensor:
    return sum((layer + 1) * (value**3).mean() for layer, value in maps.items())


def plain_gradients(model: nn.Module, layers) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    maps = twin(input_ids=IDS, output_attentions=True).attentions
    loss_of({layer: maps[layer - 1] for layer in layers}).backward()
    return gradients(twin)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_returned_maps(family, checkpointing):
    model = tiny.model(family, layers=3, attention_dropout=0.0)
    for module in model.modules():  # in training mode, which checkpointing needs, nothing may be random
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = plain_gradients(model, [1, 3])
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with tap_attention(model, [1, 3]) as tap:
        model(input_ids=IDS)
        if checkpointing:  # what is computed again inside the context is not taken for a second call
            loss_of({layer: naive_maps(states) for layer, states in tap.states.items()}).backward()
    if not checkpointing:
        loss_of({layer: naive_maps(states) for layer, states in tap.states.items()}).backward()
    found = {name: gradient for name, gradient in gradients(model).items() if name in expected}
    assert_same_gradients(found, expected)


def test_a_checkpointed_model_can_run_backward_after_the_tap_is_closed():
    model = tiny.model("llama", layers=2)
    expected = plain_gradients(model, [1, 2])
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    states = tapped(model, input_ids=IDS)
    loss_of({layer: naive_maps(value) for layer, value in states.items()}).backward()
    assert_same_gradients(gradients(model), expected)


def test_reentrant_checkpointing_is_refused():
    model = tiny.model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="'use_reentrant': False"), tap_attention(model, [1]):
        pass


def test_keys_and_values_come_once_for_every_group_and_adapters_are_in_them():
    model = get_peft_model(build("qwen3"), LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    with torch.no_grad():
        entering = tapped_hidden(model)
        [states] = tapped(model, [2], input_ids=IDS).values()
        attention = describe(model).layers[1]
        values = attention.self_attn.v_proj(attention.input_layernorm(entering))
    assert states.query.shape == (2, 4, 7, 8)
    assert states.key.shape == states.value.shape == (2, 2, 7, 8)
    torch.testing.assert_close(states.value.transpose(1, 2).flatten(2), values)


def tapped_hidden(model: nn.Module) -> torch.Tensor:
    with tap_hidden_states(model, [1]) as tap:
        model(input_ids=IDS)
    return tap.states[1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was_also_after_an_exception(implementation):
    base = tiny.model("llama")
    base.set_attn_implementation(implementation)
    model = nn.parallel.DataParallel(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    modules, found, before = dict(model.named_modules()), hooks(model), copy.deepcopy(base.config.to_dict())
    with pytest.raises(KeyError) as raised, tap_attention(model, [1, 2]):
        raise KeyError(base.config._attn_implementation)
    assert raised.value.args == (f"hf_distill_tap_{implementation}",)
    assert all(config._attn_implementation == implementation for config in configs)
    assert (dict(model.named_modules()), hooks(model), base.config.to_dict()) == (modules, found, before)
    with tap_attention(model, [1, 2]) as tap:
        base(input_ids=IDS)
    assert tap.states.keys() == {1, 2}


def test_two_models_that_share_a_config_do_not_mix():
    student = build("llama")
    teacher = type(student)(student.config).eval()
    assert teacher.config is student.config
    with tap_attention(student, [1]) as ours, tap_attention(teacher, [2]) as theirs:
        student(input_ids=IDS)
        teacher(input_ids=IDS.flip(1))
    assert (ours.states.keys(), theirs.states.keys()) == ({1}, {2})
    expected = tapped(build("llama"), [1], input_ids=IDS)
    torch.testing.assert_close(ours.states[1].query, expected[1].query)
    assert student.config._attn_implementation == "sdpa"


def test_passes_without_gradient_are_not_heard_by_a_tap_for_training():
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with tap_attention(model, [1]) as tap:
        model(input_ids=IDS)
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS.flip(0))
    assert tap.states[1].query.requires_grad
    with torch.no_grad(), model.disable_adapter():
        base = tapped(model, [1], input_ids=IDS)
    assert not base[1].query.requires_grad
    assert (base[1].query - tap.states[1].query).abs().max() > 1e-3


def test_hidden_states_and_the_last_one_can_be_tapped_at_once():
    model = tiny.model("llama")
    with tap_attention(model, [2]) as tap, tap_hidden_states(model, [2]) as states, tap_last_hidden(model) as last:
        model(input_ids=IDS)
    assert torch.equal(states.states[2], last.hidden)
    assert tap.states[2].query.shape == (2, 4, 7, 8)
    with tap_attention(model, []) as nothing, tap_head_input(model):
        model(input_ids=IDS)
    assert nothing.states == {}


def test_a_compiled_layer_can_be_tapped_after_it_ran_without_a_tap():
    torch.compiler.reset()
    model = build("llama")
    expected = [eager_maps(model, input_ids=ids) for ids in (IDS, IDS.flip(0))]
    model.model.layers[1].self_attn.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=IDS)
        for ids, maps in zip((IDS, IDS.flip(0)), expected, strict=True):
            states = tapped(model, [2], input_ids=ids)
            torch.testing.assert_close(naive_maps(states[2]), maps[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_without_the_interface_gives_its_projections(checkpointing):
    model = tiny.model("gptj").train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = hooks(model)
    states = tapped(model, [1, 2], input_ids=IDS, attention_mask=PADDED["left"])
    assert hooks(model) == before
    entering = model.transformer.h[0].ln_1(model.transformer.wte(IDS))
    for part, module in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        expected = getattr(model.transformer.h[0].attn, module)(entering)
        torch.testing.assert_close(getattr(states[1], part), expected[:, None])
    assert not states[1].has_maps
    assert states[1].seen(0, torch.tensor([3]))[0, 0].tolist() == [False, False, True, True, False, False, False]
    sum(getattr(states[2], part).square().sum() for part in ("query", "key", "value")).backward()
    assert model.transformer.h[1].attn.q_proj.weight.grad.abs().max() > 0
    with torch.no_grad():
        documents = tapped(model, [1], **PACKED, use_cache=False)[1]
    assert documents.seen(0, torch.tensor([5]))[0, 0].nonzero().flatten().tolist() == [4, 5]


def test_what_cannot_be_tapped_is_refused_by_name():
    with pytest.raises(ValueError, match=r"BloomBlock.*q_proj"), tap_attention(tiny.model("bloom"), [1]):
        pass
    model = tiny.model("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match=r"'flex_attention'.*attn_implementation='sdpa'"), tap_attention(model, [1]):
        pass
    assert model.config._attn_implementation == "flex_attention"


def test_misuse_is_answered():
    model = tiny.model("llama")
    for layer in (0, 3):
        with pytest.raises(ValueError, match="from 1 to 2"), tap_attention(model, [layer]):
            pass
    with tap_attention(model, [1]) as tap:
        with pytest.raises(RuntimeError, match="call the model"):
            _ = tap.states
        with pytest.raises(RuntimeError, match="already"), tap_attention(model, [2, 1]):
            pass
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="twice"):
            model(input_ids=IDS)
    with pytest.raises(ValueError, match="7 queries and 14 keys"), tap_attention(model, [1]):
        model(input_ids=IDS, past_key_values=cache)
    assert model.config._attn_implementation == "sdpa"

"""Taps of hidden states between layers; those of the last one, before the head, are in test_last_hidden."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_distill.anatomy import describe, resolve_head
from hf_distill.taps import tap_attention, tap_head_input, tap_hidden_states, tap_last_hidden
from tests import tiny
from tests.processes import run_on_two_ranks
from tests.taps.test_last_hidden import IDS, assert_same_gradients, gradients, hooks, shard


def loss_of(states: dict[int, torch.Tensor]) -> torch.Tensor:
    """A sum that every element of every layer enters with a weight of its own."""
    return sum((layer + 1) * (state.float() ** 3).mean() for layer, state in states.items())


def tapped_loss(model, layers, ids=IDS) -> torch.Tensor:
    with tap_hidden_states(model, layers) as tap:
        model(input_ids=ids)
    return loss_of(tap.states)


def plain_gradients(model, layers) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    states = twin(input_ids=IDS, output_hidden_states=True).hidden_states
    loss_of({layer: states[layer] for layer in layers}).backward()
    return gradients(twin)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_tapped_is_what_transformers_returns_and_the_model_stays_as_it_was(family):
    model = tiny.model(family, layers=3)
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
        before, modules = hooks(model), dict(model.named_modules())  # transformers leaves hooks of its own
        with tap_hidden_states(model, range(4)) as tap, tap_head_input(model) as head:
            logits = model(input_ids=IDS).logits
    torch.testing.assert_close(resolve_head(model)(head.hidden), logits, atol=1e-5, rtol=1e-5)
    assert tap.states.keys() == {0, 1, 2, 3}
    for layer, states in tap.states.items():
        torch.testing.assert_close(states, expected[layer], atol=1e-6, rtol=0)
    assert (hooks(model), dict(model.named_modules())) == (before, modules)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_returned_states(family, checkpointing):
    model = tiny.model(family, layers=3)
    for module in model.modules():  # in training mode, which checkpointing needs, nothing may be random
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    expected = plain_gradients(model, [1, 3])
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    tapped_loss(model, [1, 3]).backward()
    assert_same_gradients(gradients(model), expected)


def test_reentrant_checkpointing_is_refused():
    model = tiny.model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="'use_reentrant': False"), tap_hidden_states(model, [1]):
        pass
    with tap_hidden_states(model.eval(), [1]) as tap:  # nothing is checkpointed in evaluation
        model(input_ids=IDS)
    assert tap.states[1].shape == (2, 7, 32)


def test_an_adapted_model_and_the_last_hidden_state_can_be_tapped_at_once():
    model = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    with tap_hidden_states(model, [2]) as states, tap_last_hidden(model) as last:
        model(input_ids=IDS)
    assert torch.equal(states.states[2], last.hidden)


def test_a_compiled_model_can_be_tapped_again_and_again():
    torch.compiler.reset()
    model = tiny.model("llama")
    compiled = torch.compile(model, backend="eager")
    for seed in range(2):
        ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            with tap_hidden_states(compiled, [0, 1]) as tap:
                compiled(input_ids=ids)
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            torch.testing.assert_close(tap.states[layer], expected[layer], atol=1e-5, rtol=0)


def test_code_that_was_compiled_without_the_tap_is_an_error_and_no_silent_loss():
    torch.compiler.reset()
    compiled = torch.compile(tiny.model("llama"), backend="eager")
    with torch.no_grad():
        compiled(input_ids=IDS)
        with tap_hidden_states(compiled, [1]) as tap:
            compiled(input_ids=IDS)
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset"):
        _ = tap.states


def test_hooks_are_removed_after_an_exception_and_the_layers_can_be_tapped_again():
    model = tiny.model("llama")
    before = hooks(model)
    with pytest.raises(KeyError), tap_hidden_states(model, [0, 1]):
        raise KeyError
    assert hooks(model) == before
    tapped_loss(model, [0, 1])


def test_misuse_is_answered():
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="from 0 to 2"), tap_hidden_states(model, [3]):
        pass
    with tap_hidden_states(model, [1]) as tap:
        with pytest.raises(RuntimeError, match="call the model"):
            _ = tap.states
        with pytest.raises(RuntimeError, match="already"), tap_hidden_states(model, [2, 1]):
            pass
        model(input_ids=IDS)
        with pytest.raises(RuntimeError, match="twice"):
            model(input_ids=IDS)
    assert hooks(model) == 0


def loss_of_all_taps(model, ids) -> torch.Tensor:
    with (
        tap_hidden_states(model, [1, 3]) as states,
        tap_attention(model, [2, 3]) as attention,
        tap_last_hidden(model) as last,
    ):
        model(input_ids=ids)
    parts = {layer: torch.cat([s.query, s.key, s.value], 1) for layer, s in attention.states.items()}
    return loss_of(states.states) + loss_of(parts) + last.hidden[:0].sum()


def compare_to_one_process(rank: int) -> None:
    model = tiny.model("llama", layers=3)
    twin = copy.deepcopy(model)
    loss_of_all_taps(twin, IDS).backward()
    expected = gradients(twin)
    shard(model, "accelerate", tied=False)
    for _ in range(2):
        model.zero_grad()
        loss_of_all_taps(model, IDS[rank : rank + 1]).backward()  # as many tokens on both: the mean of the means
    found = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name in expected
    }
    assert_same_gradients(found, expected)
    assert describe(model).num_layers == 3


def test_two_fsdp2_ranks_get_the_gradients_of_one_process(tmp_path):
    run_on_two_ranks(compare_to_one_process, tmp_path)


def test_passes_without_gradient_are_not_heard_by_a_tap_for_training():
    model = tiny.model("llama")
    with tap_head_input(model) as head, tap_hidden_states(model, [1]) as states:
        model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS.flip(0))
    assert head.hidden.requires_grad
    assert states.states[1].requires_grad

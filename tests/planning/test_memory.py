"""Memory: published numbers, and what autograd keeps."""

from __future__ import annotations

import pytest
import torch

from hf_distill.planning import parameter_count
from hf_distill.planning.memory import (
    QUANTISED,
    Layout,
    activation_bytes,
    full_logits_bytes,
    gathered_bytes,
    layer_activation_bytes,
    loss_bytes,
    training_bytes,
    weight_bytes,
)
from tests import tiny
from tests.planning.llama import config_of, count_8b, count_70b


LLAMA = 128256, 128256


def kept_bytes(model, tokens):
    """Bytes of the tensors, other than parameters, that autograd keeps for the backward pass of the layers."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    assert out.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_nf4_70b_has_36_gb_of_linear_weights():
    assert 70e9 * QUANTISED["nf4"] / 1e9 == pytest.approx(36.1, abs=0.05)
    count = count_70b()
    assert 2 * (count.embedding + count.head) / 1e9 == pytest.approx(4.2, abs=0.05)
    # Of the 70.55 B parameters, 68.45 B are in linear layers.
    assert weight_bytes(count, "nf4") / 1e9 == pytest.approx(35.31 + 4.20, abs=0.01)
    assert weight_bytes(count) == 2 * count.total


def test_full_fp32_training_takes_16_bytes_per_parameter_sharded():
    sharded = training_bytes(1000, Layout(8, "fsdp2"))
    assert sum(sharded.values()) == 16 * 1000 / 8
    assert sum(training_bytes(1000, Layout(8, "zero3"), 2).values()) == 8 * 1000 / 8


def test_ddp_adds_buckets_and_the_copies_of_autocast():
    alone = training_bytes(1000, Layout(1, "ddp"))
    together = training_bytes(1000, Layout(2, "ddp"))
    assert sum(alone.values()) == (16 + 2) * 1000
    assert together["gradients"] == 2 * alone["gradients"]


def test_quantised_weights_are_not_sharded():
    assert Layout(8, "fsdp2").per_rank(800.0) == 100.0
    assert Layout(8, "fsdp2").per_rank(800.0, quantised=True) == 800.0
    assert Layout(8, "ddp").per_rank(800.0) == 800.0


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [("llama", 0.9, 1.1), ("qwen3", 0.9, 1.1), ("phi3", 0.75, 1.1), ("bert", 0.9, 1.6)],
)
def test_activation_estimate_is_near_what_autograd_keeps(family, low, high):
    model = tiny.model(family, hidden_size=256, intermediate_size=1024).to(torch.bfloat16)
    estimate = activation_bytes(parameter_count(config_of(model)), 256, 128, checkpointing=False)
    assert low < estimate / kept_bytes(model, 128) < high


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    count = count_8b()
    full = activation_bytes(count, 4096, 2048, checkpointing=False)
    small = activation_bytes(count, 4096, 2048, checkpointing=True)
    assert full == 32 * layer_activation_bytes(count, 4096, 2048)
    assert small == layer_activation_bytes(count, 4096, 2048) + 32 * 2048 * 4096 * 2


def test_loss_takes_a_fraction_of_whole_logits_and_hardly_grows_with_the_batch():
    assert full_logits_bytes(4 * 2048, LLAMA) / 3e9 == pytest.approx(4.2, abs=0.01)
    small, large = (loss_bytes(tokens, LLAMA, (4096, 8192)) for tokens in (4 * 2048, 16 * 2048))
    assert small < full_logits_bytes(4 * 2048, LLAMA) / 10
    assert large - small == pytest.approx(2 * 12 * 2048 * (2 * 4096 + 8192), rel=0.1)  # hidden states


def test_gathering_holds_the_layers_of_the_larger_model_and_both_heads():
    counts = [count_8b(), count_70b()]
    expected = 2 * (2 * counts[1].block + counts[1].embedding + counts[0].head + counts[1].head)
    assert gathered_bytes(counts) == expected
    assert gathered_bytes([]) == 0

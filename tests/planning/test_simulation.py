"""The simulated step keeps what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_distill.planning.simulation import FORWARD, LOSS, Step, simulate
from hf_distill.taps import tap_last_hidden
from tests import tiny
from tests.planning.llama import config_of, llama_8b, lora, tiny_config


STEP = Step(2, 128, autocast=False, checkpointing=False, device="cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 1024}
SHAPES = {
    "gpt2": {"n_embd": 256, "n_inner": 1024},
    "opt": {"hidden_size": 256, "ffn_dim": 1024, "word_embed_proj_dim": 256},
    "distilbert": {"dim": 256, "hidden_dim": 1024},
}


def kept_bytes(model):
    """Bytes of the tensors, other than weights and buffers, that autograd keeps for the backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.full((STEP.batch_size, STEP.sequence_length), 7)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), tap_last_hidden(model):
        model(input_ids=ids, attention_mask=mask)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in tiny.FAMILIES), ("llama", torch.bfloat16)]
)
def test_activations_of_every_family_are_what_autograd_keeps(family, dtype):
    model = tiny.model(family, layers=2, **SHAPES.get(family, WIDE)).to(dtype).train()
    moments = simulate(None, config_of(model), replace(STEP, student_dtype=dtype))
    assert moments.peaks()[LOSS][FORWARD] == pytest.approx(kept_bytes(model), rel=0.15)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_deep_student_follows_from_two_shallow_ones(family, checkpointing, monkeypatch):
    config = tiny_config(family, layers=12)
    step = replace(STEP, checkpointing=checkpointing, autocast=True)
    short = simulate(None, config, step)
    assert short.small is not short.large
    monkeypatch.setattr("hf_distill.planning.simulation._depth_and_period", lambda config: (12, 12))
    whole = simulate.__wrapped__(None, config, step)
    assert whole.small is whole.large
    for share in (1.0, 0.125):
        expected = {stage: sum(parts.values()) for stage, parts in whole.peaks(share).items()}
        found = {stage: sum(parts.values()) for stage, parts in short.peaks(share).items()}
        assert max(found.values()) == pytest.approx(max(expected.values()), rel=0.01)


def test_an_adapter_keeps_less_than_the_weights_that_it_freezes():
    full, adapter = (simulate(None, tiny_config(**WIDE), STEP, peft).peaks()[LOSS] for peft in (None, lora()))
    assert adapter["loss"] < full["loss"]  # no gradient of the head


def test_recomputed_layers_of_llama_leave_their_inputs():
    found = simulate(None, llama_8b(), Step(1, 2048, checkpointing=True)).peaks()[LOSS][FORWARD]
    # 32 inputs of 2048 x 4096 in fp32 are 1 GiB; the last layer's output and the norm's come on top.
    assert 1.0 < found / 2**30 < 1.2

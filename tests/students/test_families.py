from __future__ import annotations

import pytest
import torch

from hf_distill.anatomy import describe
from hf_distill.students.families import FAMILIES, family_of
from tests.students.twins import DOWN, GATED, IDS, build


@pytest.mark.parametrize("name", [*GATED, *DOWN])
def test_neurons_heads_and_streams_are_where_the_adapter_says(name):
    model = build(name, layers=2)
    family, layers = family_of(model), describe(model).layers
    seen = {}

    def listen(key):
        return lambda module, args, output: seen.update({key: (args[0].shape[-1], output.shape[-1])})

    for layer in layers:
        family.mlp_output(layer).register_forward_hook(listen("mlp"))
        family.attention_output(layer).register_forward_hook(listen("heads"))
        for norm in family.norms(layer):
            norm.register_forward_hook(listen("stream"))
    with torch.no_grad():
        model(IDS)
    expected = {"mlp": (64, 32), "heads": (32, 32)} | ({"stream": (32, 32)} if family.cuts_all else {})
    assert seen == expected
    assert {tuple(weight.shape) for weight in family.mlp_weights(layers[0])} == {(64, 32)}


def test_a_neuron_of_a_fused_or_transposed_mlp_is_a_row_of_each_weight():
    for name, first in (("phi3", "mlp.gate_up_proj"), ("gpt2", "mlp.c_fc")):
        model = build(name, layers=1)
        family, [layer] = family_of(model), describe(model).layers
        down = family.mlp_output(layer).weight
        weight = layer.get_submodule(first).weight
        rows = family.mlp_weights(layer)
        if name == "phi3":
            assert torch.equal(rows[0][3], weight[3])
            assert torch.equal(rows[1][3], weight[64 + 3])
            assert torch.equal(rows[2][3], down[:, 3])
        else:
            assert torch.equal(rows[0][3], weight[:, 3])
            assert torch.equal(rows[1][3], down[3])


def test_every_family_of_the_adapters_is_tested():
    assert {family.removesuffix("_text") for family in FAMILIES} == {*GATED, *DOWN}

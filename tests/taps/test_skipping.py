from __future__ import annotations

import pytest
import torch

from hf_distill.anatomy import describe
from hf_distill.students import shrink
from hf_distill.taps.skipping import SkippableLayers
from tests import tiny


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
FAMILIES = [*tiny.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_leaves_layers_out_is_the_model_without_them(family):
    model = tiny.model(family, layers=4)
    layers = describe(model).layers
    skippable = SkippableLayers(layers, {1, 2}.__contains__)
    with torch.no_grad():
        found = model(IDS).logits
        skippable.remove()
        expected = shrink(model, layers=[0, 3])(IDS).logits
        whole = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, whole)
    assert all("forward" not in vars(layer) for layer in layers)


def test_what_stood_in_place_of_a_forward_comes_back():
    model = tiny.model("llama")
    [first, second] = model.model.layers
    first.forward = replaced = lambda hidden_states, **kwargs: hidden_states * 2
    SkippableLayers([first, second], {1}.__contains__).remove()
    assert first.forward is replaced
    assert "forward" not in vars(second)


def test_layers_that_return_more_than_hidden_states_are_refused():
    layer = torch.nn.Linear(2, 2)
    layer.forward = lambda hidden_states: (hidden_states, None)
    SkippableLayers([layer], set().__contains__)
    with pytest.raises(ValueError, match=r"Linear.*return a tuple"):
        layer(torch.ones(1, 2))

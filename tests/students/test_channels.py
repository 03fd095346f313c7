from __future__ import annotations

import pytest
import torch

from hf_distill.students import select_channels
from tests import tiny
from tests.taps.test_last_hidden import hooks


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ids = torch.randint(5, 300, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_they_are_those_of_the_largest_relative_root_mean_square(family):
    model, batches = tiny.model(family), [batch(0), batch(1)]
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 7] = 1e3  # of the padding
    importance = 0
    for layer in (1, 2):
        squares = []
        for each in batches:
            with torch.no_grad():
                outputs = model(each["input_ids"], each["attention_mask"], output_hidden_states=True)
            states = outputs.hidden_states[layer][each["attention_mask"].bool()]
            squares.append(states.square() / states.square().mean(-1, keepdim=True))
        importance += torch.cat(squares).mean(0).sqrt()
    expected = importance.argsort(descending=True)[:10].sort().values
    assert torch.equal(select_channels(model, batches, 10), expected)


def test_a_channel_that_is_large_in_one_token_alone_is_not_important():
    model = tiny.model("llama", layers=1)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 20  # large in every token
        model.model.embed_tokens.weight[5, 4] = 1e4  # a massive activation of the first one
    assert select_channels(model, [{"input_ids": ids}], 1, layers=[0]).tolist() == [3]


def test_the_model_is_left_as_it_was():
    model = tiny.model("llama").train()
    model.model.layers[0].eval()
    modes, before = [module.training for module in model.modules()], hooks(model)
    select_channels(model, [batch()], 4)
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 33}, "1 to 32, the width of LlamaForCausalLM"),
        ({"size": 0}, "1 to 32"),
        ({"size": 8, "layers": [3]}, "layers from 0 to 2"),
        ({"size": 8, "batches": []}, "empty"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_channels(tiny.model("llama"), **({"batches": [batch()]} | arguments))

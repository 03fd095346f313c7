from __future__ import annotations

import copy

import pytest
import torch

from hf_distill.students import ImportanceScores, PruneSpec, prune
from tests.students.twins import DOWN, GATED, IDS, build, logits, masked_logits


SPECS = {
    "depth": {"drop_layers": (1,)},
    "mlp": {"intermediate_size": 40},
    "heads": {"num_attention_heads": 2},
    "groups": {"num_key_value_heads": 1},
    "hidden": {"hidden_size": 24},
    "all": {"num_hidden_layers": 2, "intermediate_size": 40, "num_key_value_heads": 1, "hidden_size": 16},
}
NARROW = {"depth": SPECS["depth"], "mlp": SPECS["mlp"], "both": SPECS["depth"] | SPECS["mlp"]}
OPERATIONS = [(family, name, spec) for family in GATED for name, spec in SPECS.items()]
OPERATIONS += [(family, name, spec) for family in DOWN for name, spec in NARROW.items()]


def random_scores(model, layers: int = 4) -> ImportanceScores:
    generator = torch.Generator().manual_seed(2)
    heads = model.config.num_attention_heads
    return ImportanceScores(
        mlp=torch.rand(layers, 64, generator=generator),
        heads=torch.rand(layers, heads, generator=generator),
        hidden=torch.rand(32, generator=generator),
        layers=torch.rand(layers, generator=generator),
        provenance={"mlp": "at random"},
    )


@pytest.mark.parametrize(("family", "name", "spec"), OPERATIONS, ids=[f"{row[0]}-{row[1]}" for row in OPERATIONS])
def test_the_cut_model_is_the_masked_one_and_a_plain_one(family, name, spec, tmp_path):
    model = build(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    student, report = prune(model, PruneSpec(**spec, round_to=8), random_scores(model))
    found, expected = logits(student), masked_logits(model, family, report)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - logits(model)).abs().max() > 1e-2  # the mask matters
    assert type(student) is type(model)
    assert not student.training
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert report.parameters_after == sum(p.numel() for p in student.parameters()) < report.parameters_before

    student.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert (logits(again) - found).abs().max() == 0.0
    if family != "bert":
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        cached = student.generate(IDS, use_cache=True, **settings)
        assert torch.equal(cached, student.generate(IDS, use_cache=False, **settings))

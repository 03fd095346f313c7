"""A large cut in steps: what each asks for is what `prune` does, and the last one ends where the whole would."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest

from hf_distill.students import PruneSpec, prune
from hf_distill.students.resolve import resolve
from hf_distill.students.steps import prune_steps
from tests import tiny


SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6}


def make_model(family="llama", layers=6, **config):
    return tiny.model(family, layers=layers, **(SIZES | config))


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def walk(model, steps) -> list:
    """The models after each step."""
    models = [model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no scores are needed here
        for step in steps:
            models.append(prune(models[-1], step)[0])
    return models


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", PruneSpec(num_hidden_layers=2)),
        ("llama", PruneSpec(num_hidden_layers=2, intermediate_size=64, round_to=16)),
        ("llama", PruneSpec(hidden_size=48, num_attention_heads=3, intermediate_size=64, round_to=16)),
        ("qwen2", PruneSpec(num_attention_heads=2, intermediate_size=32, num_hidden_layers=4, round_to=16)),
        ("gpt2", PruneSpec(num_hidden_layers=2)),
        ("bert", PruneSpec(num_hidden_layers=2, intermediate_size=32, round_to=16)),
    ],
)
def test_steps_end_at_the_spec_and_none_cuts_more_than_a_third(family, spec):
    model = make_model(family, **({"n_embd": 96, "n_inner": 192} if family == "gpt2" else {}))
    models = walk(model, prune_steps(model.config, spec))
    assert len(models) > 2
    for before, after in pairwise(models):
        assert 2 / 3 <= parameters(after) / parameters(before) < 1
    once = walk(model, [spec])[-1]
    assert parameters(models[-1]) == parameters(once)
    assert resolve(spec, model) == resolve(spec, models[-1])


def test_a_ratio_is_reached_in_even_steps_at_the_sizes_of_a_single_cut():
    model = make_model(layers=8, vocab_size=64, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    spec = PruneSpec(params_ratio=0.4, round_to=8)
    steps = prune_steps(model.config, spec)
    assert steps[-1] == resolve(spec, model)
    models = walk(model, steps)
    assert len(models) == 4  # two steps would each keep 0.63
    assert parameters(models[-1]) / parameters(model) == pytest.approx(0.4, rel=0.03)
    for before, after in pairwise(models):
        assert parameters(after) / parameters(before) == pytest.approx(0.4 ** (1 / 3), rel=0.06)


def test_a_small_cut_is_one_step():
    model = make_model()
    spec = PruneSpec(params_ratio=0.8, round_to=8)
    assert prune_steps(model.config, spec) == [resolve(spec, model)]


def test_heads_pass_only_through_numbers_that_the_family_takes():
    model = make_model()  # 96 channels: 5 heads would not divide them
    steps = prune_steps(model.config, PruneSpec(num_attention_heads=2, num_hidden_layers=5), steps=2)
    assert [step.num_attention_heads for step in steps] == [3, 2]


def test_layers_that_are_named_go_from_the_last_to_the_first():
    model = make_model(layers=8, vocab_size=64)
    steps = prune_steps(model.config, PruneSpec(drop_layers=(1, 3, 4, 6, 7)))
    assert steps[0].drop_layers == (6, 7)
    assert [layer for step in steps for layer in reversed(step.drop_layers)] == [7, 6, 4, 3, 1]
    left = walk(model, steps)[-1]
    assert left.config.hf_distill["kept_layers"] is not None
    for position, origin in enumerate((0, 2, 5)):
        weight = left.model.layers[position].mlp.up_proj.weight
        assert (weight == model.model.layers[origin].mlp.up_proj.weight).all()


def test_more_steps_are_taken_where_they_are_asked_for():
    model = make_model()
    spec = PruneSpec(intermediate_size=64, round_to=16)
    few, many = prune_steps(model.config, spec), prune_steps(model.config, spec, steps=4)
    assert len(few) < len(many) == 4
    assert many[-1] == few[-1]
    sizes = [step.intermediate_size for step in many]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(
    ("spec", "steps", "message"),
    [
        (PruneSpec(num_hidden_layers=2), 1, "`steps` is 1; one of them would keep 4.%"),
        (PruneSpec(num_hidden_layers=2), 0, "`steps` is 0"),
        (PruneSpec(num_hidden_layers=9), None, "`num_hidden_layers` is 9"),
        (PruneSpec(params_ratio=0.02, round_to=96), None, "nearest that can be reached"),
    ],
)
def test_cuts_that_no_steps_can_make_are_refused(spec, steps, message):
    with pytest.raises(ValueError, match=message):
        prune_steps(make_model().config, spec, steps)

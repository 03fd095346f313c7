"""The recipes for encoders against the sums that their papers write down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_distill import HiddenStateObjective, LogitObjective
from hf_distill.anatomy import shape_of
from hf_distill.objectives import FeatureObjective, distilbert_objectives, minilm_objectives, tinybert_objectives
from hf_distill.signals import ModelShape
from hf_distill.training.terms import FeatureTerms, check_objectives
from tests import tiny
from tests.objectives.test_attention import STUDENT, TEACHER, bound
from tests.objectives.test_attention import signals as attention_signals
from tests.objectives.test_hidden import signals, states


def test_distilbert_has_soft_targets_and_the_cosine_of_the_last_layers():
    logits, hidden = distilbert_objectives()
    check_objectives([logits, hidden])
    assert isinstance(logits, LogitObjective)
    assert (logits.weight, logits.temperature, hidden.weight) == (5.0, 2.0, 1.0)
    hidden.bind(ModelShape("student", 2, 8), ModelShape("teacher", 4, 8))
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    expected = (1 - F.cosine_similarity(student[2], teacher[4])).sum()
    torch.testing.assert_close(hidden(*signals(student, teacher)), expected)
    assert not list(hidden.parameters())


def test_tinybert_sums_embeddings_and_layers_through_one_projector():
    hidden, attention = tinybert_objectives()
    check_objectives([hidden, attention])
    hidden.bind(ModelShape("student", 4, 8), ModelShape("teacher", 12, 10))
    assert hidden.pairs == ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
    [projector] = hidden.projectors
    student, teacher = states(8, 4, seed=0), states(10, 12, seed=1)
    expected = sum(
        F.mse_loss(projector(student[layer]), teacher[partner], reduction="none").mean(-1).sum()
        for layer, partner in hidden.pairs
    )
    torch.testing.assert_close(hidden(*signals(student, teacher)), expected)
    assert isinstance(hidden, HiddenStateObjective)


def test_tinybert_sums_the_scores_of_every_layer():
    _, attention = tinybert_objectives()
    attention.bind(STUDENT, TEACHER)
    assert attention.pairs == ((1, 2), (2, 4))
    value = attention(*attention_signals())
    parts = [bound(loss="score_mse", layer_mapping=[pair])(*attention_signals()) for pair in attention.pairs]
    torch.testing.assert_close(value, sum(parts))


@pytest.mark.parametrize(("layer", "pair"), [(-1, (2, 4)), (3, (2, 3))])
def test_minilm_has_the_relations_of_the_last_layer(layer, pair):
    [objective] = minilm_objectives(teacher_layer=layer)
    objective.bind(STUDENT, TEACHER)
    assert objective.pairs == (pair,)
    expected = bound(loss="relations", layer_mapping=[pair])(*attention_signals())
    torch.testing.assert_close(objective(*attention_signals()), expected)


PRESETS = [distilbert_objectives, minilm_objectives, tinybert_objectives]


@pytest.mark.parametrize(
    ("preset", "arguments", "weights"),
    [
        (distilbert_objectives, {}, [5.0, 1.0]),
        (distilbert_objectives, {"kd_weight": 0.2, "cosine_weight": 0.3}, [0.2, 0.3]),
        (tinybert_objectives, {}, [1.0, 1.0]),
        (tinybert_objectives, {"hidden_weight": 0.2, "attention_weight": 0.3}, [0.2, 0.3]),
        (minilm_objectives, {}, [1.0]),
        (minilm_objectives, {"weight": 0.2}, [0.2]),
    ],
)
def test_every_weight_is_the_papers_or_the_one_that_is_given(preset, arguments, weights):
    assert [objective.weight for objective in preset(**arguments)] == weights


@pytest.mark.parametrize("preset", PRESETS)
def test_all_real_tokens_are_compared_as_in_the_papers(preset):
    inside = [objective for objective in preset() if isinstance(objective, FeatureObjective)]
    assert inside
    assert all(objective.positions == "real" for objective in inside)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kinds", [("bert", "llama"), ("gpt2", "roberta"), ("qwen3", "llama")])
def test_a_decoder_is_refused_with_both_models_named(preset, kinds):
    student, teacher = (
        shape_of(tiny.model(kind, task="sequence_classification"), role)
        for kind, role in zip(kinds, ("student", "teacher"), strict=True)
    )
    with pytest.raises(ValueError, match=rf"{preset.__name__}.*{student.name[:7]}.*{teacher.name[:7]}") as error:
        FeatureTerms(preset()).bind(student, teacher)
    assert student.name in str(error.value)
    assert teacher.name in str(error.value)


def test_encoders_are_told_from_decoders():
    for family in tiny.FAMILIES:
        assert shape_of(tiny.model(family, layers=1), "student").is_causal == (family in tiny.DECODERS), family

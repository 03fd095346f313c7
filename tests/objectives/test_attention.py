from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_distill import AttentionObjective
from hf_distill.functional.attention import SCORE_LOSSES, Scores, relation_distance, score_distance
from hf_distill.signals import (
    AttentionStates,
    ModelShape,
    Projection,
    StudentSignals,
    TeacherSignals,
    Tokens,
    Visibility,
    identity,
)


INDEX = torch.tensor([0, 2, 3, 7, 8, 11])
STUDENT = ModelShape("student (A)", 2, 32, num_heads=4, num_kv_heads=2, head_dim=8)
TEACHER = ModelShape("teacher (B)", 4, 48, num_heads=4, num_kv_heads=4, head_dim=12)


def states(shape: ModelShape, seed: int) -> dict[int, AttentionStates]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 6, shape.head_dim, generator=generator)

    return {
        layer: AttentionStates(
            draw(shape.num_heads), draw(shape.num_kv_heads), draw(shape.num_kv_heads), Visibility(causal=True), 0.5
        )
        for layer in range(1, shape.num_layers + 1)
    }


def signals(weights: torch.Tensor | None = None, index: torch.Tensor = INDEX):
    tokens = Tokens(index, index % 6 == 0, weights)
    logits, labels = Projection(torch.zeros(len(index), 4), identity), torch.zeros(len(index), dtype=torch.int64)
    student = StudentSignals(logits, labels, tokens=tokens, attention=states(STUDENT, 0))
    return student, TeacherSignals(attention=states(TEACHER, 1))


def bound(student: ModelShape = STUDENT, teacher: ModelShape = TEACHER, **arguments) -> AttentionObjective:
    objective = AttentionObjective(**arguments)
    objective.bind(student, teacher)
    return objective


def distance(loss: str, student: AttentionStates, teacher: AttentionStates) -> torch.Tensor:
    if loss == "relations":
        seen = (student.seen, teacher.seen)
        parts = ((student.query, teacher.query), (student.key, teacher.key), (student.value, teacher.value))
        return sum(relation_distance(*part, seen, INDEX) for part in parts)
    sides = [Scores(side.query, side.key, side.seen, side.scaling) for side in (student, teacher)]
    return score_distance(*sides, INDEX, loss)


@pytest.mark.parametrize("loss", ["relations", *SCORE_LOSSES])
def test_the_sum_is_that_of_the_mean_over_pairs(loss):
    objective = bound(loss=loss, layer_mapping=[(1, 2), (-1, -1)])
    assert objective.pairs == ((1, 2), (2, 4))
    assert (objective.student_attention, objective.teacher_attention) == ({1, 2}, {2, 4})
    student, teacher = signals()
    pairs = [distance(loss, student.attention[ours], teacher.attention[theirs]) for ours, theirs in objective.pairs]
    value = objective(student, teacher)
    assert (value.shape, value.dtype) == ((), torch.float32)
    torch.testing.assert_close(value, ((pairs[0] + pairs[1]) / 2).sum())
    weights = torch.arange(6.0)
    torch.testing.assert_close(objective(*signals(weights)), ((pairs[0] + pairs[1]) / 2 * weights).sum())


def test_the_last_layers_are_the_default_and_the_card_says_how_many_heads():
    objective = bound(weight=0.3)
    assert objective.pairs == ((2, 4),)
    assert objective.config() == {
        "objective": "AttentionObjective",
        "weight": 0.3,
        "loss": "relations",
        "layers (student, teacher)": [(2, 4)],
        "relation heads": "2 (queries), 2 (keys, values)",
    }
    assert bound(relation_heads=8).config()["relation heads"] == 8
    assert "relation heads" not in bound(loss="map_kl").config()


def test_no_labels_are_a_zero_that_has_a_gradient():
    student, teacher = signals(index=INDEX[:0])
    for layer in student.attention.values():
        layer.query.requires_grad_()
    value = bound()(student, teacher)
    assert value == 0
    value.backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "relation"}, "attention loss 'relation'"),
        ({"layer_mapping": "unifrom"}, "layer_mapping"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"weight": -1.0}, "weight"),
        ({"relation_heads": 0}, "relation_heads"),
        ({"relation_heads": 4, "loss": "map_kl"}, "relation_heads"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionObjective(**arguments)


FEW = ModelShape("student (A)", 2, 32, num_heads=3, num_kv_heads=3, head_dim=8)
REASON = "its maps are gone; use `loss='relations'`."
NO_MAPS = ModelShape("teacher (B)", 4, 48, no_attention_maps={2: "another one", 4: REASON})
DEAF = replace(STUDENT, no_attention={1: "another one", 2: "it is deaf; use the eager one."})


@pytest.mark.parametrize(
    ("student", "teacher", "arguments", "message"),
    [
        (FEW, TEACHER, {"loss": "score_mse"}, r"student \(A\) has 3 and the teacher \(B\) 4"),
        (
            STUDENT,
            TEACHER,
            {"relation_heads": 5},
            r"32 and 16 of the student \(A\), 48 and 48 of the teacher \(B\).*\[1, 2, 4, 8, 16\]",
        ),
        (STUDENT, TEACHER, {"layer_mapping": [(0, 1)]}, r"student \(A\) and the teacher \(B\); 0 is the embedding"),
        (STUDENT, TEACHER, {"layer_mapping": [(3, 1)]}, r"student \(A\), which has layers 1 to 2"),
        (
            STUDENT,
            NO_MAPS,
            {"loss": "map_kl"},
            r"the student \(A\) and the .* layer 4 cannot be had of the teacher \(B\): its maps are gone.*'relations'",
        ),
        (DEAF, TEACHER, {}, r"layer 2 cannot be had of the student \(A\): it is deaf; use the eager one"),
        (DEAF, NO_MAPS, {"loss": "map_kl"}, "it is deaf"),
        (replace(DEAF, no_attention_maps={2: "no maps"}), TEACHER, {"loss": "map_mse"}, "it is deaf"),
    ],
)
def test_models_that_do_not_fit_are_refused_naming_both(student, teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(student, teacher, **arguments)


def test_layers_that_are_not_compared_may_lack_attention():
    hybrid = replace(DEAF, no_attention={1: "a convolution"})
    assert bound(hybrid, NO_MAPS, layer_mapping=[(2, 3)], loss="map_kl").pairs == ((2, 3),)
    assert bound(hybrid, NO_MAPS).pairs == ((2, 4),)


def test_models_whose_heads_are_not_known_are_bound_for_relations():
    assert bound(teacher=NO_MAPS, relation_heads=5).config()["relation heads"] == 5


def test_attention_that_is_more_than_a_softmax_has_no_maps_but_relations():
    student, teacher = signals()
    sinks = {
        layer: AttentionStates(*[s.query] * 3, s.visibility, 1.0, has_maps=False)
        for layer, s in states(TEACHER, 1).items()
    }
    teacher = TeacherSignals(attention=sinks)
    with pytest.raises(ValueError, match=r"attention of the teacher.*loss='relations'"):
        bound(loss="map_kl")(student, teacher)
    assert bound()(student, teacher) > 0


@pytest.mark.parametrize(
    ("loss", "paper"),
    [("relations", "2012.15828"), ("map_kl", "2002.10957"), ("score_mse", "1909.10351"), ("map_mse", "")],
)
def test_the_card_cites_the_paper_of_the_loss(loss, paper):
    assert AttentionObjective(loss=loss).citation == paper

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_distill.functional import LMHead
from hf_distill.functional.dynamics import feature_dynamics
from hf_distill.functional.features import PER_TOKEN
from hf_distill.objectives import FeatureDynamicsObjective, HiddenDeltaObjective
from hf_distill.signals import ModelShape, Projection, StudentSignals, TeacherSignals, Tokens


TOKENS = 12


def shapes(depths=(6, 12), widths=(8, 10), vocabularies=(20, 24), has_final_norm=False) -> list[ModelShape]:
    sides = zip(("student", "teacher"), depths, widths, vocabularies, strict=True)
    return [
        ModelShape(name, depth, width, vocab_size=size, has_final_norm=has_final_norm)
        for name, depth, width, size in sides
    ]


def states(width: int, layers: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(TOKENS, width, generator=generator) for layer in range(layers + 1)}


def signals(widths=(8, 10), weights: torch.Tensor | None = None) -> tuple[StudentSignals, TeacherSignals]:
    ours, theirs = states(widths[0], 6, seed=0), states(widths[1], 12, seed=1)
    generator = torch.Generator().manual_seed(2)
    heads = [
        LMHead(torch.randn(size, width, generator=generator)) for size, width in zip((20, 24), widths, strict=True)
    ]
    where = Tokens(torch.arange(TOKENS), torch.zeros(TOKENS, dtype=torch.bool), weights)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    return (
        StudentSignals(Projection(ours[6], heads[0]), labels, ours, where),
        TeacherSignals(Projection(theirs[12], heads[1]), theirs),
    )


def test_layers_are_every_floor_of_depth_over_five_of_each_model():
    objective = FeatureDynamicsObjective()
    objective.bind(*shapes(depths=(12, 32)))
    assert objective.pairs == ((2, 6), (4, 12), (6, 18), (8, 24))
    assert objective.student_layers == {2, 4, 6, 8}
    assert objective.teacher_layers == {6, 12, 18, 24}
    objective.bind(*shapes(depths=(3, 32)))
    assert objective.pairs == ((1, 10), (2, 20))


def test_the_sum_is_that_of_both_parts_over_the_labels():
    student, teacher = signals(weights=torch.linspace(0, 1, TOKENS))
    objective = FeatureDynamicsObjective(trajectory_weight=0.5, derivative_weight=2.0)
    objective.bind(*shapes())
    assert objective.pairs == ((1, 2), (2, 4), (3, 6), (4, 8))
    trajectory, derivative = feature_dynamics(
        [student.hidden[layer] for layer in (1, 2, 3, 4)], student.logits.head,
        [teacher.hidden[layer] for layer in (2, 4, 6, 8)], teacher.logits.head,
    )  # fmt: skip
    expected = ((0.5 * trajectory + 2.0 * derivative) * torch.linspace(0, 1, TOKENS)).sum()
    torch.testing.assert_close(objective(student, teacher), expected)


def test_each_models_own_final_norm_comes_before_its_head_but_not_twice():
    student, teacher = signals()
    student, teacher = replace(student, final_norm=lambda h: h / 2), replace(teacher, final_norm=lambda h: h - 3)
    objective, plain = (
        FeatureDynamicsObjective(layer_mapping=[(0, 1), (6, 11)], final_norm=asked) for asked in (True, False)
    )
    for each in (objective, plain):
        each.bind(*shapes(has_final_norm=True))
    assert (objective.reads_final_norm, plain.reads_final_norm) == (True, False)
    normed = [
        replace(student, hidden={0: student.hidden[0] / 2, 6: student.hidden[6]}),
        TeacherSignals(teacher.logits, {1: teacher.hidden[1] - 3, 11: teacher.hidden[11] - 3}),
    ]
    torch.testing.assert_close(objective(student, teacher), plain(*normed))
    assert (plain(student, teacher) - plain(*normed)).abs() > 1e-2
    assert objective.config() == plain.config() | {"final norm": "before the heads"}
    with pytest.raises(ValueError, match="`final_norm`"):
        objective(student, replace(teacher, final_norm=None))


@pytest.mark.parametrize("side", [0, 1])
def test_a_model_without_a_final_norm_is_refused_with_both_names_where_it_is_asked_for(side):
    models = shapes(has_final_norm=True)
    models[side] = replace(models[side], has_final_norm=False)
    FeatureDynamicsObjective().bind(*models)
    with pytest.raises(
        ValueError, match=rf"heads of student and teacher, but {('student', 'teacher')[side]} has none"
    ):
        FeatureDynamicsObjective(final_norm=True).bind(*models)


@pytest.mark.parametrize("side", [0, 1])
def test_a_model_without_a_vocabulary_head_is_refused_with_both_names(side):
    sizes = (None, 24) if side == 0 else (20, None)
    with pytest.raises(ValueError, match=rf"student and teacher .* but {('student', 'teacher')[side]} has none"):
        FeatureDynamicsObjective().bind(*shapes(vocabularies=sizes))


@pytest.mark.parametrize("objective", [FeatureDynamicsObjective(), HiddenDeltaObjective()])
def test_models_of_too_few_layers_for_a_step_are_refused_with_both_names(objective):
    with pytest.raises(ValueError, match=r"2 layers of student and the 12 of teacher"):
        objective.bind(*shapes(depths=(2, 12)))


def test_the_config_names_the_parts_and_the_source():
    objective = FeatureDynamicsObjective(0.3)
    objective.bind(*shapes(depths=(3, 6)))
    assert objective.config() == {
        "objective": "FeatureDynamicsObjective", "weight": 0.3, "layers (student, teacher)": [(1, 2), (2, 4)],
        "trajectory": 1.0, "derivative": 1.0, "source": "ACL 2025 long.1125",
    }  # fmt: skip


def test_a_negative_part_is_refused():
    with pytest.raises(ValueError, match="derivative_weight"):
        FeatureDynamicsObjective(derivative_weight=-1.0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("widths", [(8, 8), (8, 10)])
@pytest.mark.parametrize("loss", ["cosine", "relative_mse"])
def test_deltas_are_differences_of_consecutive_layers(loss, widths, shared):
    objective = HiddenDeltaObjective(loss=loss, num_pairs=3, shared_projector=shared)
    objective.bind(*shapes(widths=widths))
    assert objective.pairs == ((1, 3), (2, 6), (3, 9))
    assert len(objective.projectors) == (0 if widths == (8, 8) else 1 if shared else 2)
    student, teacher = signals(widths)
    ours, theirs = student.hidden, teacher.hidden
    projectors = list(objective.projectors) * 2 or [torch.nn.Identity()] * 2
    expected = PER_TOKEN[loss](projectors[0](ours[2] - ours[1]), theirs[6] - theirs[3])
    expected = expected + PER_TOKEN[loss](projectors[1](ours[3] - ours[2]), theirs[9] - theirs[6])
    found = objective(student, teacher)
    torch.testing.assert_close(found, expected.sum() / 2)
    if len(objective.projectors):
        found.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())


def test_a_constant_added_to_all_layers_moves_no_delta():
    objective = HiddenDeltaObjective(loss="mse")
    objective.bind(*shapes(widths=(8, 8)))
    student, teacher = signals((8, 8))
    before = objective(student, teacher)
    for hidden in student.hidden.values():
        hidden += 5.0
    torch.testing.assert_close(objective(student, teacher), before)

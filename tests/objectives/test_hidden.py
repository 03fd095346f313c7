from __future__ import annotations

import pytest
import torch

from hf_distill import HiddenStateObjective
from hf_distill.functional.features import PER_SET, PER_TOKEN
from hf_distill.signals import ModelShape, Projection, StudentSignals, TeacherSignals, Tokens, identity


TOKENS = 12


def states(width: int, layers: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(TOKENS, width, generator=generator) for layer in range(layers + 1)}


def tokens(weights: torch.Tensor | None = None) -> Tokens:
    return Tokens(torch.arange(TOKENS), torch.arange(TOKENS) % 6 == 0, weights)


def signals(student, teacher, where: Tokens | None = None) -> tuple[StudentSignals, TeacherSignals]:
    logits = Projection(torch.zeros(TOKENS, 4), identity)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    return StudentSignals(logits, labels, student, where or tokens()), TeacherSignals(hidden=teacher)


def bound(student_size: int = 8, teacher_size: int = 8, depths=(2, 4), **arguments) -> HiddenStateObjective:
    objective = HiddenStateObjective(**arguments)
    objective.bind(ModelShape("student", depths[0], student_size), ModelShape("teacher", depths[1], teacher_size))
    return objective


@pytest.mark.parametrize("loss", PER_TOKEN)
def test_the_sum_is_that_of_the_mean_over_pairs(loss):
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    objective = bound(loss=loss)
    assert objective.pairs == ((1, 2), (2, 4))
    expected = (PER_TOKEN[loss](student[1], teacher[2]) + PER_TOKEN[loss](student[2], teacher[4])).sum() / 2
    torch.testing.assert_close(objective(*signals(student, teacher)), expected)


@pytest.mark.parametrize("loss", PER_SET)
def test_a_distance_of_sets_counts_once_for_every_label(loss):
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = bound(8, 12, loss=loss, layer_mapping=[(2, 4)])
    assert not list(objective.parameters())
    torch.testing.assert_close(objective(*signals(student, teacher)), TOKENS * PER_SET[loss](student[2], teacher[4]))


@pytest.mark.parametrize(("shared", "count"), [(False, 2), (True, 1)])
def test_projectors_bridge_unequal_widths_and_get_gradients(shared, count):
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = bound(8, 12, loss="mse", shared_projector=shared)
    assert len(objective.projectors) == count
    for projector in objective.projectors:
        torch.testing.assert_close(projector.weight.t() @ projector.weight, torch.eye(8))
    objective(*signals(student, teacher)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    first, last = objective.projectors[0], objective.projectors[-1]
    expected = (PER_TOKEN["mse"](first(student[1]), teacher[2]) + PER_TOKEN["mse"](last(student[2]), teacher[4])) / 2
    torch.testing.assert_close(objective(*signals(student, teacher)), expected.sum())


def test_equal_widths_need_no_projector():
    assert not list(bound(8, 8).parameters())


def test_projectors_are_the_same_on_every_rank():
    torch.manual_seed(0)
    one = bound(8, 12)
    torch.manual_seed(1)
    other = bound(8, 12)
    assert torch.equal(one.projectors[0].weight, other.projectors[0].weight)


@pytest.mark.parametrize("loss", ["mse", "cka"])
def test_first_tokens_can_be_left_out(loss):
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    objective = bound(loss=loss, skip_first=True)
    value = objective(*signals(student, teacher))
    for layers in (student, teacher):
        for hidden in layers.values():
            hidden[::6] *= 1000
    torch.testing.assert_close(objective(*signals(student, teacher)), value)
    assert not torch.isclose(bound(loss=loss)(*signals(student, teacher)), value)


def test_the_tokens_of_a_classifier_count_by_their_weights():
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))
    objective = bound(loss="mse", layer_mapping=[(2, 4)])
    expected = (PER_TOKEN["mse"](student[2], teacher[4]) * weights).sum()
    torch.testing.assert_close(objective(*signals(student, teacher, tokens(weights))), expected)


@pytest.mark.parametrize("loss", PER_TOKEN | PER_SET)
@pytest.mark.parametrize("skip_first", [False, True])
def test_a_batch_without_labels_gives_a_zero_with_a_gradient_path(loss, skip_first):
    objective = bound(8, 12, loss=loss, skip_first=skip_first)
    none = {layer: torch.zeros(0, 8, requires_grad=True) for layer in range(3)}
    theirs = {layer: torch.zeros(0, 12) for layer in range(5)}
    where = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    student = StudentSignals(Projection(torch.zeros(0, 4), identity), where.index, none, where)
    value = objective(student, TeacherSignals(hidden=theirs))
    assert value.item() == 0
    value.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_autocast_does_not_reach_the_distance():
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    objective = bound(loss="cka")
    expected = objective(*signals(student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(*signals(student, teacher)), expected)


def test_the_config_names_what_was_compared():
    objective = bound(8, 12, weight=0.3, loss="mse", skip_first=True)
    assert objective.config() == {
        "objective": "HiddenStateObjective", "weight": 0.3, "loss": "mse",
        "layers (student, teacher)": [(1, 2), (2, 4)], "projectors": 2, "first token": "skipped",
    }  # fmt: skip


def test_an_unknown_loss_is_answered_with_near_names():
    with pytest.raises(ValueError, match="cosine"):
        HiddenStateObjective(loss="cosin")

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from hf_distill.functional.relations import RELATIONS, rkd, rkd_angle, rkd_distance
from tests.functional.test_features import draw, rotation


def naive_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Pair by pair."""
    pairs = list(itertools.permutations(range(len(student)), 2))
    sides = [torch.stack([(side[i] - side[j]).norm() for i, j in pairs]) for side in (student, teacher)]
    ours, theirs = (side / side.mean() for side in sides)
    return F.smooth_l1_loss(ours, theirs)


def naive_angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Triple by triple."""
    triples = list(itertools.permutations(range(len(student)), 3))
    ours, theirs = (
        torch.stack([F.cosine_similarity(side[i] - side[j], side[k] - side[j], dim=0) for i, j, k in triples])
        for side in (student, teacher)
    )
    return F.smooth_l1_loss(ours, theirs)


def naive_similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    ours, theirs = (F.normalize(side @ side.t(), dim=1) for side in (student, teacher))
    return (ours - theirs).norm() ** 2 / len(student) ** 2


NAIVE = {
    "rkd": lambda student, teacher: naive_distance(student, teacher) + 2 * naive_angle(student, teacher),
    "rkd_distance": naive_distance,
    "rkd_angle": naive_angle,
    "similarity": naive_similarity,
}


def value_and_gradient(loss, student, teacher) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), *torch.autograd.grad(value, student)


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_value_and_gradient_are_those_of_the_definition(name, scale):
    student, teacher = draw(6, 4) * scale, draw(6, 7, seed=1)
    for ours, expected in zip(
        value_and_gradient(RELATIONS[name], student, teacher),
        value_and_gradient(NAIVE[name], student, teacher),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", RELATIONS)
def test_a_rotated_and_scaled_teacher_has_no_distance_and_no_gradient(name):
    student = draw(9, 8)
    wider = F.pad(3.0 * student @ rotation(8), (0, 4)) @ rotation(12)
    shift = 0.0 if name == "similarity" else 5.0
    for teacher in (student.clone(), wider + shift):
        value, gradient = value_and_gradient(RELATIONS[name], student, teacher)
        assert value.abs() < 1e-12
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("name", RELATIONS)
def test_what_is_no_rotation_is_seen(name):
    student = draw(9, 8)
    assert RELATIONS[name](student, student * torch.linspace(0.1, 2, 8)) > 1e-4


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_equal_tokens_give_a_bounded_gradient(name, side):
    student, teacher = draw(6, 4).float(), draw(6, 7, seed=1).float()
    if side in ("student", "both"):
        student[3] = student[1]
    if side in ("teacher", "both"):
        teacher[3] = teacher[1]
    value, gradient = value_and_gradient(RELATIONS[name], student * 7, teacher + 100)
    assert torch.isfinite(value)
    assert gradient.abs().max() < 1


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 6])
def test_too_few_or_constant_tokens_give_a_finite_value_and_gradient(name, tokens):
    student, teacher = torch.zeros(tokens, 4), torch.ones(tokens, 7)
    value, gradient = value_and_gradient(RELATIONS[name], student, teacher)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_angles_without_a_direction_are_left_out():
    student, teacher = draw(6, 4), draw(6, 7, seed=1)
    student[3] = student[1]
    kept = [t for t in itertools.permutations(range(6), 3) if not {(1, 3), (3, 1)} & {t[:2], t[1:]}]
    ours, theirs = (
        torch.stack([F.cosine_similarity(side[i] - side[j], side[k] - side[j], dim=0) for i, j, k in kept])
        for side in (student, teacher)
    )
    torch.testing.assert_close(rkd_angle(student, teacher), F.smooth_l1_loss(ours, theirs))


def test_tokens_far_from_the_origin_keep_their_geometry():
    student, teacher = draw(12, 8), draw(12, 8, seed=1)
    torch.testing.assert_close(rkd(student + 1e5, teacher), rkd(student, teacher), rtol=1e-9, atol=0)


def test_tokens_close_to_each_other_keep_their_angles_in_fp32():
    student, teacher = draw(6, 4).float(), draw(6, 7, seed=1).float()
    student[3] = student[1] + 1e-3 * student[2]
    expected = naive_angle(student.double(), teacher.double())
    torch.testing.assert_close(rkd_angle(student, teacher).double(), expected, rtol=1e-5, atol=0)


def test_tokens_that_only_rounding_tells_apart_count_as_equal():
    student, teacher = draw(33, 50).repeat(2, 1), draw(66, 7, seed=1)
    gradients = [value_and_gradient(rkd, student + noise * draw(66, 50, seed=2), teacher)[1] for noise in (0.0, 1e-13)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", RELATIONS)
def test_bf16_features_are_compared_in_fp32(name):
    student, teacher = draw(6, 8).bfloat16(), draw(6, 8, seed=1).bfloat16()
    value = RELATIONS[name](student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, RELATIONS[name](student.float(), teacher.float()))


def test_the_order_of_tokens_does_not_matter():
    student, teacher, order = draw(9, 8), draw(9, 5, seed=1), torch.randperm(9)
    torch.testing.assert_close(rkd(student[order], teacher[order]), rkd(student, teacher))


def test_sets_of_unequal_tokens_are_refused():
    with pytest.raises(ValueError, match="one row per token"):
        rkd_distance(torch.zeros(4, 8), torch.zeros(5, 8))

from __future__ import annotations

import pytest
import torch

from hf_distill.functional.features import PER_SET, PER_TOKEN


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 3) -> torch.Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


@pytest.mark.parametrize("name", PER_TOKEN | PER_SET)
@pytest.mark.parametrize("tokens", [3, 40], ids=["fewer tokens than dimensions", "more"])
def test_equal_features_have_no_distance_and_no_gradient(name, tokens):
    student = draw(tokens, 8).requires_grad_()
    value = (PER_TOKEN | PER_SET)[name](student, student.detach().clone())
    value.sum().backward()
    assert value.abs().max() < 1e-9
    assert student.grad.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "expected"), [("mse", 12.5), ("relative_mse", 1.0), ("cosine", 1.0), ("smooth_l1", 3.0)]
)
def test_values_by_hand(name, expected):
    # The difference is (3, -4): squares 9 + 16, smooth L1 2.5 + 3.5; the vectors are at right angles.
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[-3.0, 4.0]])
    if name == "cosine":
        student = torch.tensor([[4.0, 3.0]])
    assert PER_TOKEN[name](student, teacher).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_token_does_not_see_the_others(name):
    student, teacher = draw(5, 8), draw(5, 8, seed=1)
    whole = PER_TOKEN[name](student, teacher)
    assert whole.shape == (5,)
    torch.testing.assert_close(PER_TOKEN[name](student[2:3], teacher[2:3]), whole[2:3])


@pytest.mark.parametrize("name", ["mse", "relative_mse", "cosine", "smooth_l1"])
def test_bf16_features_are_compared_in_fp32(name):
    student, teacher = draw(5, 8).bfloat16(), draw(5, 8, seed=1).bfloat16()
    value = PER_TOKEN[name](student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, PER_TOKEN[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", PER_SET)
@pytest.mark.parametrize("tokens", [6, 40])
def test_sets_are_compared_up_to_rotation_shift_and_scale(name, tokens):
    student, teacher = draw(tokens, 8), draw(tokens, 12, seed=1)
    value = PER_SET[name](student, teacher)
    moved = 5.0 * student @ rotation(8) + draw(8, seed=4)
    torch.testing.assert_close(PER_SET[name](moved, teacher), value)
    assert 0 < value < 1


@pytest.mark.parametrize("name", PER_SET)
def test_gradients_of_sets_are_those_of_finite_differences(name):
    student, teacher = draw(7, 3).requires_grad_(), draw(7, 5, seed=1)
    assert torch.autograd.gradcheck(PER_SET[name], (student, teacher))


def test_cka_does_not_depend_on_the_way_it_is_computed():
    student, teacher = draw(40, 8), draw(40, 12, seed=1)
    centred = [features - features.mean(0) for features in (student, teacher)]
    ours, theirs = (features @ features.t() for features in centred)
    expected = 1 - (ours * theirs).sum() / (ours.norm() * theirs.norm())
    torch.testing.assert_close(PER_SET["cka"](student, teacher), expected)
    torch.testing.assert_close(
        PER_SET["cka"](student[:6], teacher[:6]), 1 - _hsic(student[:6], teacher[:6]), atol=1e-9, rtol=0
    )


def _hsic(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The alignment by widths, `[H_s, H_t]` products."""
    x, y = student - student.mean(0), teacher - teacher.mean(0)
    return (x.t() @ y).square().sum() / ((x.t() @ x).norm() * (y.t() @ y).norm())


def test_procrustes_finds_a_rotation_that_a_sum_of_squares_cannot():
    teacher = draw(40, 8)
    student = teacher @ rotation(8)
    assert PER_TOKEN["mse"](student, teacher).mean() > 0.1
    assert PER_SET["procrustes"](student, teacher) < 1e-9


def test_constant_features_give_a_finite_gradient():
    for name, loss in (PER_TOKEN | PER_SET).items():
        student = torch.zeros(4, 8, requires_grad=True)
        loss(student, torch.zeros(4, 8)).sum().backward()
        assert torch.isfinite(student.grad).all(), name


@pytest.mark.parametrize("name", PER_TOKEN)
def test_unequal_widths_name_both_and_the_ways_out(name):
    with pytest.raises(ValueError, match=r"\[4, 8\] and \[4, 12\].*cka"):
        PER_TOKEN[name](torch.zeros(4, 8), torch.zeros(4, 12))


@pytest.mark.parametrize("name", PER_SET)
def test_sets_of_unequal_tokens_are_refused(name):
    with pytest.raises(ValueError, match="one row per token"):
        PER_SET[name](torch.zeros(4, 8), torch.zeros(5, 8))

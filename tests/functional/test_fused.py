"""The fused loss against its naive twin (full logits, autograd), in value and in every gradient."""

import math

import pytest
import torch

from hf_distill.functional import DIVERGENCES, METRICS, linear_distillation_loss
from tests.functional.twins import DEVICES, HEADS, KWARGS, SMALL, Case, assert_twins, every, module_of, naive, of


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_each_divergence_alone_and_with_cross_entropy_equals_its_twin(name, temperature):
    case = Case()
    assert_twins(case, of(name), temperature=temperature)
    assert_twins(case, {"ce": 0.3, **of(name)}, temperature=temperature)


@every
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_each_divergence_equals_its_twin_for_every_head(name, head):
    assert_twins(Case(**head), {"ce": 0.3, **of(name)}, temperature=2.0)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_terms_together_equal_their_twin(head, temperature):
    terms = {name: (0.1 + 0.05 * i, KWARGS[name]) for i, name in enumerate(sorted(DIVERGENCES))}
    assert_twins(Case(**head), {"ce": 0.3, **terms}, temperature=temperature)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_cross_entropy_alone_needs_no_teacher(head):
    case = Case(**head)
    assert_twins(case, {"ce": 1.0}, temperature=2.0)
    alone = case.fused(terms={"ce": 1.0}, teacher_hidden=None, teacher_head=None)
    torch.testing.assert_close(alone.loss, naive(case, {"ce": 1.0})[0])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("jsd", {"beta": 0.9}),
        ("skew_kl", {"skew": 0.0}),
        ("skew_kl", {"skew": 0.8}),
        ("skew_reverse_kl", {"skew": 0.6}),
        ("symmetric_kl", {"weight": 0.9}),
        ("adaptive_kl", {"mass": 0.95}),
        ("taid", {"t": 1.0}),
        ("taid", {"t": 0.0}),
    ],
)
def test_keyword_arguments_reach_the_closed_form(name, kwargs):
    assert_twins(Case(), {"ce": 0.2, name: (0.5, kwargs)}, temperature=1.5)


@every
def test_fp32_is_within_rounding_of_a_float64_reference(name):
    case = Case(tokens=300, masked=50, vocabularies=(200, 200))
    reference = case.to(torch.float64)
    terms = {"ce": 0.5, **of(name, 0.5)}
    expected, actual = naive(reference, terms)[0], case.fused(terms=terms).loss
    assert abs(actual.item() / expected.item() - 1) < 1e-6
    for ours, exact in zip(
        torch.autograd.grad(actual, case.leaves), torch.autograd.grad(expected, reference.leaves), strict=True
    ):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-5


@every
def test_float64_stays_float64(name):
    case = Case(dtype=torch.float64)
    assert case.fused(terms=of(name)).loss.dtype == torch.float64
    assert_twins(case, {"ce": 0.5, **of(name)}, rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("head", [{}, {"bias": True}, {"softcap": 3.0}], ids=["plain", "bias", "softcap"])
@pytest.mark.parametrize("device", DEVICES)
def test_bf16_is_no_worse_than_the_naive_path_with_fp32_softmax(name, head, device):
    case = Case(tokens=300, **head).to(torch.bfloat16, device)
    reference = case.to(torch.float64)
    terms = {"ce": 0.5, **of(name, 0.5)}
    exact, theirs, ours = naive(reference, terms)[0], naive(case, terms)[0], case.fused(terms=terms).loss
    assert abs(ours.item() - exact.item()) <= 1.5 * abs(theirs.item() - exact.item()) + 2e-3 * abs(exact.item())
    gradients = [
        torch.autograd.grad(loss, of_.leaves) for loss, of_ in ((exact, reference), (theirs, case), (ours, case))
    ]
    for want, their, our in zip(*gradients, strict=True):
        assert our.dtype == torch.bfloat16
        errors = [((g.double() - want).norm() / want.norm()).item() for g in (their, our)]
        assert errors[1] <= 1.2 * errors[0] + 1e-3


def test_autocast_projects_in_bf16_and_accumulates_fp32_gradients_of_fp32_leaves():
    case = Case(tokens=300, widths=(64, 32))
    low = case.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.fused(metrics=("kl",)).loss
    expected = low.fused().loss
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    for ours, theirs in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, low.leaves), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.bfloat16(), theirs)


@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_autocast_does_not_reach_the_statistics(plain):
    case, weights = Case(), torch.rand(151)
    heads = {} if plain else {"teacher_head": case.teacher_head.__call__}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.fused(token_weights=weights, terms={"ce": 0.5, "jsd": 0.5}, **heads)
    low = case.to(torch.bfloat16)
    expected = naive(low, {"ce": 0.5, "jsd": 0.5}, token_weights=weights)[0]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@every
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_heads_that_are_not_plain_give_the_same_loss_gradients_and_metrics(name, which):
    case = Case(bias=True, softcap=5.0, vocabularies=(61, 53))
    terms, weights = {"ce": 0.3, **of(name)}, torch.rand(151)
    student = case.head if which == "teacher" else module_of(case.head)
    teacher = case.teacher_head if which == "student" else module_of(case.teacher_head)
    out = linear_distillation_loss(
        case.hidden,
        student,
        case.labels,
        teacher_hidden=case.teacher_hidden,
        teacher_head=teacher,
        terms=terms,
        token_weights=weights,
        chunk_bytes=SMALL,
        metrics=METRICS,
    )
    expected = case.fused(terms=terms, token_weights=weights, metrics=METRICS)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.parts, expected.parts)
    torch.testing.assert_close(out.metrics, expected.metrics)
    for ours, theirs in zip(*(torch.autograd.grad(o.loss, case.leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_callable_head_may_exclude_tokens_with_minus_infinity():
    case = Case(vocabularies=(60, 60))
    cut = case.head.rows(53)

    def head(hidden):
        return torch.nn.functional.pad(cut(hidden), (0, 7), value=-math.inf)

    def teacher_head(hidden):
        return torch.nn.functional.pad(case.teacher_head.rows(53)(hidden), (0, 7), value=-math.inf)

    case.labels = case.labels.clamp(max=52)
    terms = {"ce": 0.3, **{name: (0.1, KWARGS[name]) for name in DIVERGENCES}}
    out = linear_distillation_loss(
        case.hidden,
        head,
        case.labels,
        teacher_hidden=case.teacher_hidden,
        teacher_head=teacher_head,
        terms=terms,
        metrics=METRICS,
    )
    expected = linear_distillation_loss(
        case.hidden,
        cut,
        case.labels,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_head.rows(53),
        terms=terms,
        metrics=METRICS,
    )
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics, expected.metrics)
    for ours, theirs in zip(*(torch.autograd.grad(o.loss, case.leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_bias_of_minus_infinity_excludes_tokens_on_both_sides():
    case = Case(bias=True)
    with torch.no_grad():
        case.labels.clamp_(max=49)
        for head in (case.head, case.teacher_head):
            head.bias[50:] = -math.inf
    terms = {"ce": 0.3, **{name: (0.1, KWARGS[name]) for name in DIVERGENCES}}
    assert_twins(case, terms, temperature=0.5)

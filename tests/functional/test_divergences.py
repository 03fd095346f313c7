"""Every divergence of the registry: known values, invariants, gradients, and what happens at the edges."""

import math

import pytest
import torch
from torch import Tensor

from hf_distill.functional import DIVERGENCES, adaptive_kl, forward_kl, jsd, resolve_divergence, taid
from hf_distill.functional.divergences import adaptive_weights
from hf_distill.functional.registry import BoundDivergence


P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
Q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
# Smallest value is the teacher's entropy, not 0.
OFFSET_BY_ENTROPY = {"soft_cross_entropy"}
every = pytest.mark.parametrize("name", sorted(DIVERGENCES))


def bound(name: str) -> BoundDivergence:
    """The divergence with its defaults, and the middle of the range where it has none."""
    parameters = DIVERGENCES[name].parameters
    return resolve_divergence(
        name, {k: (v.low + v.high) / 2 for k, v in parameters.items()} | DIVERGENCES[name].defaults
    )


def random_logits(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(divergence: BoundDivergence, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.autograd.grad(divergence(student, teacher, temperature).sum(), student)[0]


@pytest.mark.parametrize(
    ("name", "kwargs", "value"),
    [
        ("forward_kl", {}, 0.3734),
        ("reverse_kl", {}, 0.4220),
        ("symmetric_kl", {"weight": 0.9}, 0.9 * 0.3734 + 0.1 * 0.4220),
        ("jsd", {"beta": 0.5}, 0.0944),
        ("jsd", {"beta": 0.1}, 0.0335),
        ("skew_kl", {"skew": 0.0}, 0.3734),
        ("skew_reverse_kl", {"skew": 0.0}, 0.4220),
        (
            "skew_kl",
            {"skew": 0.5},
            0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25),
        ),
        (
            "skew_reverse_kl",
            {"skew": 0.1},
            sum(q * math.log(q / (0.1 * q + 0.9 * p)) for p, q in ((0.7, 0.3), (0.2, 0.3), (0.1, 0.4))),
        ),
        # The head is the top token alone (mass 0.7 > 0.5): gaps .4 in the head, .1 + .3 in the tail.
        ("adaptive_kl", {}, 0.5 * 0.3734 + 0.5 * 0.4220),
        ("tvd", {}, 0.4),
        ("soft_cross_entropy", {}, 0.3734 + 0.8018),
    ],
)
def test_values_match_hand_computed_ones(name, kwargs, value):
    assert resolve_divergence(name, kwargs)(Q, P).item() == pytest.approx(value, abs=1e-4)


@every
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_identical_logits_give_zero_and_no_gradient(name, temperature):
    student, _ = random_logits(4, 11)
    value = bound(name)(student, student.detach(), temperature)
    if name in OFFSET_BY_ENTROPY:
        probs = torch.softmax(student / temperature, -1)
        value = value - torch.special.entr(probs).sum(-1)
    torch.testing.assert_close(value, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(gradient(bound(name), student, student.detach()), torch.zeros_like(student))


@every
def test_no_value_is_negative_and_different_logits_give_more_than_zero(name):
    student, teacher = random_logits(50, 7)
    assert (bound(name)(student, teacher) > 0.001).all()


@every
def test_gradient_matches_finite_differences(name):
    student, teacher = random_logits(2, 5)
    # Stop-gradients (TAID's target, the weights of adaptive KL) are no derivative of the value: see their own tests.
    if name in ("taid", "adaptive_kl"):
        pytest.skip("its gradient is not the derivative of its value")
    assert torch.autograd.gradcheck(lambda z: bound(name)(z, teacher, 1.7), student)


@every
def test_adding_a_constant_to_all_logits_of_a_token_changes_nothing(name):
    student, teacher = random_logits(3, 9)
    shift = torch.tensor([[5.0], [-2.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(bound(name)(student + shift, teacher - shift), bound(name)(student, teacher))


@every
def test_tokens_that_both_sides_exclude_change_nothing(name):
    student, teacher = random_logits(3, 9)
    expected, expected_gradient = bound(name)(student, teacher), gradient(bound(name), student, teacher)
    hole = torch.full((3, 4), -math.inf, dtype=torch.float64)
    padded, padded_teacher = (torch.cat([z.detach(), hole], -1) for z in (student, teacher))
    padded.requires_grad_()
    torch.testing.assert_close(bound(name)(padded, padded_teacher), expected)
    actual = gradient(bound(name), padded, padded_teacher)
    torch.testing.assert_close(actual, torch.cat([expected_gradient, torch.zeros(3, 4, dtype=torch.float64)], -1))


# Where one side alone excludes a token, these divergences are infinite by definition.
STUDENT_MUST_COVER = {"forward_kl", "symmetric_kl", "adaptive_kl", "soft_cross_entropy"}
TEACHER_MUST_COVER = {"reverse_kl", "symmetric_kl", "adaptive_kl"}


@every
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_that_one_side_excludes_gives_finite_values_and_gradients_unless_the_divergence_is_infinite(
    name, side
):
    student, teacher = random_logits(3, 9)
    excluded = (student if side == "student" else teacher).detach()
    excluded[:, 4] = -math.inf
    if name in (STUDENT_MUST_COVER if side == "student" else TEACHER_MUST_COVER):
        assert bound(name)(student, teacher).isposinf().all()
    else:
        assert bound(name)(student, teacher).isfinite().all()
        assert gradient(bound(name), student, teacher).isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_computed_in_fp32(name, dtype):
    student, teacher = (z.detach().to(dtype) for z in random_logits(6, 40))
    value = bound(name)(student, teacher, 2.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), bound(name)(student.double(), teacher.double(), 2.0), rtol=1e-5, atol=1e-6
    )


@every
def test_leading_dimensions_are_kept(name):
    student, teacher = random_logits(2, 3, 7)
    value = bound(name)(student, teacher)
    assert value.shape == (2, 3)
    torch.testing.assert_close(value[1, 2], bound(name)(student[1, 2], teacher[1, 2]))


@every
def test_unequal_vocabularies_raise(name):
    with pytest.raises(ValueError, match=r"min\(V_s, V_t\)"):
        bound(name)(torch.zeros(2, 5), torch.zeros(2, 6))


@every
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_raises(name, temperature):
    with pytest.raises(ValueError, match="temperature"):
        bound(name)(torch.zeros(2, 5), torch.zeros(2, 5), temperature)


@every
def test_only_total_variation_goes_without_the_squared_temperature(name):
    assert bound(name).scale(3.0) == (1.0 if name == "tvd" else 9.0)


@every
def test_every_row_of_the_registry_names_its_paper_in_the_docstring(name):
    assert DIVERGENCES[name].paper in DIVERGENCES[name].function.__doc__


def test_gradient_of_forward_kl_is_temperature_times_the_difference_of_probabilities():
    student, teacher = random_logits(3, 8)
    temperature, step = 2.5, 1e-6
    scaled = temperature**2
    expected = temperature * (torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1))
    torch.testing.assert_close(scaled * gradient(bound("forward_kl"), student, teacher, temperature), expected)
    bump = torch.zeros_like(student)
    bump[1, 3] = step
    with torch.no_grad():
        ends = [scaled * forward_kl(student + s * bump, teacher, temperature=temperature)[1] for s in (1, -1)]
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(expected[1, 3].item(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_with_swapped_sides_is_jsd_of_one_minus_beta(beta):
    student, teacher = random_logits(20, 7)
    torch.testing.assert_close(jsd(student, teacher, beta=beta), jsd(teacher, student, beta=1 - beta))


def test_jsd_is_at_most_ln_two():
    apart = torch.tensor([[40.0, 0.0], [0.0, 40.0]])
    assert jsd(apart, apart.flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    student, teacher = random_logits(200, 4)
    assert (jsd(3 * student, 3 * teacher) <= math.log(2)).all()


@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
def test_skew_divergences_are_at_most_minus_log_of_the_skew(name):
    student, teacher = random_logits(200, 4)
    for skew in (0.01, 0.1, 0.5):
        assert (resolve_divergence(name, {"skew": skew})(5 * student, 5 * teacher) <= -math.log(skew)).all()


def test_taid_at_the_end_is_forward_kl_in_value_and_gradient():
    student, teacher = random_logits(4, 9)
    end = resolve_divergence("taid", {"t": 1.0})
    torch.testing.assert_close(end(student, teacher, 2.0), forward_kl(student, teacher, temperature=2.0))
    torch.testing.assert_close(
        gradient(end, student, teacher, 2.0), gradient(bound("forward_kl"), student, teacher, 2.0)
    )


def test_taid_at_the_start_has_no_gradient():
    student, teacher = random_logits(4, 9)
    start = resolve_divergence("taid", {"t": 0.0})
    torch.testing.assert_close(gradient(start, student, teacher), torch.zeros_like(student))


def test_taid_interpolates_logits_and_stops_the_gradient_through_them():
    student, teacher = random_logits(4, 9)
    target = torch.softmax((0.7 * student.detach() + 0.3 * teacher) / 2, -1)
    actual = torch.autograd.grad(taid(student, teacher, temperature=2.0, t=0.3).sum(), student)[0]
    torch.testing.assert_close(actual, (torch.softmax(student / 2, -1) - target) / 2)


def test_taid_grows_with_t():
    student, teacher = random_logits(1, 9)
    values = [taid(student, teacher, t=t / 10).item() for t in range(11)]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_adaptive_kl_of_identical_logits_has_no_nan():
    student = torch.zeros(2, 6, requires_grad=True)
    value = adaptive_kl(student, torch.zeros(2, 6))
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert (student.grad == 0).all()


def test_adaptive_head_is_the_inclusive_cumulative_mass_in_sorted_order_and_always_the_top_token():
    teacher = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.05, 0.9, 0.05, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.3, 0.2, 0.1, 0.4], [0.25, 0.5, 0.25, 0.0]], dtype=torch.float64)
    # Row 0: sorted .4 .3 .2 .1, within 0.75 are .4 and .3 with gaps 0 and .1 of .4. Row 1: .9 alone, gap .4 of .8.
    head, tail = adaptive_weights(student, teacher, 0.75)
    assert head.tolist() == pytest.approx([0.25, 0.5])
    assert tail.tolist() == pytest.approx([0.75, 0.5])


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.97, 1.0])
def test_adaptive_head_found_by_growing_search_is_the_one_of_a_full_sort(mass):
    student, teacher = (torch.softmax(z.detach() / 3, -1) for z in random_logits(5, 700))
    order = teacher.argsort(-1, descending=True)
    in_head = teacher.gather(-1, order).cumsum(-1) <= mass
    in_head[:, 0] = True
    gap = (teacher - student).abs()
    expected = (gap.gather(-1, order) * in_head).sum(-1) / gap.sum(-1)
    torch.testing.assert_close(adaptive_weights(student, teacher, mass)[0], expected)


def test_adaptive_weights_carry_no_gradient():
    student, teacher = random_logits(3, 9)
    head, tail = adaptive_weights(torch.softmax(student, -1), torch.softmax(teacher, -1), 0.5)
    frozen = head * forward_kl(student, teacher) + tail * bound("reverse_kl")(student, teacher)
    expected = torch.autograd.grad(frozen.sum(), student)[0]
    torch.testing.assert_close(gradient(bound("adaptive_kl"), student, teacher), expected)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("forwrd_kl", {}, "Did you mean 'forward_kl'"),
        ("hinton", {}, "Known: adaptive_kl, forward_kl"),
        ("jsd", {"bta": 0.5}, "Did you mean 'beta'"),
        ("forward_kl", {"beta": 0.5}, "Known: none"),
        ("jsd", {"beta": 1.0}, r"`beta` of the divergence 'jsd' must be a number in \(0, 1\), got 1.0"),
        ("skew_kl", {"skew": -0.1}, r"in \[0, 1\)"),
        ("jsd", {"beta": "0.5"}, "must be a number"),
        ("jsd", {"beta": math.nan}, "must be a number"),
        ("taid", {}, "needs `t`"),
    ],
)
def test_names_and_arguments_that_make_no_sense_raise(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        resolve_divergence(name, kwargs)

"""What the fused loss leaves alone, what it reports, and what it refuses."""

import math
from functools import partial

import pytest
import torch

from hf_distill.functional import METRICS, LMHead, fused, linear_distillation_loss, resolve_divergence
from hf_distill.functional import tile as tile_module
from hf_distill.functional.dense_tile import first_max
from hf_distill.functional.fused import chunk_rows
from tests.functional.twins import SMALL, Case, assert_twins, every, module_of, of


@every
@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_what_stands_in_masked_rows_changes_nothing_bit_for_bit(name, plain):
    case = Case()
    heads = [case.head, case.teacher_head] if plain else [module_of(case.head), module_of(case.teacher_head)]
    results = []
    for filler in (0.0, math.nan):
        hidden, teacher_hidden = case.hidden.detach().clone(), case.teacher_hidden.clone()
        hidden[case.labels == -100] = teacher_hidden[case.labels == -100] = filler
        hidden.requires_grad_()
        out = linear_distillation_loss(
            hidden,
            heads[0],
            case.labels,
            teacher_hidden=teacher_hidden,
            teacher_head=heads[1],
            terms=of(name),
            chunk_bytes=SMALL,
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, [hidden, case.head.weight])))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert (results[0][1][case.labels == -100] == 0).all()


@every
def test_micro_batches_that_share_a_denominator_equal_one_batch(name):
    case = Case()
    denominator = int((case.labels != -100).sum())
    whole = case.fused(terms={"ce": 0.5, **of(name)}, denominator=denominator).loss
    expected = torch.autograd.grad(whole, case.leaves)
    total = 0.0
    for part in (slice(0, 20), slice(20, 100), slice(100, None)):
        out = linear_distillation_loss(
            case.hidden[part],
            case.head,
            case.labels[part],
            teacher_hidden=case.teacher_hidden[part],
            teacher_head=case.teacher_head,
            terms={"ce": 0.5, **of(name)},
            denominator=torch.tensor(denominator),
        )
        total = total + out.loss
    torch.testing.assert_close(total, whole)
    for ours, theirs in zip(torch.autograd.grad(total, case.leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@every
def test_identical_models_give_zero_and_no_gradient(name):
    case = Case(widths=(12, 12))
    out = case.fused(terms=of(name), teacher_hidden=case.hidden.detach(), teacher_head=case.head)
    if name != "soft_cross_entropy":  # its smallest value is the teacher's entropy
        assert out.loss.item() == pytest.approx(0, abs=1e-6)
    for grad in torch.autograd.grad(out.loss, case.leaves):
        assert grad.abs().max() < 1e-6


def test_nothing_flows_into_the_teacher():
    case = Case()
    case.teacher_hidden.requires_grad_()
    case.teacher_head.weight.requires_grad_()
    for head in (case.teacher_head, module_of(case.teacher_head)):
        case.fused(teacher_head=head).loss.backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_head.weight.grad is None


def test_rows_are_dropped_before_the_projection():
    case, seen = Case(masked=100), []

    def head(hidden):
        seen.append(hidden.shape[0])
        return case.head(hidden)

    with torch.no_grad():
        linear_distillation_loss(case.hidden, head, case.labels, terms={"ce": 1.0})
    assert sum(seen) == 51


def test_a_frozen_head_costs_no_weight_gradient():
    case = Case(frozen=True, bias=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        case.fused()
    assert case.head.weight.shape not in saved
    assert any(shape[1:] == case.hidden.shape[1:] for shape in saved if len(shape) == 2)


def test_backward_scales_by_the_incoming_gradient_each_time():
    case = Case()
    loss = case.fused().loss
    once = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, case.leaves, retain_graph=True)
    again = torch.autograd.grad(loss, case.leaves)
    for a, b, c in zip(once, thrice, again, strict=True):
        torch.testing.assert_close(3 * a, b)
        assert torch.equal(a, c)


def test_without_gradients_nothing_is_computed_for_them(monkeypatch):
    case = Case()
    expected = case.fused(metrics=METRICS)

    def fail(*_args, **_kwargs):
        pytest.fail("a gradient was started")

    monkeypatch.setattr(tile_module.TileLoss, "_start_pull", lambda *args: (None, 0.0) if not args[-1] else fail())
    with torch.no_grad():
        out = case.fused(metrics=METRICS)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss.detach())
    torch.testing.assert_close(out.metrics, expected.metrics)


@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_double_backward_raises(plain):
    case = Case()
    head = case.head if plain else module_of(case.head)
    loss = linear_distillation_loss(case.hidden, head, case.labels, terms={"ce": 1.0}).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
@pytest.mark.parametrize("denominator", [None, 7, torch.tensor(0)])
def test_a_batch_without_labels_gives_a_zero_that_reaches_hidden_states_and_head(plain, denominator):
    case = Case(bias=True)
    case.labels[:] = -100
    head = case.head if plain else module_of(case.head)
    out = linear_distillation_loss(
        case.hidden,
        head,
        case.labels,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_head,
        denominator=denominator,
        metrics=METRICS,
    )
    assert out.loss.item() == 0
    assert out.count.item() == 0
    assert set(out.metrics) == set(METRICS)
    assert all(value == 0 for value in (out.metrics | out.parts).values())
    for grad in torch.autograd.grad(out.loss, case.leaves):
        assert (grad == 0).all()


@pytest.mark.parametrize("vocabularies", [(53, 53), (61, 53), (53, 61)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("terms", [{"ce": 1.0}, {"forward_kl": 1.0}, {"ce": 0.5, "jsd": 0.5}])
def test_metrics_are_sums_at_temperature_one(vocabularies, temperature, terms):
    case = Case(vocabularies=vocabularies, bias=True, softcap=5.0)
    out = case.fused(terms=terms, temperature=temperature, metrics=METRICS)
    kept = case.labels != -100
    labels = case.labels[kept]
    student, teacher = case.head(case.hidden)[kept], case.teacher_head(case.teacher_hidden)[kept]
    shared = student[:, :53], teacher[:, :53]
    expected = {
        "student_nll": torch.nn.functional.cross_entropy(student, labels, reduction="sum"),
        "teacher_nll": torch.nn.functional.cross_entropy(teacher, labels, reduction="sum"),
        "top1_agreement": (shared[0].argmax(-1) == shared[1].argmax(-1)).sum().float(),
        "kl": resolve_divergence("forward_kl")(*shared).sum(),
        "student_entropy": torch.special.entr(student.softmax(-1)).sum(),
        "teacher_entropy": torch.special.entr(teacher.softmax(-1)).sum(),
    }
    torch.testing.assert_close(out.metrics, {name: value.detach() for name, value in expected.items()})
    assert out.count == kept.sum()
    for name in METRICS:  # each alone gives the same and leaves the loss alone
        alone = case.fused(terms=terms, temperature=temperature, metrics=(name,))
        torch.testing.assert_close(alone.metrics, {name: out.metrics[name]})
        torch.testing.assert_close(alone.loss, out.loss)
        grads = (torch.autograd.grad(o.loss, case.leaves, retain_graph=True) for o in (alone, out))
        torch.testing.assert_close(*grads)


def test_loss_is_the_weighted_parts_over_the_denominator():
    case = Case()
    out = case.fused(terms={"ce": 0.3, "tvd": 2.0, "reverse_kl": 0.0}, denominator=1000)
    assert out.loss.item() == pytest.approx((0.3 * out.parts["ce"] + 2 * out.parts["tvd"]).item() / 1000)
    assert out.parts["reverse_kl"] > 0


def test_a_term_of_weight_zero_is_reported_and_gives_no_gradient():
    case = Case()
    assert_twins(case, {"ce": 0.0, "jsd": 1.0, "tvd": 0.0}, temperature=2.0)
    assert_twins(case, {"ce": 1.0, "jsd": 0.0}, temperature=1.0)


@every
def test_token_weights_act_on_the_terms_and_their_sum_divides(name):
    case, weights = Case(), torch.rand(151, generator=torch.Generator().manual_seed(1))
    assert_twins(case, {"ce": 0.3, **of(name)}, token_weights=weights)
    assert_twins(case, {"ce": 0.3, **of(name)}, token_weights=weights, denominator=50)


def test_token_weights_carry_no_gradient_and_may_all_be_zero():
    case, weights = Case(), torch.zeros(151, requires_grad=True)
    loss = case.fused(token_weights=weights).loss
    assert loss.item() == 0
    loss.backward()
    assert weights.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": {"forwrd_kl": 1.0}}, "Did you mean 'forward_kl'"),
        ({"terms": {"ce": -0.1, "jsd": 1.0}}, "weight of the term 'ce' must be a finite number >= 0, got -0.1"),
        ({"terms": {"ce": math.nan}}, "weight of the term 'ce'"),
        ({"terms": {"ce": 0.0, "jsd": 0.0}}, "At least one term must have a positive weight"),
        ({"terms": {}}, "At least one term"),
        ({"terms": {"ce": (1.0, {"beta": 1})}}, "takes no keyword arguments"),
        ({"terms": {"jsd": (1.0, {"beta": 2})}}, r"`beta` .* in \(0, 1\)"),
        ({"temperature": 0.0}, "`temperature` must be a positive"),
        ({"metrics": ("kl", "top1_agrement")}, "Did you mean 'top1_agreement'"),
        ({"teacher_head": None}, "`teacher_head` is missing"),
        ({"teacher_hidden": None}, "`teacher_hidden` is missing"),
        ({"teacher_hidden": torch.zeros(3, 17)}, r"`teacher_hidden` must be \[151, H_t\], got \[3, 17\]"),
        ({"token_weights": torch.ones(3)}, r"`token_weights` must be \[151\]"),
        ({"token_weights": -torch.ones(151)}, "111 labelled tokens have a negative"),
        ({"denominator": -1}, "`denominator` must not be negative"),
        ({"denominator": torch.ones(2)}, "`denominator` must be one number"),
    ],
)
def test_arguments_that_make_no_sense_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case().fused(**arguments)


@pytest.mark.parametrize("label", [53, -1, 1000])
@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_labels_outside_the_vocabulary_raise(label, plain):
    case = Case()
    case.labels[7] = label
    with pytest.raises(ValueError, match=rf"1 labels lie outside the vocabulary \[0, 53\), the first being {label}"):
        linear_distillation_loss(
            case.hidden, case.head if plain else module_of(case.head), case.labels, terms={"ce": 1.0}
        )


def test_hidden_states_that_were_not_flattened_raise():
    with pytest.raises(ValueError, match="Shift and flatten first"):
        linear_distillation_loss(torch.zeros(2, 3, 4), LMHead(torch.zeros(5, 4)), torch.zeros(2, 3).long())


@pytest.mark.parametrize(
    ("weight", "rest", "message"),
    [
        (torch.zeros(5, 4, dtype=torch.uint8), {}, "callable"),
        (torch.zeros(5), {}, r"\[V, H\]"),
        (torch.zeros(5, 4), {"bias": torch.zeros(4)}, r"`bias` must be \[5\]"),
        (torch.zeros(5, 4), {"softcap": 0.0}, "`softcap` must be positive"),
    ],
)
def test_heads_that_make_no_sense_raise(weight, rest, message):
    with pytest.raises(ValueError, match=message):
        LMHead(weight, **rest)


def test_chunks_follow_the_budget_between_128_and_1024_rows_and_are_even():
    trained, frozen = partial(chunk_rows, trained_head=True), partial(chunk_rows, trained_head=False)
    row = 2 * 49152 * 2
    assert trained(4096, row, None) == 1024
    assert trained(4096, 2 * 128256 * 4, None) == math.ceil(4096 / math.ceil(4096 / 261))
    assert trained(1030, row, None) == 515
    assert trained(5, row, None) == 5
    assert trained(0, row, None) == 1
    assert frozen(4096, row, None) == 512
    assert trained(256, row, 1) == frozen(256, row, 1) == 128


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_is_not_trained_gets_thinner_chunks(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(fused, "chunk_rows", lambda *args, trained_head: seen.append(trained_head) or 3)
    head = LMHead(torch.randn(7, 4, requires_grad=trained))
    hidden, labels = torch.randn(5, 4, requires_grad=True), torch.arange(5)
    linear_distillation_loss(hidden, head, labels, terms={"ce": 1.0})
    with torch.no_grad():
        linear_distillation_loss(hidden, head, labels, terms={"ce": 1.0})
    assert seen == [trained, False]


@pytest.mark.parametrize("width", [7, 256, 512, 700])
def test_the_greatest_by_blocks_is_the_first_of_the_greatest(width):
    values = torch.randint(0, 9, (40, width), generator=torch.Generator().manual_seed(0)).float()
    values[3:] = values[3:, :1]  # a constant row: the first column
    values[5, -1] = 100
    best, index = first_max(values)
    assert index.squeeze(1).tolist() == values.argmax(-1).tolist()
    assert torch.equal(best, values.amax(-1, keepdim=True))


@pytest.mark.parametrize(
    ("student_extra", "temperature"), [(0.0, 0.05), (300.0, 2.0)], ids=["low temperature", "more than is shared"]
)
def test_no_softmax_overflows_or_vanishes(student_extra, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.rand(6, 1, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    # 500 nearly equal columns: log-probabilities near -6. The student may have two more, which outweigh them.
    weight, teacher_weight = (torch.rand(500, 1, generator=generator) * 0.1 for _ in range(2))
    bias = torch.cat([torch.zeros(500), torch.full((2,), student_extra)])
    head = LMHead(torch.cat([weight, torch.zeros(2, 1)]), bias) if student_extra else LMHead(weight)
    labels = torch.arange(6)

    def loss(dtype):
        def cast(head):
            return LMHead(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))

        return linear_distillation_loss(
            hidden.to(dtype),
            cast(head),
            labels,
            teacher_hidden=teacher_hidden.to(dtype),
            teacher_head=cast(LMHead(teacher_weight)),
            temperature=temperature,
            metrics=METRICS,
        )

    out, exact = loss(torch.float32), loss(torch.float64)
    (gradient,), (exact_gradient,) = (torch.autograd.grad(each.loss, hidden) for each in (out, exact))
    torch.testing.assert_close(out.parts["forward_kl"].double(), exact.parts["forward_kl"], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(out.metrics["kl"].double(), exact.metrics["kl"], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-2, atol=1e-5)


def test_logits_that_belong_to_a_model_are_left_as_they_are():
    logits, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    before = logits.detach().clone(), teacher.clone()
    out = linear_distillation_loss(
        logits,
        lambda rows: rows,
        torch.arange(5),
        teacher_hidden=teacher,
        teacher_head=lambda rows: rows,
        metrics=METRICS,
    )
    out.loss.backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(teacher, before[1])

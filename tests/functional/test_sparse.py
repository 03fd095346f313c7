"""Sparse targets in the fused loss: against their naive twin and against the whole teacher."""

import math
from dataclasses import replace

import pytest
import torch

from hf_distill.functional import METRICS, LMHead, linear_distillation_loss, resolve_divergence
from hf_distill.functional import tile as tile_module
from tests.functional.sparse_twins import COARSE, SAMPLED, TEMPERATURES, draws, gradients, sampled, targets_at, top
from tests.functional.twins import HEADS, Case, assert_twins, module_of, naive


coarse = pytest.mark.parametrize("name", COARSE)
temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
plain = pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])


@coarse
@temperatures
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_bucket_equals_its_twin_with_and_without_cross_entropy(name, temperature, frozen):
    case = Case(dtype=torch.float64, frozen=frozen)
    arguments = {"teacher_targets": top(case, 9, holes=True), "temperature": temperature, "rtol": 1e-9, "atol": 1e-11}
    assert_twins(case, {name: 0.7}, **arguments)
    assert_twins(case, {"ce": 0.3, name: 0.7}, **arguments)


@pytest.mark.parametrize("exact", [0, 4])
@pytest.mark.parametrize("name", SAMPLED)
@temperatures
def test_sampled_masses_equal_their_twin_with_and_without_cross_entropy(name, temperature, exact):
    case = Case(dtype=torch.float64)
    targets = draws(case, exact=exact)
    arguments = {"teacher_targets": targets, "temperature": temperature, "rtol": 1e-9, "atol": 1e-11}
    assert_twins(case, {name: 0.7}, **arguments)
    assert_twins(case, {"ce": 0.3, name: 0.7}, **arguments)


@heads
@temperatures
def test_all_terms_together_equal_their_twin_for_every_head(head, temperature):
    case = Case(dtype=torch.float64, **head)
    weights = torch.rand(151, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = {"ce": 0.3} | {name: 0.1 + 0.05 * i for i, name in enumerate(COARSE)}
    for targets in (top(case, 9, holes=True), draws(case, exact=4)):
        arguments = {"teacher_targets": targets, "temperature": temperature, "token_weights": weights}
        assert_twins(case, terms, **arguments, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("jsd", {"beta": 0.9}), ("skew_kl", {"skew": 0.8}), ("skew_reverse_kl", {"skew": 0.6})],
)
def test_keyword_arguments_reach_the_closed_form(name, kwargs):
    case = Case()
    assert_twins(case, {name: (0.5, kwargs)}, teacher_targets=top(case, 9))


@coarse
@temperatures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["top", "sampled"])
def test_lower_precision_is_within_rounding_of_a_float64_reference(name, temperature, dtype, kind):
    case = Case(tokens=60, masked=10).to(dtype)
    reference = case.to(torch.float64)
    targets = top(reference, 9, holes=True) if kind == "top" else draws(reference, exact=4)
    terms = {"ce": 0.5, name: 0.5}
    expected = naive(reference, terms, temperature, teacher_targets=targets)[0]
    low = targets.to(torch.empty(0, dtype=torch.float32))
    actual = case.fused(terms=terms, temperature=temperature, teacher_targets=low).loss
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert actual.item() == pytest.approx(expected.item(), rel=tolerance)
    both = torch.autograd.grad(actual, case.leaves), torch.autograd.grad(expected, reference.leaves)
    for ours, exact in zip(*both, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() < 2 * tolerance * exact.norm()


@coarse
@temperatures
@pytest.mark.parametrize("vocabularies", [(53, 53), (53, 61), (61, 53)])
@pytest.mark.parametrize("rests", [True, False])
def test_ids_for_the_whole_vocabulary_equal_the_teacher_itself(name, temperature, vocabularies, rests):
    case = Case(vocabularies=vocabularies)
    shuffled = torch.stack([torch.randperm(vocabularies[1]) for _ in range(151)])
    logits = case.teacher_head(case.teacher_hidden)
    targets = targets_at(shuffled, logits, case.labels, rests=rests, dtype=torch.float32)
    metrics = ("kl", "top1_agreement", "teacher_nll", "teacher_entropy")
    arguments = {"terms": {"ce": 0.3, name: 0.7}, "temperature": temperature, "metrics": metrics}
    sparse, dense = case.fused(teacher_targets=targets, **arguments), case.fused(**arguments)
    torch.testing.assert_close(sparse.loss, dense.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse.metrics, dense.metrics, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients(sparse, case), gradients(dense, case), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@coarse
@temperatures
def test_the_bucket_is_never_above_the_whole_and_grows_with_the_ids(name, temperature):
    case = Case(tokens=8, masked=0, dtype=torch.float64)

    def value(row, targets):
        part, arguments = slice(row, row + 1), {"terms": {name: 1.0}, "temperature": temperature}
        targets = targets.at(part)
        out = linear_distillation_loss(
            case.hidden[part], case.head, case.labels[part], teacher_targets=targets, **arguments
        )
        return out.loss.detach()

    rows = [
        torch.stack([value(row, targets) for row in range(8)])
        for targets in (top(case, k) for k in (1, 3, 10, 52, 53))
    ]
    logits = case.teacher_head(case.teacher_hidden)
    bound = resolve_divergence(name)
    full = bound(case.head(case.hidden), logits, temperature).detach() * bound.scale(temperature)
    values = torch.stack([*rows, full])
    assert (values.diff(dim=0) > -1e-9).all()
    torch.testing.assert_close(values[-2], full)
    assert (values[0] < full - 1e-6).any()


@coarse
@temperatures
@pytest.mark.parametrize("head", [{}, {"vocabularies": (61, 53)}], ids=["plain", "wider student"])
@pytest.mark.parametrize("rests", [True, False])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name, temperature, head, rests):
    case = Case(widths=(12, 12), **head)
    width = min(head.get("vocabularies", (53, 53)))
    targets = targets_at(
        case.head(case.hidden)[:, :width].topk(8).indices,
        case.head(case.hidden)[:, :width],
        case.labels,
        rests=rests,
        dtype=torch.float32,
    )
    out = case.fused(terms={name: 1.0}, temperature=temperature, teacher_targets=targets, metrics=("kl",))
    if name != "soft_cross_entropy":
        assert out.loss.item() == pytest.approx(0, abs=1e-6)
    assert out.metrics["kl"].item() / 111 == pytest.approx(0, abs=1e-6)
    if name != "tvd":  # |p - q| has a corner there, so that rounding decides
        assert all(grad.abs().max() < 1e-6 for grad in gradients(out, case))


@pytest.mark.parametrize("exact", [0, 6])
@temperatures
def test_sampled_masses_are_the_whole_teacher_on_average_in_gradient_and_value(temperature, exact, monkeypatch):
    monkeypatch.setattr(tile_module, "_CPU_BLOCK", 2**18)
    groups, repeats, rows, vocabulary = 40, 100, 3, 23
    student, teacher = (
        torch.randn(rows, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    head = LMHead(torch.eye(vocabulary, dtype=torch.float64))

    def run(times, **arguments):
        hidden = student.repeat(times, 1).requires_grad_()
        labels = torch.zeros(len(hidden), dtype=torch.int64)
        arguments = {"terms": {"forward_kl": 1.0}, "temperature": temperature, "denominator": times} | arguments
        out = linear_distillation_loss(hidden, head, labels, **arguments)
        gradient = torch.autograd.grad(out.loss, hidden)[0]
        return torch.cat([gradient.view(times, -1).sum(0), out.loss.detach()[None]])

    wanted = run(1, teacher_hidden=teacher, teacher_head=head)
    times = groups * repeats
    targets = sampled(teacher.repeat(times, 1), torch.zeros(times * rows).long(), exact=exact, draws=20)
    parts = torch.arange(times * rows).view(groups, -1)
    found = torch.stack([run(repeats, teacher_targets=targets.at(part)) for part in parts])
    # One column tells the value, one the gradient along that of the whole teacher, the others its elements.
    found, wanted = (torch.cat([x, x[..., :-1] @ wanted[:-1, None]], -1) for x in (found, wanted))
    scores = (found.mean(0) - wanted).abs() / (found.std(0) / groups**0.5).clamp(min=1e-12)
    assert (scores[-2:] < 3).all()
    assert (scores < 3).double().mean() > 0.97
    # Means of top-k masses would not pass.
    ids = teacher.topk(12).indices
    masses = torch.softmax(teacher, -1).gather(1, ids)
    biased = targets_at(ids, teacher, torch.zeros(rows).long(), masses=masses / masses.sum(1, keepdim=True))
    off = run(1, teacher_targets=biased)
    assert ((off - wanted[:-1]).abs() / (found.std(0)[:-1] / groups**0.5)).max() > 10


@plain
def test_what_stands_in_masked_rows_and_in_unused_slots_changes_nothing_bit_for_bit(plain):
    case = Case()
    masked, terms = case.labels == -100, {"ce": 0.3, "jsd": 0.4, "forward_kl": 0.3}
    head = case.head if plain else module_of(case.head)
    for targets in (top(case, 9, holes=True), draws(case, exact=4)):
        results = []
        for filler, strange in ((0.0, 0), (math.nan, -1), (math.nan, 10**6)):
            floats = {
                name: getattr(targets, name).clone()
                for name in ("log_probs", "masses", "label_log_probs")
                if getattr(targets, name) is not None
            }
            for values in floats.values():
                values[masked] = filler
            ids = targets.ids.where(targets.known, strange)
            ids[masked] = strange
            other = replace(targets, ids=ids, labels=targets.labels.masked_fill(masked, 7), **floats)
            out = linear_distillation_loss(
                case.hidden, head, case.labels, teacher_targets=other, terms=terms, metrics=("kl", "teacher_nll")
            )
            results.append((out.loss, *out.metrics.values(), *gradients(out, case)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["top", "sampled"])
def test_heads_that_are_not_plain_give_the_same(kind):
    case = Case(bias=True, softcap=5.0, vocabularies=(61, 53))
    targets = top(case, 9) if kind == "top" else draws(case, exact=4)
    arguments = {
        "terms": {"ce": 0.3, "jsd": 0.4, "forward_kl": 0.3},
        "token_weights": torch.rand(151),
        "metrics": ("student_nll", "student_entropy", *targets.available_metrics),
        "teacher_targets": targets,
        "chunk_bytes": 1,
    }
    expected = case.fused(**arguments)
    out = linear_distillation_loss(case.hidden, module_of(case.head), case.labels, **arguments)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.parts, expected.parts)
    torch.testing.assert_close(out.metrics, expected.metrics)
    for ours, theirs in zip(gradients(out, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        quiet = case.fused(**arguments)
    torch.testing.assert_close(quiet.loss, expected.loss.detach())
    torch.testing.assert_close(quiet.metrics, expected.metrics)


def test_metrics_come_from_the_targets_at_temperature_one():
    case = Case()
    kept = case.labels != -100
    targets, logits = top(case, 9, holes=True), case.teacher_head(case.teacher_hidden)[kept]
    out = case.fused(terms={"jsd": 1.0}, temperature=2.0, teacher_targets=targets, metrics=METRICS)
    dense = case.fused(terms={"jsd": 1.0}, temperature=2.0, metrics=METRICS)
    for name in ("student_nll", "student_entropy", "teacher_nll", "teacher_entropy", "top1_agreement"):
        torch.testing.assert_close(out.metrics[name], dense.metrics[name])
    assert 0 < out.metrics["top1_agreement"] < kept.sum()
    assert 0 < out.metrics["kl"] < dense.metrics["kl"]
    kl = naive(case, {"forward_kl": 1.0}, 1.0, teacher_targets=targets)[1]["forward_kl"]
    torch.testing.assert_close(out.metrics["kl"], kl.detach())
    masses = draws(case)
    estimate = case.fused(terms={"ce": 1.0}, teacher_targets=masses, metrics=("kl",)).metrics["kl"]
    expected = naive(case, {"forward_kl": 1.0}, 1.0, teacher_targets=masses)[1]["forward_kl"]
    torch.testing.assert_close(estimate, expected.detach())
    assert logits.shape[0] == out.count


@coarse
def test_a_student_that_is_sure_leaves_the_bucket_with_the_right_share_of_next_to_nothing(name):
    hidden = torch.zeros(1, 40)
    hidden[0, :3] = torch.tensor([20.0, 19.0, 18.0])  # 2e-8 for the other 37 together
    hidden[0, 3:] = torch.linspace(-1, 1, 37)
    teacher = torch.zeros(1, 40, dtype=torch.float64)
    teacher[0, :3] = 3.0
    results = []
    for dtype in (torch.float64, torch.float32):
        targets = targets_at(torch.arange(3)[None], teacher, torch.zeros(1, dtype=torch.int64), dtype=dtype)
        leaf = hidden.to(dtype).requires_grad_()
        arguments = {"terms": {name: 1.0}, "temperature": 1.0, "teacher_targets": targets}
        out = linear_distillation_loss(leaf, LMHead(torch.eye(40, dtype=dtype)), torch.zeros(1).long(), **arguments)
        results.append((out.loss.double(), torch.autograd.grad(out.loss, leaf)[0].double()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    exact, ours = (result[1][0] for result in results)
    torch.testing.assert_close(ours[3:], exact[3:], rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(ours[:3], exact[:3], rtol=1e-4, atol=1e-6)


@coarse
@pytest.mark.parametrize("gap", [30.0, 1e4])
@pytest.mark.parametrize("surplus", [0.0, 0.02])
def test_extreme_rows_stay_finite(name, gap, surplus):
    case = Case(tokens=14, masked=0)
    with torch.no_grad():
        case.hidden *= gap
    targets = top(case, 9, rests=False)
    p = targets.log_probs.exp()
    targets = replace(targets, log_probs=(p / p.sum(1, keepdim=True) * (1 + surplus)).log())  # nothing left for others
    for temperature in TEMPERATURES:
        out = case.fused(terms={"ce": 0.5, name: 0.5}, temperature=temperature, teacher_targets=targets)
        assert out.loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(out, case))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_kl", "tvd"])
def test_probabilities_that_add_up_to_more_than_one_are_scaled_down(name):
    case = Case(tokens=30, masked=0)
    exact = top(case, 9, rests=False)
    p = exact.log_probs.exp()
    whole = replace(exact, log_probs=(p / p.sum(1, keepdim=True)).log())
    more = replace(exact, log_probs=whole.log_probs + 0.02)
    one, other = (case.fused(terms={name: 1.0}, temperature=1.0, teacher_targets=t) for t in (whole, more))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=1e-6)


def test_ids_that_the_student_has_no_logits_for_leave_the_rest_of_the_teacher_scaled_up():
    case = Case(dtype=torch.float64, vocabularies=(53, 61))
    logits = case.teacher_head(case.teacher_hidden)
    every = torch.arange(61).expand(151, -1)
    for rests in (True, False):
        targets = targets_at(every[:, 30:], logits, case.labels, rests=rests)
        without = targets_at(every[:, 30:53], logits[:, :53], case.labels)
        ours, theirs = (case.fused(terms={"jsd": 1.0}, teacher_targets=t, temperature=1.0) for t in (targets, without))
        torch.testing.assert_close(ours.loss, theirs.loss)
    nothing = targets_at(every[:, 53:], logits, case.labels)
    out = case.fused(terms={"reverse_kl": 1.0}, teacher_targets=nothing, temperature=1.0)
    assert out.loss.item() == pytest.approx(0, abs=1e-12)  # all that is known is out of sight


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    case = Case()
    for targets in (top(case, 9, holes=True), draws(case, exact=4)):
        terms = {"ce": 0.3} | dict.fromkeys(COARSE, 0.1)
        there = case.to(torch.float32, "cuda")
        ours = there.fused(terms=terms, teacher_targets=targets.to(there.hidden), metrics=("kl", "teacher_nll"))
        theirs = case.fused(terms=terms, teacher_targets=targets, metrics=("kl", "teacher_nll"))
        torch.testing.assert_close(ours.loss.cpu(), theirs.loss, rtol=1e-4, atol=1e-6)
        for name, value in ours.metrics.items():
            torch.testing.assert_close(value.cpu(), theirs.metrics[name], rtol=1e-4, atol=1e-6)
        for one, other in zip(gradients(ours, there), gradients(theirs, case), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)

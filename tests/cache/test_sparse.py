import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_distill.cache.registry import make_encoding
from hf_distill.functional.registry import DIVERGENCES
from hf_distill.signals import Projection, identity
from tests.cache.encodings import (
    TEMPERATURES,
    VOCAB,
    labels_of,
    log_probs_at,
    loss,
    observed,
    stored,
    teacher,
)


COARSE = sorted(name for name, row in DIVERGENCES.items() if not row.whole_vocabulary)
temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


@temperatures
@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("k", [1, 30, VOCAB])
def test_a_student_equal_to_the_teacher_is_on_the_floor_of_quantisation(k, bits, temperature):
    output = teacher(200)
    targets = stored("topk", output, temperatures=TEMPERATURES, k=k, bits=bits)
    value, gradient = loss(output, labels_of(output), targets, temperature)
    assert -1e-6 < value < {6: 5e-3, 8: 3e-4}[bits] * temperature**2
    _, away = loss(teacher(200, seed=5), labels_of(output), targets, temperature)
    assert gradient.norm() < {6: 0.05, 8: 0.015}[bits] * away.norm()


@temperatures
@pytest.mark.parametrize("name", COARSE)
def test_the_bucket_is_below_the_whole_and_equals_it_where_all_ids_are_kept(name, temperature):
    output, student = teacher(60), teacher(60, seed=5)
    labels = labels_of(output)
    whole, gradient = loss(student, labels, output, temperature, name)
    for k in (1, 20, 100):
        targets = stored("topk", output, temperatures=TEMPERATURES, k=k, bits=10)
        assert loss(student, labels, targets, temperature, name)[0] < whole * 1.001
    targets = stored("topk", output, temperatures=TEMPERATURES, k=VOCAB, bits=10)
    value, found = loss(student, labels, targets, temperature, name)
    assert value == pytest.approx(whole, rel=2e-3)
    assert (found - gradient).norm() < 0.03 * gradient.norm()


@temperatures
def test_ids_and_rest_add_up_to_one_and_every_number_is_near_the_exact_one(temperature):
    output = teacher(200)
    targets = stored("topk", output, temperatures=TEMPERATURES, k=30, bits=8)
    exact = log_probs_at(output, temperature)
    log_probs = targets.log_probs_at(temperature).double()
    inside = exact.gather(1, targets.ids)
    spread = inside.amax(1) - inside.amin(1)
    assert torch.allclose(log_probs, inside, rtol=0, atol=(spread.max() / 255 * 0.75).item())
    masses = log_probs.exp().sum(1) + targets.log_rest_at(temperature).double().exp()
    assert torch.allclose(masses, torch.ones_like(masses), atol=1e-5)
    rest = exact.scatter(1, targets.ids, -math.inf).logsumexp(1)
    assert torch.allclose(targets.log_rest_at(temperature).double(), rest, rtol=6e-4)
    at_one = log_probs_at(output)
    assert torch.allclose(targets.entropy_at(1.0).double(), -(at_one.exp() * at_one).sum(1), rtol=6e-4)
    label = at_one.gather(1, labels_of(output)[:, None])[:, 0]
    assert torch.allclose(targets.label_log_probs.double(), label, rtol=6e-4)
    assert targets.vocab_size == VOCAB


def test_the_ids_are_the_most_likely_ones_and_so_tell_the_top():
    output = teacher(200)
    targets = stored("topk", output, k=9)
    expected = log_probs_at(output).topk(9).indices
    assert torch.equal(targets.ids.sort(1).values, expected.sort(1).values)
    assert "top1_agreement" in targets.available_metrics


def test_a_sure_teacher_is_read_as_sure_as_it_was():
    logits = torch.zeros(3, VOCAB)
    logits[:, 5] = torch.tensor([15.0, 30.0, 90.0])
    output = Projection(logits, identity)
    targets = stored("topk", output, temperatures=TEMPERATURES, k=4)
    for temperature in TEMPERATURES:
        exact = log_probs_at(output, temperature)
        rest = exact.scatter(1, targets.ids, -math.inf).logsumexp(1)
        rest = rest.clamp(min=math.log(torch.finfo(torch.float32).tiny))
        assert torch.allclose(targets.log_rest_at(temperature).double(), rest, rtol=6e-4)


def test_impossible_tokens_are_not_kept():
    logits = torch.full((4, VOCAB), -torch.inf)
    logits[:, [3, 90]] = torch.randn(4, 2)
    output = Projection(logits, identity)
    targets = stored("topk", output, temperatures=TEMPERATURES, k=6)
    assert targets.known.sum(1).tolist() == [2] * 4
    assert (targets.log_rests[2.0] < -80).all()
    assert loss(output, torch.full((4,), 3), replace(targets, labels=torch.full((4,), 3)), 2.0)[0] == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize("name", ["topk", "sampled", "topk_tail"])
def test_any_tokens_are_read_as_they_are_among_all(name):
    output = teacher(300)
    encoding, columns = observed(name, output, **({} if name == "sampled" else {"k": 9}))
    read = encoding.open(encoding.pack(columns))
    whole = read(np.arange(300))
    for numbers in (
        np.random.default_rng(0).permutation(300),
        np.array([299, 7, 7]),
        np.arange(64, 200),
        np.arange(0),
    ):
        some = read(numbers)
        assert some.keys() == whole.keys()
        for key, column in some.items():
            assert torch.equal(column, whole[key][torch.from_numpy(numbers)])
        assert len(encoding.targets(some, torch.zeros(len(numbers), dtype=torch.int64))) == len(numbers)


@pytest.mark.parametrize("name", ["topk", "sampled", "topk_tail", "dense", "hidden"])
def test_columns_do_not_depend_on_batches_and_give_the_same_bytes(name):
    output = teacher(90)
    uniforms = torch.rand(90, dtype=torch.float64)
    options = {"dtype": "float32"} if name == "hidden" else {}
    encoding, columns = observed(name, output, uniforms, **options)
    labels = labels_of(output)
    cuts = (slice(0, 1), slice(1, 50), slice(50, 50), slice(50, 90))
    pieces = [
        encoding.observe(Projection(output.hidden[cut], output.head), labels[cut], uniforms[cut]) for cut in cuts
    ]
    joined = {key: torch.cat([piece[key] for piece in pieces]) for key in columns}
    for key, column in columns.items():
        assert joined[key].dtype == column.dtype
        if "ids" in key:  # in no order
            assert torch.equal(joined[key].sort(1).values, column.sort(1).values)
        elif not column.is_floating_point():
            assert name == "hidden" or torch.equal(joined[key], column)
        else:
            assert torch.allclose(joined[key].sort(-1).values, column.sort(-1).values, atol=1e-5)
    for key, array in encoding.pack(columns).items():
        np.testing.assert_array_equal(encoding.pack({name: c.clone() for name, c in columns.items()})[key], array)


@pytest.mark.parametrize("name", ["topk", "sampled", "topk_tail"])
def test_columns_of_several_shards_can_be_put_side_by_side(name):
    first, second = teacher(40), teacher(25, seed=9)
    read = []
    for output in (first, second):
        encoding, columns = observed(name, output)
        read.append(encoding.open(encoding.pack(columns))(np.arange(len(output.hidden))))
    joined = {key: torch.cat([columns[key] for columns in read]) for key in read[0]}
    targets = encoding.targets(joined, torch.cat([labels_of(first), labels_of(second)]))
    both = Projection(torch.cat([first.hidden, second.hidden]), identity)
    assert len(targets) == len(both.hidden)
    assert torch.equal(targets.label_log_probs[40:], encoding.targets(read[1], labels_of(second)).label_log_probs)


def test_a_teacher_with_another_vocabulary_is_refused():
    output = teacher(3)
    encoding = make_encoding("topk", vocab_size=50)
    with pytest.raises(ValueError, match=f"`output` has {VOCAB} logits.*vocab_size=50; make it with vocab_size=203"):
        encoding.observe(output, labels_of(output), None)


def test_the_products_of_a_head_in_bfloat16_are_finished_in_single_precision():
    output = teacher(50, dtype=torch.bfloat16)
    exact = torch.log_softmax((output.hidden @ output.head.weight.t()).double(), 1)
    _, columns = observed("topk", output, k=20)
    found = columns["log_probs"].double()
    assert torch.allclose(found, exact.gather(1, columns["ids"].long()), atol=1e-5)

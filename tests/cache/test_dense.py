import numpy as np
import pytest
import torch

from hf_distill.cache.registry import make_encoding
from hf_distill.functional import DIVERGENCES, LMHead
from hf_distill.signals import Projection
from tests.cache.encodings import TEMPERATURES, VOCAB, labels_of, loss, observed, stored, teacher


EXACT = {
    "dense": ("dense", {}, torch.float32),
    "hidden in float32": ("hidden", {"dtype": "float32"}, torch.float32),
    "hidden in bfloat16": ("hidden", {}, torch.bfloat16),
}


@pytest.mark.parametrize(("name", "options", "dtype"), EXACT.values(), ids=EXACT)
def test_a_student_equal_to_the_teacher_loses_nothing_and_has_no_gradient(name, options, dtype):
    output = teacher(60, dtype=dtype)
    targets = stored(name, output, **options)
    for temperature in TEMPERATURES:
        value, gradient = loss(output, labels_of(output), targets, temperature)
        assert abs(value) < 1e-6
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("name", "options", "dtype"), EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("term", sorted(DIVERGENCES.keys() - {"taid"}))
def test_every_divergence_is_that_of_the_teacher_itself(name, options, dtype, term):
    output, student = teacher(60, dtype=dtype), teacher(60, seed=5, dtype=dtype)
    for temperature in TEMPERATURES:
        expected, gradient = loss(student, labels_of(output), output, temperature, term)
        value, found = loss(student, labels_of(output), stored(name, output, **options), temperature, term)
        assert value == pytest.approx(expected, rel=1e-5)
        assert torch.allclose(found, gradient, atol=1e-5 if dtype == torch.float32 else 1e-2 * gradient.abs().max())


@pytest.mark.parametrize(("name", "dtype", "most"), [("dense", "float16", 1e-5), ("hidden", "float8_e4m3", 2e-2)])
def test_fewer_bits_come_near(name, dtype, most):
    output = teacher(60)
    value, _ = loss(output, labels_of(output), stored(name, output, dtype=dtype))
    assert 0 < value < most


def test_a_token_of_large_or_no_activations_has_its_own_scale():
    output = teacher(4)
    output.hidden[0] *= 1e6
    output.hidden[1] = 0.0
    targets = stored("hidden", output, dtype="float8_e4m3")
    assert torch.allclose(targets.hidden, output.hidden, rtol=0.07, atol=1e-2)
    assert targets.hidden.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"bias": torch.ones(VOCAB)}, {"scale": 0.5, "softcap": 3.0}])
def test_the_head_is_kept_as_it_is(options):
    output = teacher(4)
    output = Projection(output.hidden, LMHead(output.head.weight, **options))
    targets = stored("hidden", output, dtype="float32")
    assert torch.equal(targets.head(targets.hidden), output.head(output.hidden))
    assert (targets.head.scale, targets.head.softcap) == (output.head.scale, output.head.softcap)


def test_a_head_that_is_not_plain_is_refused_with_an_encoding_that_can():
    output = Projection(torch.randn(3, 4), torch.nn.Linear(4, VOCAB))
    encoding = make_encoding("hidden", vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"a Linear, is not a plain linear one; .*'topk'"):
        encoding.shared_tensors(output)


@pytest.mark.parametrize("name", ["dense", "hidden"])
def test_any_tokens_are_read_as_they_are_among_all(name):
    encoding, columns = observed(name, teacher(30))
    read = encoding.open(encoding.pack(columns))
    numbers = np.array([29, 3, 3, 0])
    for key, column in read(numbers).items():
        assert torch.equal(column, columns[key][torch.from_numpy(numbers)])

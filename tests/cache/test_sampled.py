import math

import numpy as np
import pytest
import torch

from hf_distill.cache.registry import make_encoding
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
    uniforms_of,
)


ENCODINGS = {
    "sampled": ("sampled", {"draws": 20}, (1.0,)),
    "tail": ("topk_tail", {"k": 5, "draws": 6, "bits": 9}, (1.0,)),
    "tail at some temperatures": ("topk_tail", {"k": 5, "draws": 6, "bits": 9}, TEMPERATURES),
}
CASES = [(*case, temperature) for case in ENCODINGS.values() for temperature in case[2]]


@pytest.mark.parametrize(("name", "options", "declared", "temperature"), CASES)
def test_the_gradient_is_that_of_the_whole_distribution_on_average(name, options, declared, temperature):
    output, student = teacher(12), teacher(12, seed=5)
    labels = labels_of(output)
    _, whole = loss(student, labels, output, temperature)
    gradients = []
    for seed in range(200):
        targets = stored(name, output, uniforms_of(output, seed), declared, **options)
        gradients.append(loss(student, labels, targets, temperature)[1])
    gradients = torch.stack(gradients).double()
    error = gradients.std(0) / math.sqrt(len(gradients))
    # Of 192 numbers some are beyond three of their own standard errors; their mean square is not beyond 1.
    scores = (gradients.mean(0) - whole.double()) / error
    assert scores.square().mean().sqrt() < 1.25
    assert scores.abs().max() < 5


@pytest.mark.parametrize(("name", "options", "declared", "temperature"), CASES)
def test_the_mean_mass_over_all_uniforms_is_the_probability(name, options, declared, temperature):
    steps = 2000
    output = teacher(1)
    repeated = Projection(output.hidden.expand(steps, -1), output.head)
    uniforms = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    targets = stored(name, repeated, uniforms, declared, **options)
    masses = targets.masses_at(temperature).double().where(targets.known, 0.0)
    mean = torch.zeros(VOCAB, dtype=torch.float64)
    mean.index_add_(0, targets.ids.clamp(min=0).flatten(), masses.flatten() / steps)
    assert torch.allclose(mean, log_probs_at(output, temperature)[0].exp(), rtol=0.012, atol=1e-3)


def test_counts_are_within_one_of_their_mean():
    output = teacher(100)
    targets = stored("sampled", output, draws=30)
    counts = torch.zeros(100, VOCAB, dtype=torch.float64).scatter_add_(
        1, targets.ids.clamp(min=0), targets.masses.double() * 30
    )
    assert ((counts - 30 * log_probs_at(output).exp()).abs() < 1 + 1e-3).all()
    assert torch.allclose(targets.masses.sum(1), torch.ones(100))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_head_is_exact_and_apart_from_the_tail(temperature):
    output = teacher(100)
    targets = stored("topk_tail", output, temperatures=TEMPERATURES, k=7, draws=9, bits=9)
    exact = log_probs_at(output, temperature)
    top = log_probs_at(output).topk(7).indices
    known, head = targets.known, (targets.ids[:, :, None] == top[:, None]).any(2)
    assert (head.sum(1) == 7).all()
    inside = exact.gather(1, targets.ids.clamp(min=0))
    assert torch.allclose(targets.log_probs_at(temperature).double()[known], inside[known], atol=0.05)
    assert torch.allclose(targets.masses_at(temperature).double()[head], inside[head].exp(), rtol=0.05)
    entropy = -(exact.exp() * exact).sum(1)
    assert torch.allclose(targets.entropy_at(temperature).double(), entropy, rtol=6e-4, atol=1e-5)


def test_masses_of_one_temperature_add_up_to_one():
    targets = stored("topk_tail", teacher(100), k=7, draws=9)
    assert torch.allclose(targets.masses.sum(1), torch.ones(100), atol=1e-4)


@pytest.mark.parametrize("term", ["reverse_kl", "jsd", "tvd"])
def test_other_divergences_of_the_tail_are_those_of_a_bucket(term):
    output, student = teacher(60), teacher(60, seed=5)
    labels = labels_of(output)
    targets = stored("topk_tail", output, temperatures=TEMPERATURES, k=20, draws=10, bits=9)
    for temperature in TEMPERATURES:
        whole, _ = loss(student, labels, output, temperature, term)
        value, _ = loss(student, labels, targets, temperature, term)
        assert 0.3 * whole < value < whole * 1.002
        assert abs(loss(output, labels, targets, temperature, term)[0]) < 0.02 * whole


@pytest.mark.parametrize("k", [VOCAB - 3, VOCAB])
def test_a_tail_of_few_tokens_or_none_is_kept(k):
    output = teacher(60)
    targets = stored("topk_tail", output, temperatures=TEMPERATURES, k=k, draws=5, bits=9)
    assert (targets.known.sum(1) <= VOCAB).all()
    assert (targets.known.sum(1) >= k).all()
    for temperature in TEMPERATURES:
        value, _ = loss(output, labels_of(output), targets, temperature)
        assert abs(value) < 2e-3


def test_a_teacher_without_doubts_is_drawn_from():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, 5] = 0.0
    output = Projection(logits, identity)
    targets = stored("topk_tail", output, k=1, draws=4)
    assert targets.known.sum(1).tolist() == [1, 1]
    assert targets.masses.sum(1).tolist() == [1.0, 1.0]
    targets = stored("sampled", output, draws=4)
    assert targets.ids.tolist() == [[5], [5]]


def test_slots_that_no_token_uses_are_cut_off():
    encoding, columns = observed("sampled", teacher(5, scale=3.0), draws=40)
    read = encoding.open(encoding.pack(columns))
    targets = encoding.targets(read(np.arange(5)), labels_of(teacher(5)))
    assert targets.ids.shape[1] == (columns["counts"] > 0).sum(1).max() < 40


def test_sampled_masses_are_refused_at_other_temperatures():
    with pytest.raises(ValueError, match=r"temperatures=\[1.0, 2.0\]; use 'topk_tail' or 'topk'.*'hidden' or 'dense'"):
        make_encoding("sampled", vocab_size=9, temperatures=(2.0,))


def test_draws_without_uniforms_are_refused():
    output = teacher(3)
    for name in ("sampled", "topk_tail"):
        with pytest.raises(ValueError, match=r"give `uniforms`, one for each of 3"):
            make_encoding(name, vocab_size=VOCAB).observe(output, labels_of(output), None)

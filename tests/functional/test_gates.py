from __future__ import annotations

import math

import pytest
import torch

from hf_distill.functional.gates import open_probability, sampled_gates, settled_gates


LOCATIONS = torch.tensor([-6.0, -2.0, -0.5, 0.0, 0.7, 3.0], dtype=torch.float64)


def uniform(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, len(LOCATIONS), generator=generator, dtype=torch.float64)


def test_the_expected_l0_norm_is_that_of_many_draws():
    gates = sampled_gates(LOCATIONS.expand(200_000, -1), uniform(200_000))
    expected = open_probability(LOCATIONS)
    error = (expected * (1 - expected) / 200_000).sqrt()
    assert (((gates > 0).double().mean(0) - expected).abs() < 4 * error).all()
    assert expected.tolist() == sorted(expected.tolist())


def test_draws_are_those_of_the_paper():
    draws = uniform(50)
    for row, found in zip(draws, sampled_gates(LOCATIONS.expand(50, -1), draws), strict=True):
        for u, location, gate in zip(row.tolist(), LOCATIONS.tolist(), found.tolist(), strict=True):
            concrete = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + location) / (2 / 3)))
            assert gate == pytest.approx(min(1, max(0, concrete * 1.2 - 0.1)), abs=1e-12)


def test_gates_are_exactly_0_and_1_with_positive_probability():
    gates = sampled_gates(torch.zeros(10_000), uniform(10_000)[:, 0].float())
    assert 0.1 < (gates == 0).float().mean() < 0.4
    assert 0.1 < (gates == 1).float().mean() < 0.4
    assert settled_gates(torch.tensor([-10.0, 0.0, 2.5])).tolist() == [0.0, pytest.approx(0.5), 1.0]


def test_the_gradient_of_a_draw_is_that_of_its_formula():
    draws, locations = uniform(20), LOCATIONS.expand(20, -1).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sampled_gates(x, draws), locations)
    assert torch.autograd.gradcheck(open_probability, locations)

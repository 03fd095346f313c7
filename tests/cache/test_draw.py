import numpy as np
import pytest
import torch

from hf_distill.cache.draw import LEAST_MASS, draw, pack_counts, read_counts


pytestmark = pytest.mark.usefixtures("engine")
DEPTH = 32


def some_weights(count=30, width=192):
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(count, width, generator=generator) * 3).exp()
    weights[torch.rand(count, width, generator=generator) < 0.5] = 0.0
    weights[:, 0] = weights[:, -1] = weights[:, 32:64] = 0.0
    weights[0], weights[1, 5] = 0.0, 1e9
    weights[0, 70] = 1e-30  # all there is
    return weights


def draw_from(weights, uniforms, draws):
    """Draw from weights `[n, V]`, V a multiple of 32."""
    table = weights.unflatten(1, (DEPTH, -1))

    def inside(columns):
        return table.transpose(1, 2).gather(1, columns[:, :, None].expand(-1, -1, DEPTH))

    return draw(table.sum(1), inside, uniforms, draws)


def counts_of(weights, uniforms, draws):
    """How often each token was drawn, `[n, V]`."""
    ids, counts = draw_from(weights, uniforms, draws)
    assert ((ids >= 0) == (counts > 0)).all()
    out = torch.zeros(weights.shape, dtype=torch.int64)
    return out.scatter_add_(1, ids.clamp(min=0), counts)


@pytest.mark.parametrize("draws", [1, 8, 50])
@pytest.mark.parametrize("uniform", [0.0, 0.37, 1 - 2**-53])
def test_a_token_is_drawn_in_proportion_to_its_weight_but_for_less_than_one(draws, uniform):
    weights = some_weights()
    counts = counts_of(weights, torch.full((30,), uniform, dtype=torch.float64), draws)
    assert (counts.sum(1) == draws).all()
    expected = draws * weights.double() / weights.double().sum(1, keepdim=True)
    assert ((counts - expected).abs() < 1 + 1e-5).all()
    assert (counts[weights == 0] == 0).all()


def test_the_mean_over_all_uniforms_is_the_distribution():
    weights = some_weights(6)
    steps = 4096
    uniforms = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for row in weights:
        mean = counts_of(row.expand(steps, -1), uniforms, 5).double().mean(0) / 5
        # Each edge of a token's share of the distribution function falls between two of the uniforms.
        assert torch.allclose(mean, row.double() / row.double().sum(), rtol=0, atol=1.01 / steps)


def test_each_token_fills_one_slot():
    ids, counts = draw_from(some_weights(), torch.rand(30, dtype=torch.float64), 50)
    for row, used in zip(ids, counts > 0, strict=True):
        assert len(row[used].unique()) == used.sum()
        assert used[: used.sum()].all()


def test_nothing_is_drawn_where_there_is_no_weight():
    ids, counts = draw_from(torch.zeros(2, 64), torch.rand(2, dtype=torch.float64), 5)
    assert (ids == -1).all()
    assert (counts == 0).all()


def test_a_column_whose_weights_may_be_lost_in_rounding_is_not_drawn_from():
    weights = torch.zeros(3, 64)
    weights[:, 5] = LEAST_MASS * torch.tensor([0.5, 2.0, 0.5])
    weights[2, 6] = 1.0
    ids, counts = draw_from(weights, torch.full((3,), 0.5, dtype=torch.float64), 4)
    assert ids[:, 0].tolist() == [-1, 5, 6]
    assert counts[:, 0].tolist() == [0, 4, 4]


@pytest.mark.parametrize("draws", [1, 7, 8, 50])
def test_counts_come_back_from_as_many_bits_as_there_are_draws(draws):
    ids, counts = draw_from(some_weights(), torch.rand(30, dtype=torch.float64), draws)
    ids = torch.cat([ids, torch.full((1, draws), -1), ids]).numpy()
    counts = torch.cat([counts, torch.zeros(1, draws, dtype=torch.int64), counts]).numpy()
    packed = pack_counts(counts, draws)
    assert packed.shape == (61, -(-draws // 8))
    for numbers in (np.arange(61), np.array([60, 30, 30, 2]), np.arange(0)):
        np.testing.assert_array_equal(read_counts(packed, numbers, ids[numbers]), counts[numbers])

import math

import numpy as np
import pytest
import torch

from hf_distill.cache.values import (
    HALF_ERROR,
    normaliser,
    pack_codes,
    pack_scalars,
    quantise,
    read_log_probs,
    read_scalars,
    unpack_codes,
)


pytestmark = pytest.mark.usefixtures("engine")


def some_log_probs(count=500, slots=20, depth=9.0):
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(count, slots, generator=generator) * depth
    return log_probs.masked_fill_(torch.rand(count, slots, generator=generator) < 0.2, -math.inf)


@pytest.mark.parametrize("bits", [2, 6, 8, 10])
def test_a_log_probability_is_off_by_half_a_step_at_most(bits):
    log_probs = some_log_probs()
    log_probs[0, 1:] = -math.inf
    codes, steps = quantise(log_probs, bits)
    assert 2**bits - 2 <= codes.max() <= 2**bits - 1
    used = log_probs > -math.inf
    depths = log_probs.amax(1, keepdim=True) - log_probs
    arrays = {"codes": pack_codes(codes, bits), "steps": steps}
    restored = read_log_probs(arrays, np.arange(len(codes)), bits, np.where(used, 0, -1))
    assert (restored[~used] == -math.inf).all()
    errors = (restored + depths).abs()[used]
    halves = torch.from_numpy(steps.astype(np.float32) / 2)[:, None].expand_as(used)[used]
    assert (errors <= halves * (1 + 1e-4) + 1e-6).all()
    ranges = depths.where(used, 0.0).amax(1)
    assert (torch.from_numpy(steps.astype(np.float32)) <= ranges / (2**bits - 1) * 1.002 + 1e-7).all()
    assert (codes[~used.numpy()] == 0).all()


def test_a_token_of_one_value_has_no_step():
    codes, steps = quantise(torch.full((3, 4), -2.5), 8)
    assert (codes == 0).all()
    assert (steps == 0).all()


def test_pieces_of_quantising_do_not_show(monkeypatch):
    log_probs = some_log_probs()
    whole = quantise(log_probs, 8)
    monkeypatch.setattr("hf_distill.cache.values._AT_ONCE", 7)
    for first, second in zip(whole, quantise(log_probs, 8), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("log_rest", [-math.inf, -80.0, -3.0, -0.6931, -0.1, -1e-6])
def test_ids_and_rest_have_a_mass_of_one_at_every_temperature(temperature, log_rest):
    log_probs = some_log_probs(depth=3.0)
    log_rests = torch.full((len(log_probs),), log_rest)
    depths = log_probs - log_probs.amax(1, keepdim=True)
    level = normaliser((depths / temperature).exp().sum(1), log_rests).double()
    inside = (depths.double() / temperature - level[:, None]).exp().sum(1)
    assert torch.allclose(inside, -torch.expm1(log_rests.double()), rtol=1e-4)


@pytest.mark.parametrize("bits", range(1, 11))
def test_codes_come_back_from_as_many_bits_as_they_have(bits):
    for count in (1, 7, 8, 21, 48):
        codes = np.random.default_rng(0).integers(0, 2**bits, (30, count)).astype(np.uint16)
        packed = pack_codes(codes, bits)
        assert packed.dtype == np.uint8
        assert bits * count / 8 <= packed.shape[1] < bits * count / 8 + bits.bit_count()
        np.testing.assert_array_equal(unpack_codes(packed, count, bits), codes)
        np.testing.assert_array_equal(unpack_codes(packed[::-2], count, bits), codes[::-2])
        assert unpack_codes(packed[:0], count, bits).shape == (0, count)


def test_scalars_are_off_by_no_more_than_half_precision():
    columns = {"label_log_probs": -torch.logspace(-4, 2, 300), "entropies": torch.rand(300, 2) + 1e-4}
    arrays = pack_scalars(columns)
    numbers = np.arange(300)[::-1].copy()
    for name, read in read_scalars(arrays, numbers).items():
        expected = columns[name][numbers.tolist()]
        assert arrays[name].dtype == np.float16
        assert ((read - expected).abs() <= expected.abs() * HALF_ERROR).all()


def test_rounding_leaves_the_ids_a_mass_and_the_rest_none():
    columns = {"log_rests": torch.tensor([[-1e-9], [0.0], [-math.inf], [-200.0]])}
    read = read_scalars(pack_scalars(columns), np.arange(4))["log_rests"].flatten()
    assert (read[:2] < 0).all()
    assert (read[:2] > -1e-7).all()
    assert read[2] == -math.inf
    assert read[3] == -200.0

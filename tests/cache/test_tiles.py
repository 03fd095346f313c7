import types

import pytest
import torch
import torch.nn.functional as F

from hf_distill.cache import compiled
from hf_distill.cache.tiles import DEPTH, IMPOSSIBLE, Tiles
from hf_distill.functional import LMHead


TEMPERATURES = (0.5, 1.0, 3.0)
# The widths of the table are 1, 1 with rows left over, 2 with the last column half full, and more.
VOCABULARIES = (32, 7, 47, 1000)


def logits_of(vocab_size):
    """Sure, unsure, shifted and extreme rows, and some with impossible tokens, in 16 bits."""
    torch.manual_seed(0)
    logits = torch.randn(60, vocab_size) * torch.logspace(-2, 2, 60)[:, None] + torch.linspace(-80, 80, 60)[:, None]
    logits[::7, ::2] = -torch.inf
    return logits.bfloat16()


def read(logits, temperatures=TEMPERATURES):
    tops, spreads = Tiles(logits, None, temperatures, temperatures)(logits)
    return tops, [spreads[temperature] for temperature in temperatures]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_tiles_are_the_distribution_of_16_bit_logits(vocab_size, engine):
    logits = logits_of(vocab_size)
    tops, spreads = read(logits)
    width = tops.shape[1]
    assert width == -(-vocab_size // DEPTH)
    padded = F.pad(logits.double().clamp(min=IMPOSSIBLE), (0, width * DEPTH - vocab_size), value=-torch.inf)
    assert torch.equal(tops.double(), padded.float().double().unflatten(1, (DEPTH, -1)).amax(1))
    for temperature, spread in zip(TEMPERATURES, spreads, strict=True):
        log_probs = (padded / temperature).log_softmax(1)
        masses = log_probs.exp().unflatten(1, (DEPTH, -1)).sum(1)
        # The exponents are right to 2^-24 of the greatest of them, which is near 2^9.
        assert torch.allclose(spread.masses.double(), masses, rtol=1e-4, atol=1e-37)
        log_total = (logits.double() / temperature).logsumexp(1)
        assert torch.allclose(spread.log_total.double(), log_total, rtol=1e-6, atol=1e-5)
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(1)
        assert torch.allclose(spread.entropy.double(), entropy, rtol=0, atol=2e-4)


def test_a_weight_is_right_to_single_precision(engine):
    logits = torch.full((1000, 64), -torch.inf)
    logits[:, 0], logits[:, 1] = 0.0, torch.linspace(0, -4, 1000)  # each in a column of its own
    logits = logits.bfloat16()
    for temperature, spread in zip(TEMPERATURES, read(logits)[1], strict=True):
        probs = (logits.double() / temperature).softmax(1)
        assert torch.allclose(spread.masses.double(), probs[:, :2], rtol=1e-6, atol=0)


def test_a_teacher_that_gives_no_numbers_is_not_made_to_give_some(engine):
    logits = logits_of(100)
    logits[3, 50] = logits[4, 51] = torch.nan
    logits.view(torch.int16)[4, 51] |= -(2**15)  # a NaN with a sign
    for spread in read(logits)[1]:
        without = spread.entropy.isnan(), spread.log_total.isnan()
        assert [rows.nonzero().flatten().tolist() for rows in without] == [[3, 4], [3, 4]]


def test_the_number_of_threads_changes_no_bit():
    pytest.importorskip("numba")
    logits, threads = logits_of(1000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            tops, spreads = read(logits)
            found.append([tops, *(part for s in spreads for part in (s.masses, s.log_total, s.entropy))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_only_products_that_are_logits_in_16_bits_go_through_the_compiled_loop(monkeypatch):
    def read_logits(*_):
        raise AssertionError("went through the loop")

    monkeypatch.setattr(compiled, "loops", lambda: types.SimpleNamespace(read_logits=read_logits))
    logits, weight = logits_of(100), torch.randn(100, 8)
    others = [
        (logits.float(), None),
        (logits.half(), None),
        (logits, LMHead(weight, scale=0.5)),
        (logits, LMHead(weight, softcap=30.0)),
    ]
    for products, head in others:
        Tiles(products, head, (1.0,), (1.0,))(products)
    for head in (None, LMHead(weight), LMHead(weight, bias=torch.zeros(100))):
        with pytest.raises(AssertionError, match="went through the loop"):
            Tiles(logits, head, (1.0,), (1.0,))(logits)

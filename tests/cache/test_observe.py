import math

import pytest
import torch

from hf_distill.cache import observe as observe_module
from hf_distill.cache.observe import blocks
from hf_distill.functional import LMHead
from hf_distill.signals import Projection, identity
from tests.cache.encodings import VOCAB, log_probs_at, teacher


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, VOCAB)},
    "scale and softcap": {"scale": 0.5, "softcap": 3.0},
}


@pytest.fixture(params=[2**20, 1000], ids=["one block", "many blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(observe_module, "_CPU_BLOCK", request.param)
    monkeypatch.setattr(observe_module, "_CPU_CHUNK_BYTES", 4 * VOCAB * 130)


def look(output, function):
    """What a function makes of all blocks, and which rows it saw."""
    with torch.no_grad():
        seen = [(block.part, function(block)) for block in blocks(output)]
    rows = torch.cat([torch.arange(part.start, part.stop) for part, _ in seen])
    assert rows.tolist() == list(range(len(output.hidden)))
    return torch.cat([values for _, values in seen])


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_top_values_are_those_of_torch_topk(options, plain, block_size):
    output = teacher(300)
    head = LMHead(output.head.weight, **options)
    output = Projection(output.hidden, head if plain else head.__call__)
    logits = head(output.hidden)
    for count in (1, 5, 50, VOCAB):
        values = look(output, lambda block, count=count: block.top(count)[0]).sort(1, descending=True).values
        ids = look(output, lambda block, count=count: block.top(count)[1])
        assert torch.allclose(values, logits.topk(count).values, atol=1e-5)
        assert torch.allclose(logits.gather(1, ids).sort(1, descending=True).values, values, atol=1e-5)
        assert all(len(row.unique()) == count for row in ids)


def test_equal_logits_are_each_taken_once():
    output = Projection(torch.randint(0, 3, (50, VOCAB)).float(), identity)
    ids = look(output, lambda block: block.top(60)[1])
    values = output.hidden.gather(1, ids).sort(1, descending=True).values
    assert torch.equal(values, output.hidden.topk(60).values)
    assert all(len(row.unique()) == 60 for row in ids)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_spread_is_the_distribution_at_its_temperature(temperature, block_size):
    output = teacher(300)
    expected = log_probs_at(output, temperature)
    probs = look(output, lambda block: block.spread(temperature, entropy=False).probs.clone())[:, :VOCAB]
    log_total = look(output, lambda block: block.spread(temperature, entropy=False).log_total)
    entropy = look(output, lambda block: block.spread(temperature, entropy=True).entropy)
    logits = output.head(output.hidden).double()
    assert torch.allclose(probs.double(), expected.exp(), rtol=1e-4)
    assert torch.allclose(log_total.double(), (logits / temperature).logsumexp(1), rtol=1e-5)
    assert torch.allclose(entropy.double(), -(expected.exp() * expected).sum(1), atol=1e-5)


def test_the_mass_beyond_ids_is_precise_where_it_is_next_to_nothing():
    tops = torch.tensor([60.0, 80.0])
    logits = torch.zeros(2, VOCAB).index_fill(1, torch.tensor([3]), 1.0) * tops[:, None]
    ids = torch.full((2, 1), 3)
    rest = look(Projection(logits, identity), lambda block: block.spread(1.0, entropy=False).take_out_(ids))
    assert torch.allclose(rest.log(), math.log(VOCAB - 1) - tops, atol=1e-4)


def test_impossible_tokens_have_no_mass_and_leave_the_entropy_finite():
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[:, 7], logits[:, 100] = 1.0, 1.0
    output = Projection(logits, identity)
    entropy = look(output, lambda block: block.spread(1.0, entropy=True).entropy)
    assert torch.allclose(entropy, torch.full((3,), 2.0).log())


def test_no_rows_give_one_empty_block():
    output = Projection(torch.empty(0, VOCAB), identity)
    assert look(output, lambda block: block.top(5)[0]).shape == (0, 5)

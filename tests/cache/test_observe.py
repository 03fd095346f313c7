import math

import pytest
import torch
import torch.nn.functional as F

from hf_distill.cache import observe as observe_module
from hf_distill.cache import tiles as tiles_module
from hf_distill.cache.observe import blocks
from hf_distill.functional import LMHead
from hf_distill.signals import Projection, identity
from tests.cache.encodings import VOCAB, log_probs_at, teacher


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, VOCAB)},
    "scale and softcap": {"scale": 0.5, "softcap": 3.0},
}


@pytest.fixture(params=[2**20, 1000], ids=["one tile", "many tiles"])
def tile_size(request, monkeypatch):
    monkeypatch.setattr(tiles_module, "_CPU_TILE", request.param)
    monkeypatch.setattr(observe_module, "_CPU_BLOCK_BYTES", 4 * VOCAB * 130)


def look(output, function, temperatures=(1.0,)):
    """What a function makes of all blocks, and which rows it saw."""
    with torch.no_grad():
        seen = [(block.part, function(block)) for block in blocks(output, temperatures, temperatures)]
    rows = torch.cat([torch.arange(part.start, part.stop) for part, _ in seen])
    assert rows.tolist() == list(range(len(output.hidden)))
    return torch.cat([values for _, values in seen])


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_top_values_are_those_of_torch_topk(options, plain, tile_size):
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
def test_a_spread_is_the_distribution_at_its_temperature(temperature, tile_size):
    output = teacher(300)
    expected = log_probs_at(output, temperature)
    every = torch.arange(VOCAB).expand(300, -1)

    def probs_of(block):
        return block.spreads[temperature].probs(block.logits(every[block.part]))

    probs = look(output, probs_of, (3.0, temperature))
    masses = look(output, lambda block: block.spreads[temperature].masses, (3.0, temperature))
    log_total = look(output, lambda block: block.spreads[temperature].log_total, (3.0, temperature))
    entropy = look(output, lambda block: block.spreads[temperature].entropy, (3.0, temperature))
    logits = output.head(output.hidden).double()
    assert torch.allclose(probs.double(), expected.exp(), rtol=1e-4)
    columns = F.pad(expected.exp(), (0, masses.shape[1] * 32 - VOCAB)).unflatten(1, (32, -1)).sum(1)
    assert torch.allclose(masses.double(), columns, rtol=1e-4)
    assert torch.allclose(log_total.double(), (logits / temperature).logsumexp(1), rtol=1e-5)
    assert torch.allclose(entropy.double(), -(expected.exp() * expected).sum(1), atol=1e-5)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_ids_that_are_taken_out_leave_the_mass_of_all_others(options, tile_size):
    output = teacher(300)
    output = Projection(output.hidden, LMHead(output.head.weight, **options))
    ids = torch.stack([torch.randperm(VOCAB)[:40] for _ in range(300)])
    rests = look(output, lambda block: torch.stack(block.take_out_(ids[block.part]), 1), (1.0, 2.0))
    for temperature, rest in zip((1.0, 2.0), rests.unbind(1), strict=True):
        expected = log_probs_at(output, temperature).exp().scatter(1, ids, 0.0).sum(1)
        assert torch.allclose(rest.double(), expected, rtol=1e-4)


def test_ids_that_were_taken_out_are_impossible_and_are_not_drawn():
    output = teacher(50)
    ids = output.head(output.hidden).topk(150).indices

    def drawn(block):
        block.take_out_(ids)
        assert (block.logits(ids) < -1e29).all()
        return block.draw(torch.rand(50, dtype=torch.float64), 40)[0]

    tail = look(output, drawn)
    assert (tail >= 0).sum(1).min() > 10
    assert not (tail[:, :, None] == ids[:, None]).any()


def test_draws_are_those_of_the_mean_of_all_temperatures():
    output = teacher(3)
    uniforms = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    probs = torch.stack([log_probs_at(output, temperature).exp() for temperature in (1.0, 2.0)]).mean(0)
    for hidden, expected in zip(output.hidden, probs, strict=True):
        same = Projection(hidden.expand(4096, -1), output.head)
        drawn = look(same, lambda block: torch.stack(block.draw(uniforms[block.part], 5), 1), (1.0, 2.0))
        ids, counts = drawn.unbind(1)
        mean = torch.zeros(VOCAB, dtype=torch.float64).index_add_(
            0, ids.clamp(min=0).flatten(), counts.double().flatten()
        )
        # Each edge of a token's share of the distribution function falls between two of the uniforms.
        assert torch.allclose(mean / 4096 / 5, expected, rtol=0, atol=1.01 / 4096)


def test_a_teacher_whose_output_is_logits_keeps_them():
    logits = torch.randn(5, VOCAB)
    given = logits.clone()
    look(Projection(logits, identity), lambda block: block.take_out_(block.top(10)[1])[0])
    assert torch.equal(logits, given)


@pytest.mark.parametrize("gap", [60.0, 80.0])
def test_the_mass_beyond_ids_is_precise_where_it_is_next_to_nothing(gap):
    logits = torch.zeros(2, VOCAB)
    logits[:, 3] = gap
    ids = torch.full((2, 1), 3)
    rest = look(Projection(logits, identity), lambda block: block.take_out_(ids)[0])
    assert torch.allclose(rest.log(), torch.tensor(math.log(VOCAB - 1) - gap), atol=1e-4)


def test_impossible_tokens_have_no_mass_and_leave_the_entropy_finite():
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[:, 7], logits[:, 100] = 1.0, 1.0
    output = Projection(logits, identity)
    entropy = look(output, lambda block: block.spreads[1.0].entropy)
    assert torch.allclose(entropy, torch.full((3,), 2.0).log())


@pytest.mark.parametrize("count", [3, 10, VOCAB])
def test_the_greatest_are_of_the_vocabulary_where_most_tokens_are_impossible(count):
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[:, ::60] = torch.randn(3, 4)

    def taken(block):
        ids = block.top(count)[1]
        block.take_out_(ids)
        return ids

    ids = look(Projection(logits, identity), taken)
    assert ids.max() < VOCAB
    assert all(len(row.unique()) == count for row in ids)


def test_no_rows_give_one_empty_block():
    output = Projection(torch.empty(0, VOCAB), identity)
    assert look(output, lambda block: block.top(5)[0]).shape == (0, 5)

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_distill.cache.compare import kl_from_cache
from hf_distill.cache.registry import make_encoding
from hf_distill.functional import SparseLogits
from hf_distill.signals import Projection, identity


VOCABULARY = 60


def logits(tokens: int = 50, seed: int = 0) -> Tensor:
    return 3 * torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def exact(of: Tensor, k: int, temperature: float = 1.0) -> SparseLogits:
    """What an encoding `topk` without rounding gives."""
    log_probs = of.log_softmax(-1)
    values, ids = log_probs.topk(k)
    tempered = (of / temperature).log_softmax(-1)
    return SparseLogits(
        ids=ids,
        log_probs=values,
        masses=None,
        log_normalisers={temperature: (log_probs / temperature).logsumexp(1)},
        entropies={1.0: torch.zeros(len(of))},
        labels=ids[:, 0],
        label_log_probs=values[:, 0],
        vocab_size=VOCABULARY,
        log_rests={temperature: tempered.scatter(1, ids, -math.inf).logsumexp(1)},
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_a_cache_without_rounding_is_the_teacher(k: int, temperature: float) -> None:
    assert kl_from_cache(logits(), exact(logits(), k, temperature), temperature).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_divergence_over_ids_and_a_bucket(temperature: float) -> None:
    other = logits(seed=1)
    p, c = ((of.double() / temperature).softmax(-1) for of in (logits(), other))
    targets = exact(other, 7, temperature)
    for n, value in enumerate(kl_from_cache(logits(), targets, temperature).tolist()):
        ids = targets.ids[n].tolist()
        groups = [[token] for token in ids] + [[token for token in range(VOCABULARY) if token not in ids]]
        masses = [(sum(float(p[n, t]) for t in group), sum(float(c[n, t]) for t in group)) for group in groups]
        assert value == pytest.approx(sum(a * math.log(a / b) for a, b in masses), rel=1e-4, abs=1e-6)


def test_all_ids_give_the_whole_divergence() -> None:
    other = logits(seed=1)
    whole = (logits().softmax(-1) * (logits().log_softmax(-1) - other.log_softmax(-1))).sum(1)
    assert torch.allclose(kl_from_cache(logits(), exact(other, VOCABULARY), 1.0).float(), whole, atol=1e-4)
    assert torch.allclose(kl_from_cache(logits(), Projection(other, identity), 1.0).float(), whole, atol=1e-4)
    assert torch.allclose(kl_from_cache(logits() * 2, Projection(other * 2, identity), 2.0).float(), whole, atol=1e-4)


def test_a_rest_that_was_not_kept_is_what_the_ids_leave() -> None:
    targets = exact(logits(seed=1), 7)
    assert torch.allclose(
        kl_from_cache(logits(), replace(targets, log_rests={}), 1.0), kl_from_cache(logits(), targets, 1.0), atol=1e-4
    )


def test_unused_slots_belong_to_the_bucket_whatever_id_they_hold() -> None:
    targets = exact(logits(), 6)
    log_probs = torch.cat([targets.log_probs, torch.full((50, 1), -math.inf)], 1)
    for spare in (torch.full((50, 1), 3), torch.full((50, 1), -1), targets.ids[:, :1]):
        padded = replace(targets, ids=torch.cat([targets.ids, spare], 1), log_probs=log_probs)
        assert kl_from_cache(logits(), padded, 1.0).abs().max() < 1e-5


def test_sampled_masses_are_right_on_average() -> None:
    teacher, count = logits(1).expand(4000, -1), 50
    p = teacher.softmax(-1)
    ids = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(0))
    entropy = -(p * p.log()).sum(1)
    samples = SparseLogits(
        ids=ids,
        log_probs=None,
        masses=torch.full(ids.shape, 1 / count),
        log_normalisers={},
        entropies={1.0: entropy},
        labels=ids[:, 0],
        label_log_probs=p[:, 0],
        vocab_size=VOCABULARY,
    )
    values = kl_from_cache(teacher, samples, 1.0)
    assert values.mean().abs() < 4 * values.std() / math.sqrt(4000)
    assert values.std() > 0.01
    wrong = kl_from_cache(logits(1, seed=1).expand(4000, -1), samples, 1.0)
    assert wrong.mean() > 20 * values.std() / math.sqrt(4000)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_encoding_rounds_is_below_its_floor(temperature: float) -> None:
    encoding = make_encoding("topk", vocab_size=VOCABULARY, k=20, temperatures=(1.0, 2.0))
    labels = torch.arange(50)
    columns = encoding.observe(Projection(logits(), identity), labels, None)
    read = encoding.open(encoding.pack(columns))(torch.arange(50).numpy())
    values = kl_from_cache(logits(), encoding.targets(read, labels), temperature)
    assert 0 < values.mean() < 2e-3

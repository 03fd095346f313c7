"""Shards and batches are decided from the rows alone."""

import numpy as np
import pytest
from datasets import Dataset

from hf_distill.cache.plan import plan_rows


def example(*ids, **more):
    return {"input_ids": list(ids), **more}


def examples(count=40, seed=0):
    generator = np.random.default_rng(seed)
    return [example(*generator.integers(0, 300, generator.integers(2, 30)).tolist()) for _ in range(count)]


def test_every_row_is_in_one_shard_in_the_order_of_the_dataset():
    data = examples()
    plan = plan_rows(data, shard_tokens=100, batch_tokens=64)
    assert len(plan) > 3
    stored = [row.ids.tolist() for shard in range(len(plan)) for row in plan.rows(shard)]
    assert stored == [row["input_ids"] for row in data]
    for shard in range(len(plan) - 1):
        kept = [int(row.kept.sum()) for row in plan.rows(shard)]
        assert sum(kept) >= 100 > sum(kept[:-1])


def test_every_row_of_a_shard_is_in_one_batch_of_no_more_tokens_than_allowed():
    plan = plan_rows(examples(), shard_tokens=200, batch_tokens=64)
    for shard in range(len(plan)):
        lengths = np.array([len(row.ids) for row in plan.rows(shard)])
        batches = plan.batches(shard)
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        assert all(len(batch) * lengths[batch].max() <= 64 for batch in batches)
        assert any(len(batch) > 1 for batch in batches)


def test_a_row_that_is_longer_than_a_batch_is_alone_in_one():
    plan = plan_rows([example(1, 2, 3), example(*range(50)), example(4, 5)], shard_tokens=1000, batch_tokens=10)
    assert [batch.tolist() for batch in plan.batches(0)] == [[2, 0], [1]]


def test_a_row_that_comes_again_is_kept_once_with_what_any_of_them_keeps():
    twice = [example(1, 2, 3, labels=[-100, 2, -100]), example(7, 8), example(1, 2, 3, labels=[-100, -100, 3])]
    plan = plan_rows(twice, 10, 10)
    [first, second] = plan.rows(0)
    assert first.kept.tolist() == [True, True]
    assert second.ids.tolist() == [7, 8]
    assert plan.counts.tolist() == [2, 1]
    assert len(plan_rows([*twice, twice[0]], 10, 10).rows(0)) == 2


def test_documents_that_are_packed_otherwise_are_the_same_rows():
    apart = plan_rows([example(1, 2, 3), example(4, 5)], 10, 10)
    packed = plan_rows([example(1, 2, 3, 4, 5, seq_lengths=[3, 2])], 10, 10)
    assert [row.key for row in apart.rows(0)] == [row.key for row in packed.rows(0)]
    assert apart.fingerprint == packed.fingerprint


def test_the_fingerprint_tells_other_rows_another_order_and_other_labels():
    data = [example(1, 2, 3), example(4, 5, 6)]
    others = [
        data[::-1],
        [example(1, 2, 3), example(4, 5, 7)],
        [example(1, 2, 3), example(4, 5, 6, labels=[4, -100, 6])],
        [*data, example(9, 9)],
    ]
    prints = {plan_rows(rows, 10, 10).fingerprint for rows in [data, *others]}
    assert len(prints) == 1 + len(others)
    assert plan_rows(data, 10, 10).fingerprint == plan_rows(data, 3, 99).fingerprint


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="can only be streamed"):
        plan_rows(Dataset.from_list(examples(3)).to_iterable_dataset(), 10, 10)
    with pytest.raises(ValueError, match="no row with a label"):
        plan_rows([example(1), example(2, 3, labels=[-100, -100])], 10, 10)
    with pytest.raises(ValueError, match="`batch_tokens` is 0"):
        plan_rows(examples(), 10, 0)

"""Memory: published numbers, and arithmetic."""

from __future__ import annotations

import pytest

from hf_distill.planning.memory import (
    QUANTISED,
    Layout,
    full_logits_bytes,
    gathered_bytes,
    optimizer_bytes,
    weight_bytes,
)
from tests.planning.llama import count_8b, count_70b


LLAMA = 128256, 128256


def test_nf4_70b_has_36_gb_of_linear_weights():
    assert 70e9 * QUANTISED["nf4"] / 1e9 == pytest.approx(36.1, abs=0.05)
    count = count_70b()
    assert 2 * (count.embedding + count.head) / 1e9 == pytest.approx(4.2, abs=0.05)
    # Of the 70.55 B parameters, 68.45 B are in linear layers.
    assert weight_bytes(count, "nf4") / 1e9 == pytest.approx(35.31 + 4.20, abs=0.01)
    assert weight_bytes(count) == 2 * count.total


def test_weights_and_moments_take_12_of_the_16_bytes_of_a_parameter_sharded():
    assert sum(optimizer_bytes(1000, Layout(8, "fsdp2")).values()) == 12 * 1000 / 8
    assert sum(optimizer_bytes(1000, Layout(8, "zero3"), 2).values()) == 6 * 1000 / 8


def test_ddp_adds_buckets():
    alone, together = (sum(optimizer_bytes(1000, Layout(ranks, "ddp")).values()) for ranks in (1, 2))
    assert alone == 12 * 1000
    assert together == 16 * 1000


def test_quantised_weights_are_not_sharded():
    assert Layout(8, "fsdp2").per_rank(800.0) == 100.0
    assert Layout(8, "fsdp2").per_rank(800.0, quantised=True) == 800.0
    assert Layout(8, "ddp").per_rank(800.0) == 800.0


def test_whole_logits_of_a_chunk_of_llama_take_twelve_gigabytes():
    assert full_logits_bytes(4 * 2048, LLAMA) / 3e9 == pytest.approx(4.2, abs=0.01)


def test_gathering_holds_the_layers_of_the_larger_model_and_both_heads():
    counts = [count_8b(), count_70b()]
    expected = 2 * (2 * counts[1].block + counts[1].embedding + counts[0].head + counts[1].head)
    assert gathered_bytes(counts, None) == expected
    assert gathered_bytes(counts, counts[0]) == expected + 2 * counts[0].block
    assert gathered_bytes([], None) == 0

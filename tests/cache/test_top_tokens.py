from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_distill.cache.registry import make_encoding
from hf_distill.cache.top_tokens import NO_REST, TopTokens, topk_columns


VOCABULARY = 9


def tokens(probs: list[list[float]], ids: list[list[int]] | None = None, labels: list[int] | None = None) -> TopTokens:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array(probs))
    chosen = np.array(ids or [list(range(len(row))) for row in probs])
    followed = np.array(labels or [0] * len(probs))
    is_label = chosen == followed[:, None]
    return TopTokens(chosen, log_probs, followed, np.where(is_label.any(1), (log_probs * is_label).sum(1), -4.0))


def test_columns_are_in_the_order_of_probability() -> None:
    columns = topk_columns(tokens([[0.1, 0.5, 0.2]], [[4, 7, 5]], [4]), VOCABULARY)
    assert columns["ids"].tolist() == [[7, 5, 4]]
    assert columns["log_probs"].exp().tolist() == [pytest.approx([0.5, 0.2, 0.1])]
    assert columns["log_rests"].exp().item() == pytest.approx(0.2)
    assert columns["label_log_probs"].exp().item() == pytest.approx(0.1)
    outcomes = np.array([0.5, 0.2, 0.1, 0.2])
    assert columns["entropies"].item() == pytest.approx(-(outcomes * np.log(outcomes)).sum())


def test_impossible_tokens_leave_their_slot_unused_and_last() -> None:
    columns = topk_columns(tokens([[0.0, 0.7, 0.1], [0.2, 0.3, 0.1]]), VOCABULARY)
    assert columns["ids"].tolist() == [[1, 2, -1], [1, 0, 2]]
    assert columns["log_probs"][0, 2] == -math.inf
    assert columns["entropies"].isfinite().all()
    encoding = make_encoding("topk", vocab_size=VOCABULARY, k=3)
    read = encoding.open(encoding.pack(columns))(np.arange(2))
    assert sorted(read["ids"][0].tolist()) == [-1, 1, 2]


def test_a_teacher_that_is_sure_leaves_what_fp32_cannot_tell_from_nothing() -> None:
    columns = topk_columns(tokens([[1.0, 1e-12]]), VOCABULARY)
    assert columns["log_rests"].item() == pytest.approx(math.log(NO_REST))


def test_all_of_the_vocabulary_leaves_no_rest() -> None:
    columns = topk_columns(tokens([[0.5, 0.5]]), vocab_size=2)
    assert columns["log_rests"].item() == -math.inf
    assert columns["entropies"].item() == pytest.approx(math.log(2))


def test_more_than_all_of_the_probability_is_brought_to_1() -> None:
    columns = topk_columns(tokens([[0.9, 0.6], [0.9, 0.6], [0.5, 0.1]], labels=[1, 5, 0]), VOCABULARY)
    assert columns["log_probs"].exp().tolist() == [pytest.approx(row) for row in ([0.6, 0.4], [0.6, 0.4], [0.5, 0.1])]
    assert columns["label_log_probs"].tolist() == pytest.approx([math.log(0.4), -4.0, math.log(0.5)])
    assert columns["log_rests"][:2].flatten().tolist() == pytest.approx([math.log(NO_REST)] * 2)
    assert {name: of.dtype for name, of in columns.items()} == {
        name: torch.int32 if name == "ids" else torch.float32 for name in columns
    }
